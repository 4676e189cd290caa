"""Inputs and oracle of the tests of segment_attention."""

import itertools

import torch

from devices import on_gpu, working_dtype
from lemo import ops, reference
from tolerances import assert_close_fp32, assert_close_low_precision

NAMES = ("out", "dq", "dk", "dv", "dsinks")


def attention_kernels() -> tuple[str, ...]:
    """The names of the CUDA kernels that this GPU runs."""
    hopper = ("hopper",) if torch.cuda.get_device_capability() == (9, 0) else ()
    return (*hopper, "portable", "portable-small")


KERNELS = attention_kernels() if on_gpu() else ("auto",)


def cuts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def draw_positions(lengths: list[int], span: int) -> torch.Tensor:
    """Ascending positions below `span`, drawn anew for each sequence."""
    drawn = [torch.randperm(span)[:length].sort().values for length in lengths]
    return torch.cat([torch.zeros(0, dtype=torch.long), *drawn]).int()


def make_inputs(
    q_lengths, k_lengths=None, heads=(6, 2), size=8, span=None, dtype=None, value_size=None
):
    """(q, k, v, cu_q, cu_k, q_positions, k_positions); positions only with a span."""
    dtype = working_dtype() if dtype is None else dtype
    k_lengths = q_lengths if k_lengths is None else k_lengths
    value_size = size if value_size is None else value_size
    q = torch.randn(sum(q_lengths), heads[0], size, dtype=dtype)
    k = torch.randn(sum(k_lengths), heads[1], size, dtype=dtype)
    v = torch.randn(sum(k_lengths), heads[1], value_size, dtype=dtype)
    positions = (None, None)
    if span is not None:
        positions = (draw_positions(q_lengths, span), draw_positions(k_lengths, span))
    return q, k, v, cuts(q_lengths), cuts(k_lengths), *positions


def make_dout(inputs):
    """A random gradient of the output."""
    q, _, v, *_ = inputs
    return torch.randn(*q.shape[:2], v.shape[2], dtype=q.dtype)


def differentiate(attention, inputs, dtype, dout, sinks=None):
    """(out, dq, dk, dv) of `attention(q, k, v, ...)` computed from q, k, v in `dtype`.

    With sinks, which are float32 or wider, also dsinks.
    """
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs[:3]]
    extra = {}
    if sinks is not None:
        wide = torch.promote_types(dtype, torch.float32)
        leaves.append(sinks.detach().to(wide).requires_grad_())
        extra = {"sinks": leaves[3]}
    out = attention(*leaves[:3], *inputs[3:], **extra)
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def oracle(window=0, group_size=0, scale=None, softcap=0.0):
    def attention(q, *rest, sinks=None):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        settings = (factor, window, group_size, softcap, sinks)
        return reference.segment_attention(q, *rest, *settings)[0]

    return attention


def check_against_oracle(inputs, kernel="auto", sinks=None, **settings):
    """Forward and backward; in low precision the error is at most twice plain torch's."""
    dtype = inputs[0].dtype
    dout = make_dout(inputs)

    def attention(*args, **kwargs):
        return ops.segment_attention(*args, **kwargs, **settings, kernel=kernel)

    results = differentiate(attention, inputs, dtype, dout, sinks)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    expected = differentiate(oracle(**settings), inputs, wide, dout, sinks)
    plain = differentiate(oracle(**settings), inputs, dtype, dout, sinks)
    for name, result, rough, right in zip(NAMES, results, plain, expected):
        assert result.dtype == (torch.float32 if name == "dsinks" else dtype)
        # Sinks are as a model has them: their gradient is rounded to its dtype.
        check_close(result.to(dtype), rough, right, name)


def check_close(result, rough, right, name="result"):
    if result.dtype == torch.float32:
        assert_close_fp32(result, right, name)
    else:
        assert_close_low_precision(result, rough, right, name)
