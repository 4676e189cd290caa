"""Products of one frozen layer in 8 bits (`Fp8Linear`), and the rows that layers share."""

import pytest
import torch
from torch import nn

from lemo import ops
from lemo.models.projections import fp8
from lemo.models.projections.fp8 import Fp8Linear

# Nothing here runs on a GPU.
pytestmark = pytest.mark.cpu_only


def test_shared_rows_are_known_by_themselves():
    x, other = torch.randn(2, 5, 32).unbind()
    with fp8.shared_rows():
        first = fp8._quantised(x, x)
        assert fp8._quantised(x, x) is first
        assert torch.equal(fp8._quantised(other, other)[1], ops.fp8_rows(other)[1])
        fp8.share(x, first)
        assert fp8._quantised(x, x) is first
    assert fp8._quantised(x, x) is not first
    assert not fp8._shared
    with fp8.shared_rows():
        first = fp8._quantised(x, x)
        with fp8.shared_rows():
            assert fp8._quantised(x, x) is first
        assert fp8._quantised(x, x) is first
    assert not fp8._shared


def test_outliers_beyond_the_range_are_found():
    """Beside numbers 2^20 times as large, others fall below e4m3's range; not in the first rows."""
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    layer = Fp8Linear(linear, "it")
    x = torch.randn(5000, 64)
    x[:, 3] = 2.0**12
    assert layer.forward(x, x, lambda: linear.weight, None) is not None
    with torch.no_grad():
        linear.weight[:, 3] = 0
    x[300:, 3] = 2.0**20
    layer = Fp8Linear(linear, "it")
    assert layer.forward(x, x, lambda: linear.weight, None) is None
    assert "product errs by 0.9" in layer.reasons["forward"]


def test_rows_of_zeros_decide_nothing():
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    layer = Fp8Linear(linear, "it")
    zeros = torch.zeros(5, 64)
    assert not layer.forward(zeros, zeros, lambda: linear.weight, None).any()
    assert layer.forward(zeros[:0], zeros[:0], lambda: linear.weight, None) is None
    bad = zeros.clone()
    bad[2] = torch.nan
    y = layer.forward(bad, bad, lambda: linear.weight, None)
    assert y.isnan().all(1).tolist() == [False, False, True, False, False]
    assert not layer.reasons
    assert not layer._measured


def test_older_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(NotImplementedError, match=r"8.9 or higher .* got NVIDIA A100 of 8.0"):
        fp8.check_gpu(torch.device("cuda"))
    with pytest.raises(NotImplementedError, match=r"'fp8_fast' needs a GPU"):
        fp8.check_gpu(torch.device("cuda"), fast=True)
    fp8.check_gpu(torch.device("cpu"))
    for enough in ((8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=enough: is_)
        fp8.check_gpu(torch.device("cuda"))
