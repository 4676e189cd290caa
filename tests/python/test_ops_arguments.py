"""Hostile arguments of the ops: refused with one clear error, before memory is touched."""

import pytest
import torch

from lemo import _C, ops
from lemo.ops.call import call
from lemo.packing.blocks import BlockLayout

_ops = torch.ops.lemo
LARGEST = 2**63 - 1


def emptied(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose memory was given back, as those of offloaded models are."""
    tensor = torch.ones(shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def overlapping(names: str):
    """Arguments of an op that changes one in place, with another one in the same memory."""
    x = torch.randn(8, 4)
    return {
        "residual_scatter x y": (_ops.residual_scatter, x, x, None),
        "residual_scatter x part": (_ops.residual_scatter, x[:4], x[2:6], None),
        "residual_scatter x rows": (
            _ops.residual_scatter,
            x.fill_(0)[:1],
            torch.randn(1, 4),
            x.view(torch.int32)[0, :1],
        ),
        "swiglu_backward gate up": (_ops.swiglu_backward, torch.randn(4, 4), x[:4], x[1:5]),
        "swiglu_backward gate dout": (_ops.swiglu_backward, x[:4], x[3:7], torch.randn(4, 4)),
        "swiglu_backward up dout": (_ops.swiglu_backward, x[:4], torch.randn(4, 4), x[:4]),
        "select_norm_backward dx dy": (
            _ops.select_norm_backward,
            *(x[:4], torch.randn(4, 4), None, torch.ones(4)),
            *(torch.empty(0), torch.ones(4), "rms", x[:4], False),
        ),
        "select_norm_backward dx x_rows": (
            _ops.select_norm_backward,
            *(torch.randn(4, 4), x[1:5], None, torch.ones(4)),
            *(torch.empty(0), torch.ones(4), "rms", x[:4], False),
        ),
    }[names]


@pytest.mark.parametrize(
    "names",
    [
        "residual_scatter x y",
        "residual_scatter x part",
        "residual_scatter x rows",
        "swiglu_backward gate up",
        "swiglu_backward gate dout",
        "swiglu_backward up dout",
        "select_norm_backward dx dy",
        "select_norm_backward dx x_rows",
    ],
)
def test_what_is_changed_in_place_shares_no_memory(names):
    op, *arguments = overlapping(names)
    before = [a.clone() for a in arguments if isinstance(a, torch.Tensor)]
    with pytest.raises(ValueError, match="expected memory of its own, as it is changed in place"):
        call(op, *arguments)
    after = [a for a in arguments if isinstance(a, torch.Tensor)]
    assert all(map(torch.equal, before, after))


def test_tensors_that_overlap_themselves_are_not_changed():
    with pytest.raises(ValueError, match="'x': expected a contiguous tensor"):
        ops.residual_scatter_(torch.zeros(1, 4).expand(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="'up': expected a contiguous tensor"):
        call(_ops.swiglu_backward, torch.ones(3, 4), torch.ones(3, 4), torch.ones(4).expand(3, 4))


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (lambda: ops.residual_scatter_(emptied(3, 4), torch.ones(3, 4)), "x"),
        (lambda: ops.swiglu(torch.ones(3, 4), emptied(3, 4)), "up"),
        (lambda: ops.select_norm(emptied(3, 4), torch.ones(4)), "x"),
        (
            lambda: call(
                _ops.token_select,
                *(torch.ones(1), emptied(2, dtype=torch.int32), torch.tensor([0, 1]).int()),
                *("ratio", 0.5, 0, 0, -1, -1),
            ),
            "block_starts",
        ),
    ],
    ids=["scatter", "swiglu", "norm", "select"],
)
@pytest.mark.cpu_only
def test_tensors_without_memory(function, argument):
    with pytest.raises(ValueError, match=f"'{argument}': expected a tensor with memory"):
        function()


@pytest.mark.parametrize("block_size", [2**31, 2**62, LARGEST])
def test_a_block_size_beyond_int32(block_size):
    expected = f"'block_size': expected from 1 to 2147483647, got {block_size}"
    with pytest.raises(ValueError, match=expected):
        BlockLayout.from_seqlens([5], block_size)
    with pytest.raises(ValueError, match=expected):
        _C.plan_selection([5], block_size, 0.5, 0, 0)


def test_the_largest_numbers_mean_what_they_say():
    q = torch.randn(9, 2, 8).to(torch.bfloat16)
    cuts = torch.tensor([0, 4, 9]).int()
    assert torch.equal(
        ops.segment_attention(q, q, q, cuts, window=LARGEST, group_size=LARGEST),
        ops.segment_attention(q, q, q, cuts, group_size=2**40),
    )
    assert _C.plan_loss_chunk(1000, 2**62 + 1, 2**30) == 1
    layout = BlockLayout.from_seqlens([9], 2**31 - 1)
    kept = ops.token_select(torch.rand(1), layout, "ratio", 0.5, LARGEST, LARGEST)
    assert kept.rows.tolist() == list(range(9))


def test_sizes_of_results_that_no_layout_has():
    layout = BlockLayout.from_seqlens([9], 3)
    arguments = torch.rand(3), layout.block_starts, layout.cu_blocks, "ratio", 0.5, 0, 0
    for sizes, name in (((4, 9), "num_kept_blocks"), ((2, LARGEST), "num_kept_rows")):
        with pytest.raises(ValueError, match=f"'{name}': expected at most"):
            call(_ops.token_select, *arguments, *sizes)


@pytest.mark.cpu_only  # the kernels of a GPU have head sizes and dtypes of their own
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: ops.select_norm(torch.ones(2, 4), torch.ones(4), eps=1e300), "'eps': expected"),
        (lambda: _scores(scale=1e300), "'scale': expected a finite number above 0"),
        (lambda: _scores(scale=1e-300), "'scale': expected a finite number above 0"),
        (lambda: _scores(head_size=0), "'q': expected a head size of at least 1"),
        (lambda: _attention(head_size=0), "'q': expected a head size of at least 1"),
        (lambda: _loss(hidden_size=0), "'hidden': expected a hidden size of at least 1"),
        (lambda: _loss(divisor=float("inf")), "'divisor': expected a positive number"),
        (lambda: _loss(divisor=torch.tensor(-3.0)), "'divisor': expected .*, got -3.0"),
        (lambda: _loss(divisor=torch.tensor(float("nan"))), "'divisor': expected .*, got nan"),
    ],
)
def test_numbers_that_give_nonsense(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def _scores(scale=1.0, head_size=8):
    x = torch.ones(6, 1, head_size)
    return ops.block_scores(x, x, BlockLayout.from_seqlens([6], 2), scale)


def _attention(head_size):
    x = torch.ones(6, 1, head_size)
    return ops.segment_attention(x, x, x, torch.tensor([0, 6]).int())


def _loss(hidden_size=4, divisor=None):
    hidden, weight = torch.ones(3, hidden_size), torch.ones(5, hidden_size)
    return ops.linear_cross_entropy(hidden, weight, torch.zeros(3).long(), divisor=divisor)
