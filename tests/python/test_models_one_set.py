"""What a pass with one set of rows depends on: rows with labels, and settings of torch."""

from types import SimpleNamespace

import pytest
import torch

from lemo.models import one_set

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("labelled", [1, 17, 60, 64])
def test_rows_of_labels(labelled):
    targets = torch.full((64,), -100)
    with_labels = torch.randperm(64)[:labelled].sort()[0]
    targets[with_labels] = torch.arange(labelled)
    rows, chosen = one_set.labels_of_rows(targets, -100, labelled)
    if rows is None:
        assert labelled > 60
        assert torch.equal(chosen, targets)
        return
    assert labelled <= rows.numel() <= labelled + labelled // 8
    assert torch.equal(rows, rows.unique()), "ascending, each once"
    assert torch.equal(chosen, targets[rows.long()])
    assert set(with_labels.tolist()) <= set(rows.tolist())


@pytest.mark.parametrize("count", [640, 16384, 20000])
def test_answers_of_any_length_have_few_shapes(count):
    targets, sizes = torch.full((count,), -100), set()
    for labelled in range(count // 64):
        targets[labelled] = 1
        rows, _ = one_set.labels_of_rows(targets, -100, labelled + 1)
        sizes.add(rows.numel())
        assert labelled < rows.numel() <= (labelled + 1) * 9 / 8 + count / 64
    assert len(sizes) <= 3


MATMUL = {
    "fp32_precision": "tf32",
    "allow_bf16_reduced_precision_reduction": False,
    "allow_fp16_reduced_precision_reduction": False,
    "allow_fp16_accumulation": True,
}


@pytest.mark.parametrize("name", [*MATMUL, "deterministic", "library"])
def test_settings_of_torch_by_which_kernels_are_chosen(name, monkeypatch):
    """Stand-ins: without a GPU torch takes not all of them."""
    cuda = torch.backends.cuda
    values = {name: getattr(cuda.matmul, name) for name in MATMUL}
    before = one_set._switches()
    if name == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif name == "library":
        monkeypatch.setattr(cuda, "preferred_blas_library", lambda: "another")
    else:
        monkeypatch.setattr(cuda, "matmul", SimpleNamespace(**values | {name: MATMUL[name]}))
    assert one_set._switches() != before
    assert one_set._switches() == one_set._switches()
