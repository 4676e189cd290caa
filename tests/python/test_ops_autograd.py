"""What holds for the derivatives of every op: once only, and nothing of the caller's is changed."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import rms_norm

import devices
from lemo import ops
from lemo.ops.segment_attention import SavedAttention
from lemo.ops.select_norm import select_norm_into
from lemo.packing.blocks import BlockLayout


def rows() -> torch.Tensor:
    return torch.tensor([0, 2, 3]).int()


def attend(x: torch.Tensor) -> torch.Tensor:
    heads, cuts = x.view(6, 1, 8), torch.tensor([0, 6]).int()
    return ops.segment_attention(heads, heads * 2, heads + 1, cuts)


def attend_known(x: torch.Tensor) -> torch.Tensor:
    heads, cuts = x.view(6, 1, 8), torch.tensor([0, 6]).int()
    attention = SavedAttention()
    for q in (heads.detach(), heads):
        out = attention(q, q, q, cuts, cuts, None, None, 1.0, 0, 0)
    return out


def predict(x: torch.Tensor) -> torch.Tensor:
    maps = x[:2], torch.ones(3, 2).to(x), torch.ones(1, 3).to(x)
    return ops.predictor(torch.ones_like(x), maps, None, BlockLayout.from_seqlens([6], 2))


OPS = {
    "segment_attention": attend,
    "SavedAttention": attend_known,
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x, torch.ones(7, 8).to(x), torch.zeros(6).long()
    ),
    "select_norm": lambda x: ops.select_norm(x, torch.ones(8), rows=rows()),
    "residual_select_norm": lambda x: ops.residual_select_norm(x * 1, torch.ones(8))[1],
    "select_norm_into": lambda x: select_norm_into(
        x, torch.ones(8), None, None, torch.zeros_like(x), 1e-6, "rms"
    ),
    "residual_scatter_": lambda x: ops.residual_scatter_(x * 1, x[:3] * 2, rows()),
    "residual_gather": lambda x: ops.residual_gather(x * 1, rows())[1],
    "swiglu": lambda x: ops.swiglu(x, x * 2),
    "predictor": predict,
}


def leaf() -> torch.Tensor:
    return torch.randn(6, 8, dtype=devices.working_dtype(), requires_grad=True)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_refused(name, power):
    x = leaf()
    loss = OPS[name](x).pow(power).sum()
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("name", [*OPS, "rope"])
def test_tangents_are_refused(name):
    op = OPS.get(name, lambda x: ops.rope(x.view(6, 1, 8), torch.ones(6, 8), torch.ones(6, 8)))
    x = leaf().detach()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward.mode"):
        op(forward_ad.make_dual(x, torch.ones_like(x)))


def gathered(x, index):
    return ops.residual_gather(x, index)


def normalised(x, index):
    return ops.residual_select_norm(x, torch.ones(8), rows=index)


@pytest.mark.parametrize(
    ("op", "expected"),
    [(gathered, lambda x: x), (normalised, lambda x: rms_norm(x, (8,), eps=1e-6))],
)
def test_a_gradient_that_others_read_stays_as_it_is(op, expected):
    """Autograd hands one and the same tensor to both terms of a sum, and to a node the caller's."""
    a, b = torch.randn(2, 6, 8, requires_grad=True).unbind()
    index, dy = rows(), torch.randn(6, 8)

    def gradients(function):
        z, h = b * 3, a * 2
        x, x_rows = function(h)
        through_sum = torch.autograd.grad(
            ((x + z) ** 2).sum() + x_rows.pow(3).sum(), (a, b), retain_graph=True
        )
        # Of views of one tensor, and of the op's own two results.
        x, x_rows = function(a * 2)
        views = torch.autograd.grad(((x.view(-1) + (b * 3).view(-1)) ** 2).sum(), (a, b))
        return *through_sum, *views

    plain = gradients(lambda h: (h, expected(h[index.long()])))
    for one, two in zip(gradients(lambda h: op(h, index)), plain):
        torch.testing.assert_close(one, two)

    x, x_rows = op(a * 1, index)
    before = dy.clone()
    torch.autograd.grad((x, x_rows), a, (dy, torch.ones_like(x_rows)))
    assert torch.equal(dy, before)


@pytest.mark.parametrize("op", [gathered, normalised])
def test_one_gradient_for_both_results(op):
    a = torch.randn(6, 8, requires_grad=True)
    x, x_rows = op(a * 1, None)
    (both,) = torch.autograd.grad(((x + x_rows) ** 2).sum(), a)
    x, x_rows = op(a * 1, None)
    (apart,) = torch.autograd.grad((x**2 + 2 * x * x_rows + x_rows**2).sum(), a)
    torch.testing.assert_close(both, apart)
