"""Context parallelism: groups of processes compute what one process computes."""

import pytest

import context_cases
import processes

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module", params=[2, 4])
def failures(request, tmp_path_factory):
    """What went wrong in each case, in some process."""
    folder = tmp_path_factory.mktemp("group")
    found = processes.run(request.param, context_cases.run_all, folder, list(context_cases.CASES))
    names = {name for of_one in found for name in of_one}
    return {
        name: "\n".join(
            f"process {rank}: {of_one[name]}" for rank, of_one in enumerate(found) if name in of_one
        )
        for name in names
    }


@pytest.mark.parametrize("name", context_cases.CASES)
def test_a_group_computes_what_one_process_computes(failures, name):
    assert name not in failures, failures[name]
