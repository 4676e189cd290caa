"""linear_cross_entropy beside its two bare products and Liger's fused operator.

The head is frozen and the shape is Llama-3-8B's: what a LoRA step at 64K tokens pays. Ours and
Liger's are the loss and the gradient of the hidden states through autograd. The bare products take
the same operands: hidden states and weight, then gradients of real logits and the weight. On the
CPU, where Liger has no kernel, PyTorch's own functions stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.records import figure
from gpu.bench import HIDDEN, TOKENS, Bench, error
from lemo import ops

NAME = "linear_cross_entropy"
VOCABULARY, CHUNK, IGNORED = 128256, 2048, -100
# Where accuracy is measured: rows, hidden size, vocabulary.
SMALL = (4096, 1024, 32000)
OFTEN = {"repeats": 7, "calls": 1}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_lemo(chunk_rows: int | None) -> Loss:
    return lambda hidden, weight, labels: ops.linear_cross_entropy(
        hidden, weight, labels, chunk_rows=chunk_rows
    )


def of_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED)


def load_liger(b: Bench) -> tuple[str, Loss]:
    """The name and the loss of the peer."""
    if b.device != "cuda":
        return "torch", of_torch
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Function,
        )
    except ImportError as failure:
        raise RuntimeError(f"the peer of {NAME} is missing: pip install liger-kernel") from failure
    return "Liger", lambda hidden, weight, labels: Function.apply(hidden, weight, labels)[0]


def make_inputs(b: Bench, rows: int, hidden: int, vocabulary: int, ignored: float = 0.0):
    """(hidden, weight, labels); the logits are normally distributed."""
    labels = torch.randint(vocabulary, (rows,), device=b.device)
    labels[torch.rand(rows, device=b.device) < ignored] = IGNORED
    return b.randn(rows, hidden), b.randn(vocabulary, hidden).mul_(hidden**-0.5), labels


def bare_products(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(both products, the first one alone), `chunk` rows at a time into memory that is there."""
    logits = torch.empty(chunk, len(weight), device=hidden.device, dtype=hidden.dtype)
    gradient, dhidden = torch.empty_like(logits), torch.empty_like(hidden)
    for part in torch.arange(chunk, device=hidden.device).split(CHUNK):
        probabilities = (hidden[part] @ weight.T).float().softmax(-1)
        probabilities[torch.arange(len(part), device=hidden.device), labels[part]] -= 1
        gradient[part] = probabilities.to(hidden.dtype)

    def first() -> None:
        for rows in hidden.split(chunk):
            torch.mm(rows, weight.T, out=logits)

    def both() -> None:
        for rows, drows in zip(hidden.split(chunk), dhidden.split(chunk)):
            torch.mm(rows, weight.T, out=logits)
            torch.mm(gradient, weight, out=drows)

    return both, first


def extra_memory(function: Callable[[], object], hidden: Tensor) -> float:
    """MiB that one call takes at its peak beyond what was there and the gradient of `hidden`."""
    function()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    gradient = hidden.numel() * hidden.element_size()
    return (torch.cuda.max_memory_allocated() - before - gradient) / 2**20


def rows(b: Bench):
    name, peer = load_liger(b)
    tokens, features, vocabulary = b.size(TOKENS), b.size(HIDDEN), b.size(VOCABULARY)
    hidden, weight, labels = make_inputs(b, tokens, features, vocabulary)
    hidden.requires_grad_()
    shape = {"rows": tokens, "vocabulary": vocabulary, "hidden": features, "dtype": "bfloat16"}

    def through(loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(hidden, weight, labels), hidden)

    ours, theirs = through(of_lemo(None)), through(peer)
    b.agree(NAME, ours(), theirs())
    if b.device == "cuda":
        memory = [extra_memory(function, hidden) for function in (ours, theirs)]
        yield compare(f"{NAME} memory", shape, "MiB above inputs and gradient", name, *memory)
    chunk = min(CHUNK, tokens)
    both, first = bare_products(hidden.detach(), weight, labels, chunk)
    peers = {f"two torch.mm, {chunk} rows": both, name: theirs}
    yield from b.compare(NAME, shape, ours, peers, **OFTEN)
    with torch.no_grad():
        evaluation = {f"torch.mm, {chunk} rows": first}
        forward = of_lemo(None)
        yield from b.compare(
            f"{NAME} evaluation",
            shape,
            lambda: forward(hidden, weight, labels),
            evaluation,
            **OFTEN,
        )
    del both, first, peers, evaluation
    # All logits at once, 16.8 GB, and the gradients that the second product takes.
    whole, _ = bare_products(hidden.detach(), weight, labels, tokens)
    yield from b.compare(NAME, shape, ours, {"two torch.mm, all rows": whole}, **OFTEN)
    yield from accuracy(b, name, peer)


def accuracy(b: Bench, name: str, peer: Loss):
    """Relative errors of gradients against fp32, with a trainable head: ours beside the peer's."""
    count, features, vocabulary = map(b.size, SMALL)
    inputs = make_inputs(b, count, features, vocabulary, ignored=0.3)

    def gradients(loss: Loss, dtype: torch.dtype) -> tuple[Tensor, ...]:
        *floats, labels = inputs
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in floats]
        return torch.autograd.grad(loss(*leaves, labels), leaves)

    truth = gradients(of_torch, torch.float32)
    ours, theirs = (gradients(loss, torch.bfloat16) for loss in (of_lemo(CHUNK // 4), peer))
    shape = {"rows": count, "vocabulary": vocabulary, "hidden": features, "dtype": "bfloat16"}
    for what, one, other, right in zip(("dhidden", "dweight"), ours, theirs, truth):
        errors = error(one, right), error(other, right)
        yield compare(f"{NAME} {what}", shape, "relative error", name, *errors)


def compare(bench: str, shape: dict, unit: str, peer: str, ours: float, theirs: float) -> dict:
    """A record of four significant digits."""
    rounded = [float(f"{value:.4g}") for value in (ours, theirs)]
    return figure(bench, shape, unit, rounded[0], peer, rounded[1], digits=12)
