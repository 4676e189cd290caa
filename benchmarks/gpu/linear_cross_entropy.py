"""linear_cross_entropy on CUDA, beside its two bare products and Liger's fused op.

The head is frozen and the shape is Llama-3-8B's: what a LoRA step at 64K tokens pays. Ours and
Liger's are the loss and the gradient of the hidden states through autograd. The bare products take
the same operands: hidden states and weight, then gradients of real logits and the weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpu.harness import HIDDEN, TOKENS, median_ms, record
from lemo import ops, reference

VOCABULARY, SEGMENT, IGNORED = 128256, 2048, -100


def check() -> None:
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, None), (torch.float16, None)):
        for rows, hidden, vocabulary in ((300, 256, 32000), (65, 136, 50257), (33, 64, 151936)):
            inputs = make_inputs(rows, hidden, vocabulary, dtype, ignored=0.3)
            oracle = differentiate(of_reference, inputs, torch.float32)
            plain = differentiate(of_reference, inputs, dtype)
            result = differentiate(of_lemo(128), inputs, dtype)
            for name, value, rough, truth in zip(("loss", "dh", "dw"), result, plain, oracle):
                allowed = 2 * error(rough, truth) if bound is None else bound
                found = error(value, truth)
                what = f"linear_cross_entropy {dtype} {vocabulary} {name}"
                assert found <= allowed, f"{what}: {found:.1e}, allowed {allowed:.1e}"
    check_large_offsets()
    inputs = make_inputs(500, 512, 40001, torch.bfloat16, ignored=0.3)
    first, *others = (differentiate(of_lemo(128), inputs, torch.bfloat16) for _ in range(100))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first)), "repeats"


def check_large_offsets() -> None:
    """One segment of more than 2^31 logits."""
    rows, hidden = 20000, 64
    hidden_states, weight, labels = make_inputs(rows, hidden, VOCABULARY, torch.bfloat16)
    hidden_states.requires_grad_()
    loss = ops.linear_cross_entropy(hidden_states, weight, labels, chunk_rows=rows, divisor=1)
    (gradient,) = torch.autograd.grad(loss, hidden_states)
    total = torch.zeros((), device="cuda")
    for part in torch.arange(rows, device="cuda").split(1000):
        leaf = hidden_states[part].detach().float().requires_grad_()
        right, _ = reference.linear_cross_entropy(leaf, weight.float(), None, labels[part], IGNORED)
        (truth,) = torch.autograd.grad(right, leaf)
        assert error(gradient[part], truth) < 1e-2, f"rows from {part[0].item()}"
        total += right.detach()
    assert error(loss, total) < 1e-4


def bench(bandwidth: float) -> list[dict]:
    liger = load_liger()
    hidden, weight, labels = make_inputs(TOKENS, HIDDEN, VOCABULARY, torch.bfloat16)
    hidden.requires_grad_()

    def through(loss: Callable) -> Callable:
        return lambda: torch.autograd.grad(loss(hidden, weight, labels), hidden)

    ours, peer = through(of_lemo(None)), through(liger)
    memory = [extra_memory(function, hidden) for function in (ours, peer)]
    products, one_product = bare_products(hidden.detach(), weight, labels, SEGMENT)
    timed = [ours, products, one_product, peer]
    ours_ms, products_ms, one_ms, liger_ms = median_ms(*timed, repeats=7, calls=1)
    with torch.no_grad():
        (evaluation_ms,) = median_ms(
            lambda: of_lemo(None)(hidden, weight, labels), repeats=7, calls=1
        )
    del products, one_product, timed
    shape = {"rows": TOKENS, "vocabulary": VOCABULARY, "hidden": HIDDEN, "dtype": "bfloat16"}
    name = "linear_cross_entropy"
    results = [
        record(name, shape, ours_ms, f"two torch.mm, {SEGMENT} rows", products_ms),
        record(name, shape, ours_ms, "Liger", liger_ms),
        record(f"{name} evaluation", shape, evaluation_ms, f"torch.mm, {SEGMENT} rows", one_ms),
        compare(f"{name} memory", shape, *memory, "MiB above inputs and gradient"),
    ]
    # All logits at once, 16.8 GB, and the gradients that the second product takes.
    whole, _ = bare_products(hidden.detach(), weight, labels, TOKENS)
    ours_ms, whole_ms = median_ms(ours, whole, repeats=7, calls=1)
    results.append(record(name, shape, ours_ms, "two torch.mm, all rows", whole_ms))
    return results + accuracy(liger)


def accuracy(liger: Callable) -> list[dict]:
    """Relative errors of gradients against fp32, with a trainable head: ours beside Liger's."""
    rows, hidden, vocabulary = 4096, 1024, 32000
    inputs = make_inputs(rows, hidden, vocabulary, torch.bfloat16, ignored=0.3)
    truth = differentiate(of_reference, inputs, torch.float32)
    shape = {"rows": rows, "vocabulary": vocabulary, "hidden": hidden, "dtype": "bfloat16"}
    found = [differentiate(loss, inputs, torch.bfloat16) for loss in (of_lemo(SEGMENT // 4), liger)]
    return [
        compare(f"linear_cross_entropy {name}", shape, error(a, t), error(b, t), "relative error")
        for name, a, b, t in zip(("dhidden", "dweight"), *(r[1:] for r in (*found, truth)))
    ]


def bare_products(
    hidden: Tensor, weight: Tensor, labels: Tensor, segment: int
) -> tuple[Callable, Callable]:
    """(both products, the first one alone), `segment` rows at a time into memory that is there."""
    logits = torch.empty(segment, len(weight), device="cuda", dtype=hidden.dtype)
    gradient, dhidden = torch.empty_like(logits), torch.empty_like(hidden)
    for part in torch.arange(segment, device="cuda").split(SEGMENT):
        probabilities = (hidden[part] @ weight.T).float().softmax(-1)
        probabilities[torch.arange(len(part), device="cuda"), labels[part]] -= 1
        gradient[part] = probabilities.to(hidden.dtype)

    def first() -> None:
        for rows in hidden.split(segment):
            torch.mm(rows, weight.T, out=logits)

    def both() -> None:
        for rows, drows in zip(hidden.split(segment), dhidden.split(segment)):
            torch.mm(rows, weight.T, out=logits)
            torch.mm(gradient, weight, out=drows)

    return both, first


def extra_memory(function: Callable, hidden: Tensor) -> float:
    """MiB that one call takes at its peak beyond what was there and the gradient of `hidden`."""
    function()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    gradient = hidden.numel() * hidden.element_size()
    return (torch.cuda.max_memory_allocated() - before - gradient) / 2**20


def load_liger() -> Callable:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Function,
        )
    except ImportError as error:
        raise RuntimeError(
            "the peer of linear_cross_entropy is missing: pip install liger-kernel"
        ) from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return Function.apply(hidden, weight, labels)[0]

    return loss


def of_lemo(chunk_rows: int | None) -> Callable:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows)

    return loss


def of_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    total, count = reference.linear_cross_entropy(hidden, weight, None, labels, IGNORED)
    return total / count


def make_inputs(
    rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, ignored: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, labels); the logits are normally distributed."""
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    labels[torch.rand(rows, device="cuda") < ignored] = IGNORED
    hidden_states = torch.randn(rows, hidden, device="cuda", dtype=dtype)
    weight = torch.randn(vocabulary, hidden, device="cuda", dtype=dtype)
    return hidden_states, weight.mul_(hidden**-0.5), labels


def differentiate(loss: Callable, inputs: tuple, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(loss, dhidden, dweight), computed in `dtype`."""
    *floats, labels = inputs
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in floats]
    value = loss(*leaves, labels)
    return value.detach(), *torch.autograd.grad(value, leaves)


def error(value: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm()).item()


def compare(bench: str, shape: dict, ours: float, liger: float, unit: str) -> dict:
    """A figure that is not a time, beside Liger's."""
    return {
        "bench": bench,
        "shape": shape,
        "ours": float(f"{ours:.4g}"),
        "peer": "Liger",
        "peer_value": float(f"{liger:.4g}"),
        "ratio": round(ours / liger, 4),
        "unit": unit,
    }
