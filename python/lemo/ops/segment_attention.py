"""segment_attention: causal attention among the packed rows of each sequence."""

import torch
from torch import Tensor

from lemo.ops.autograd import first_order_only
from lemo.ops.call import call

_ops = torch.ops.lemo


@torch.library.register_fake("lemo::segment_attention")
def _(q, k, v, *_, **__):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty((*q.shape[:2], v.shape[2])), lse


@torch.library.register_fake("lemo::segment_attention_backward")
def _(
    dout,
    q,
    k,
    v,
    out,
    lse,
    cu_q,
    cu_k,
    q_positions,
    k_positions,
    scale,
    window,
    group_size,
    softcap=0.0,
    sinks=None,
    deterministic=False,
    kernel_name="auto",
):
    heads = 0 if sinks is None else q.shape[1]
    dsinks = q.new_empty(heads, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx, inputs, output):
    (
        *qkv,
        cu_q,
        cu_k,
        q_positions,
        k_positions,
        scale,
        window,
        group_size,
        softcap,
        sinks,
        kernel,
    ) = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*qkv, out, lse, cu_q, cu_k, q_positions, k_positions, sinks)
    ctx.settings = scale, window, group_size, softcap
    ctx.kernel = kernel


def _gradients(ctx, dout, kernel):
    """(dq, dk, dv, dsinks or None) of a node that saved the op's tensors, and its settings."""
    *saved, sinks = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (dout, *saved, *ctx.settings, sinks, deterministic, kernel)
    *grads, dsinks = call(_ops.segment_attention_backward, *arguments)
    return *grads, None if sinks is None else dsinks


@first_order_only("segment_attention")
def _backward(ctx, dout, dlse):
    *grads, dsinks = _gradients(ctx, dout, ctx.kernel)
    return *grads, *[None] * 8, dsinks, None


torch.library.register_autograd("lemo::segment_attention", _backward, setup_context=_setup_context)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    group_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Causal attention of packed rows, each sequence by itself (LeMo, section 5.1).

    Query i sees key j of its sequence iff `pos_j <= pos_i`, and `pos_i - pos_j < window` where
    there is a window, and, with shifted groups (LongLoRA's S2-Attn), both lie in the same group:
    `pos // group_size` for the first half of the heads, `(pos + group_size // 2) // group_size` for
    the others. Queries and keys may be different kept sets of the sequences. A query that sees no
    key gives 0. The result does not depend on the number of threads. On a GPU the gradient of q is
    bit-equal from run to run only under `torch.use_deterministic_algorithms(True)`; everything else
    always is.

    The scores `s = scale * (q . k)` become `softcap * tanh(s / softcap)` where there is a softcap
    (Gemma 2), before the softmax. A sink is a further score of its head that every query sees and
    that has no value (gpt-oss): it takes part in the sum of the exponentials only.

    Beyond its results the op needs, on the CPU, a few tiles for each thread; the backward pass also
    dq in fp32. On a GPU: bf16 or fp16, and head sizes D and Dv that are multiples of 8 up to 256.

    Args:
        q: [Rq, Hq, D] float.
        k: [Rk, Hk, D] of q's dtype; Hq is a multiple of Hk.
        v: [Rk, Hk, Dv] of q's dtype.
        cu_q: [N+1] int32, first query row of each sequence; the last entry is Rq.
        cu_k: [N+1] int32, the same for the keys; None: `cu_q`.
        q_positions: [Rq] int32, position of each row in its sequence, strictly ascending;
            None: 0, 1, 2, ...
        k_positions: [Rk] int32, given if and only if `q_positions` is.
        scale: factor of q . k; None: 1 / sqrt(D).
        window: keys a query sees at most, itself included, counted in positions; 0: all.
        group_size: positions of a shifted group; 0: no groups.
        softcap: bound of the scores; 0: none.
        sinks: [Hq] float32 or of q's dtype, a score of each head, not scaled; None: none.
        kernel: "auto", or on a GPU the name of one ("hopper", "portable",
            "portable-small"), for tests.

    Returns:
        [Rq, Hq, Dv] of q's dtype. Differentiable once in q, k, v and sinks.

    Raises:
        ValueError, TypeError: a shape, dtype, device, cut or position does not fit.
        NotImplementedError: the device has no kernel for this dtype or head size.
    """
    if scale is None:
        scale = max(q.shape[-1], 1) ** -0.5
    cu_k = cu_q if cu_k is None else cu_k
    arguments = (q, k, v, cu_q, cu_k, q_positions, k_positions, scale, window, group_size)
    return call(_ops.segment_attention, *arguments, softcap, _to_fp32(sinks, q), kernel)[0]


def _to_fp32(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """The op takes fp32; autograd rounds the gradient back to the dtype of the model."""
    return sinks.float() if sinks is not None and sinks.dtype == q.dtype else sinks


def attention_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    scale: float,
    window: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `segment_attention`, outside of autograd.

    Args:
        dout: [Rq, Hq, Dv], the gradient of its result.
        q, k, v: as it got them, and so the rest.
        out, lse: its result, and the logarithms [Hq, Rq] fp32; see `SavedAttention`.
    """
    arguments = (cu_q, cu_k, q_positions, k_positions, scale, window, group_size, 0.0, None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    *gradients, _ = call(
        _ops.segment_attention_backward,
        *(dout, q, k, v, out, lse),
        *(*arguments, deterministic, "auto"),
    )
    dq, dk, dv = gradients
    return dq, dk, dv


class SavedAttention:
    """`segment_attention` that keeps its result, or that is given it, so that it runs only once.

    Without a result a call computes and keeps it; it must not need a gradient. With one a call
    returns `out` as a differentiable function of q, k, v and sinks, of which it is the result.

    Attributes:
        result: (out [Rq, Hq, Dv], lse [Hq, Rq] fp32), or empty before the first call.
    """

    def __init__(self, *result: Tensor) -> None:
        self.result = result

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        q_positions: Tensor | None,
        k_positions: Tensor | None,
        scale: float,
        window: int,
        group_size: int,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `segment_attention`; shapes and errors are the same."""
        sinks = _to_fp32(sinks, q)
        arguments = (cu_q, cu_k, q_positions, k_positions, scale, window, group_size, softcap)
        if self.result:
            return _Saved.apply(q, k, v, sinks, *self.result, *arguments)
        self.result = call(_ops.segment_attention, q, k, v, *arguments, sinks)
        return self.result[0]


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, out, lse, cu_q, cu_k, q_positions, k_positions, *settings):
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, q_positions, k_positions, sinks)
        ctx.settings = settings
        return out.detach()

    @staticmethod
    @first_order_only("segment_attention")
    def backward(ctx, dout):
        return *_gradients(ctx, dout, "auto"), *[None] * 10
