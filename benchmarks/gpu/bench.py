"""How an operator is measured beside others on one device, and what its records look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from common.records import figure
from common.timing import Times, take_turns

__all__ = ["BLOCK", "HEADS", "HEAD_SIZE", "HIDDEN", "KV_HEADS", "TOKENS", "Bench", "error"]

# Llama-3-8B at 64K tokens.
TOKENS, HIDDEN, BLOCK = 65536, 4096, 64
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128

Functions = Mapping[str, Callable[[], Any]]


def error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@dataclass(frozen=True)
class Bench:
    """A device, and what the sizes are divided by: above 1 everything runs, and no time counts."""

    device: str = "cuda"
    shrink: int = 1

    def size(self, full: int) -> int:
        return max(full // self.shrink, 4 * BLOCK)

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        """Normally distributed, bf16."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16, requires_grad=grad)

    def half_of_the_blocks(self, tokens: int) -> Tensor:
        """Rows of a random half of the blocks, ascending, int32."""
        blocks = tokens // BLOCK
        kept = torch.randperm(blocks, device=self.device)[: blocks // 2].sort().values
        return (kept[:, None] * BLOCK + torch.arange(BLOCK, device=self.device)).flatten().int()

    @cached_property
    def copied_bytes(self) -> float:
        """Bytes read and written in a second by a copy of 2 GiB on the device."""
        source = torch.randn(self.size(2**29), device=self.device)
        target = torch.empty_like(source)
        (copy,) = self.times(lambda: target.copy_(source))
        return 2 * source.numel() * source.element_size() / copy.median * 1e3

    def times(
        self, *functions: Callable[[], Any], repeats: int = 20, calls: int = 10
    ) -> list[Times]:
        """Milliseconds of each, taking turns."""
        if self.shrink > 1:
            repeats = calls = 1
        return take_turns(functions, self.device, repeats, calls)

    def agree(self, name: str, ours: Any, peer: Any, bound: float = 2e-2) -> None:
        """AssertionError where two results, tensors or nested tuples of them, are not the same.

        The bound on the relative error is for bf16 peers that round at other places; the suite with
        `--device cuda` is what compares the operators with the oracle.
        """
        if isinstance(ours, Tensor):
            found = error(ours, peer)
            assert found <= bound, f"{name}: relative error {found:.1e}, expected <= {bound:.0e}"
            return
        for one, other in zip(ours, peer, strict=True):
            self.agree(name, one, other, bound)

    def compare(
        self,
        name: str,
        shape: dict[str, Any],
        ours: Callable[[], Any],
        peers: Functions,
        *,
        moved: int = 0,
        bandwidth: str | None = None,
        tera: float = 0.0,
        repeats: int = 20,
        calls: int = 10,
    ) -> list[dict[str, Any]]:
        """A record beside each peer, and one of the bandwidth where bytes are given.

        Args:
            name, shape: of the records.
            ours, peers: what is timed, in turns.
            moved: bytes that ours reads and writes at least.
            bandwidth: name of the record of the bandwidth; None: "NAME bandwidth".
            tera: multiply-adds of ours, in units of 1e12, for its TFLOP/s.
            repeats, calls: see `take_turns`.
        """
        timed, *others = self.times(ours, *peers.values(), repeats=repeats, calls=calls)
        rate = {"tflops": round(tera / timed.median * 1e3, 1)} if tera else {}
        found = [
            beside(name, shape, timed, peer, other) | rate for peer, other in zip(peers, others)
        ]
        if moved:
            found.append(self._share(bandwidth or f"{name} bandwidth", shape, moved, timed))
        return found

    def _share(self, name: str, shape: dict[str, Any], moved: int, ours: Times) -> dict[str, Any]:
        """The record of a bandwidth beside the copy's."""
        rates = [moved / ms / 1e9 for ms in (ours.median, *reversed(ours.range))]
        spread = [round(rate, 3) for rate in rates[1:]]
        copied = self.copied_bytes / 1e12
        return figure(name, shape, "TB/s", rates[0], "device copy", copied, 3, range=spread)


def beside(
    name: str, shape: dict[str, Any], ours: Times, peer: str, other: Times
) -> dict[str, Any]:
    """The record of a time beside another."""
    spreads = {"range": ours.range, "peer_range": other.range}
    return figure(name, shape, "ms", ours.median, peer, other.median, **spreads)
