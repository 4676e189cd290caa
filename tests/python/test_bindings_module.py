"""lemo._C in Python's own terms: what it takes, what it gives, and how it says no."""

import pytest

from lemo import _C

pytestmark = pytest.mark.cpu_only

OPTION = (10, 1, 2, 0, 0.5, 0)


def test_results_are_pythons_own():
    assert _C.plan_blocks((5, 9), block_size=4) == ([0, 4, 5, 9, 13, 14], [0, 2, 5])
    assert _C.plan_selection([5], 4, 1, 0, 0) == (2, 5)
    plan = _C.plan_memory([[OPTION, (5, 1, 9, 0, 0.7, 0)]] * 2, 25, 0, 1, states=9)
    assert plan == ([0, 0], 1.0, 23, 0)
    assert _C.least_memory(layers=[[OPTION]], host=0, fixed=3) == 15
    assert _C.build_info().keys() == {"version", "cuda", "cuda_architectures", "compiler"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.plan_blocks([1.5], 4), TypeError, "seqlens: .*, block_size: "),
        (lambda: _C.plan_blocks(5, 4), TypeError, "seqlens: "),
        (lambda: _C.plan_blocks([5], 2**70), TypeError, "block_size: "),
        (lambda: _C.plan_blocks([5], 4, 3), TypeError, "incompatible function arguments"),
        (lambda: _C.plan_loss_chunk(1, 2), TypeError, "budget_bytes: "),
        (lambda: _C.plan_memory([[OPTION[:2]]], 1, 1, 1), TypeError, "layers: "),
        (lambda: _C.plan_memory([[OPTION]], 1, 1, 1, grain=2), TypeError, "grain"),
        (lambda: _C.plan_blocks([-1], 4), ValueError, "'seqlens': expected lengths of at least 0"),
    ],
)
def test_what_does_not_fit_is_an_error_of_python(call, error, message):
    with pytest.raises(error, match=message):
        call()
