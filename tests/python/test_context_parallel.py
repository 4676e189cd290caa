"""Context parallelism: groups of processes compute what one process computes."""

import re

import pytest

import context_cases
import processes

pytestmark = pytest.mark.cpu_only

# Four processes share two cores in CI: the cases for which their number may matter.
OF_FOUR = re.compile(
    r"attention|ddp|verification|keep 0.5, p|computed, padded left|no label of some"
)
CASES = {
    2: list(context_cases.CASES),
    4: [name for name in context_cases.CASES if OF_FOUR.match(name)],
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What went wrong in each case in groups of a size, in some process."""
    known = {}

    def of(count: int) -> dict[str, str]:
        if count not in known:
            folder = tmp_path_factory.mktemp("group")
            known[count] = processes.run(count, context_cases.run_all, folder, CASES[count])
        texts = {}
        for rank, found in enumerate(known[count]):
            for name, text in found.items():
                texts[name] = texts.get(name, "") + f"process {rank}: {text}\n"
        return texts

    return of


@pytest.mark.parametrize(
    ("count", "name"), [(count, name) for count, names in CASES.items() for name in names]
)
def test_a_group_computes_what_one_process_computes(failures, count, name):
    assert name not in failures(count), failures(count)[name]
