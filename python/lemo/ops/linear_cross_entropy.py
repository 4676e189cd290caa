"""linear_cross_entropy: the loss of a vocabulary projection, a chunk of rows at a time."""

import math

import torch
from torch import Tensor

from lemo import _C
from lemo.ops.autograd import first_order_only
from lemo.ops.call import call

_ops = torch.ops.lemo

CHUNK_BYTES = 256 * 2**20
"""What the fp32 logits of a chunk take at most on the CPU, unless `chunk_rows` is given."""

_CUDA_CHUNK_BYTES = 768 * 2**20


@torch.library.register_fake("lemo::linear_cross_entropy")
def _(hidden, weight, bias, labels, ignore_index, chunk_rows, hidden_grad, weight_grad):
    has_dbias = weight_grad and bias is not None
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape if hidden_grad else 0),
        weight.new_empty(weight.shape if weight_grad else 0),
        bias.new_empty(bias.shape) if has_dbias else weight.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    _, _, bias, *_, ctx.hidden_grad, ctx.weight_grad = inputs
    ctx.has_bias = bias is not None
    _, count, *grads = output
    ctx.mark_non_differentiable(count, *grads)
    ctx.save_for_backward(*grads)


@first_order_only("linear_cross_entropy")
def _backward(ctx, dloss, *_):
    # Scaled out of place, so that a second backward through a retained graph is right as well. A
    # scalar tensor of fp32 does not widen the gradients, nor is it rounded to their dtype.
    dhidden, dweight, dbias = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    for flag, given, needed, who in (
        ("hidden_grad", ctx.hidden_grad, needs_hidden, "'hidden'"),
        ("weight_grad", ctx.weight_grad, needs_weight or needs_bias, "'weight' or 'bias'"),
    ):
        if needed and not given:
            raise ValueError(
                f"linear_cross_entropy: argument '{flag}': expected True, as {who} requires a "
                "gradient, got False"
            )
    return (
        dhidden * dloss if needs_hidden else None,
        dweight * dloss if needs_weight else None,
        dbias * dloss if needs_bias and ctx.has_bias else None,
        *[None] * 5,
    )


torch.library.register_autograd(
    "lemo::linear_cross_entropy", _backward, setup_context=_setup_context
)


def _plan_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows of a chunk where the caller names none."""
    rows, vocabulary = hidden.shape[0], max(weight.shape[0], 1)
    if hidden.device.type == "cpu":
        return _C.plan_loss_chunk(rows, vocabulary, CHUNK_BYTES)
    # Logits have the dtype of hidden; the planner counts four bytes each.
    budget = _CUDA_CHUNK_BYTES * 4 // hidden.dtype.itemsize
    chunk = _C.plan_loss_chunk(rows, vocabulary, budget)
    # Tiles of the product for dhidden, 128 rows high, then fill the SMs in (nearly) whole waves,
    # which just a few rows more would not.
    return chunk if chunk >= rows else 1 << (chunk.bit_length() - 1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """Cross entropy of `hidden @ weight.T + bias`; the logits never exist all at once.

    The loss and its gradients are computed in the forward pass from the logits of `chunk_rows` rows
    at a time (LeMo, section 5.3: segmented loss). Beyond inputs and gradients, little other memory
    is needed. On the CPU logits are fp32 and rows with ignored labels cost nothing. On a GPU logits
    have the dtype of `hidden` (as PyTorch's own would), sums are fp32, and rows with ignored labels
    cost as much as others, since nothing is read back: pick the rows first where many are ignored.
    Gradients of weight and bias are summed over the chunks in fp32 and rounded once; on a GPU that
    takes V * H * 4 bytes while it runs, unless weight is fp32 or one chunk holds all rows.

    Args:
        hidden: [R, H] float.
        weight: [V, H] float, as of `nn.Linear`; on the CPU it may differ from `hidden` in dtype.
        labels: [R] int64, in [0, V) or `ignore_index`. Nothing is shifted here. Another label
            raises on the CPU; on a GPU it makes the loss NaN.
        bias: [V] float, may differ from `hidden` in dtype.
        ignore_index: label of rows that do not count.
        chunk_rows: rows of a chunk; None: as many as fit their logits into 256 MiB on the CPU
            and 768 MiB on a GPU.
        divisor: what the sum over the labels is divided by, a positive number or a scalar tensor
            (Transformers' `num_items_in_batch`; on a GPU its value is not checked); None: the
            number of labels that count.

    Returns:
        [] fp32. Differentiable once in hidden, weight and bias. Where no label counts the loss is
        0 and so are the gradients (Transformers gives NaN): a batch that is masked as a whole must
        not destroy a run.

    Raises:
        ValueError, TypeError: a shape, dtype, device, label or the divisor does not fit.
        NotImplementedError: on a GPU, `weight` has another dtype than `hidden`, or there is no
            cuBLAS.
    """
    if chunk_rows is None:
        chunk_rows = _plan_chunk(hidden, weight)
    if not isinstance(divisor, Tensor) and divisor is not None and not 0 < divisor < math.inf:
        raise ValueError(
            "linear_cross_entropy: argument 'divisor': expected a positive number, a tensor or "
            f"None, got {divisor}"
        )
    if isinstance(divisor, Tensor) and divisor.numel() != 1:
        raise ValueError(
            "linear_cross_entropy: argument 'divisor': expected one number, got shape "
            f"{list(divisor.shape)}"
        )
    if isinstance(divisor, Tensor) and divisor.is_cpu and not 0 <= float(divisor) < math.inf:
        raise ValueError(
            "linear_cross_entropy: argument 'divisor': expected a positive number, or 0 where no "
            f"label counts, got {float(divisor)}"
        )
    grad = torch.is_grad_enabled()
    hidden_grad = grad and hidden.requires_grad
    weight_grad = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    arguments = (hidden, weight, bias, labels, ignore_index, chunk_rows)
    total, count, *_ = call(_ops.linear_cross_entropy, *arguments, hidden_grad, weight_grad)
    if divisor is None:
        divisor = count
    if isinstance(divisor, Tensor):
        # Where nothing counts this is 0 / tiny = 0.
        divisor = divisor.to(total).reshape(()).clamp(min=torch.finfo(total.dtype).tiny)
    return total / divisor
