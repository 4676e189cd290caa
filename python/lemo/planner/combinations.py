"""Ways to train on several GPUs: who has which windows, rows and weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lemo.planner.plan import Plan
from lemo.planner.request import Request
from lemo.planner.rows import has_one_set
from lemo.planner.text import bytes_text

__all__ = ["Combination", "combination_lines", "combinations"]

# Weights that FSDP2 can cut.
_CUT = (None, "nf4")


@dataclass(frozen=True)
class Combination:
    """A way to use some GPUs.

    Attributes:
        groups: of GPUs, each with windows of its own (data parallelism).
        size: GPUs of a group, which share out the kept rows of a window (context parallelism).
        shards: GPUs over which the weights are cut; 1: each has all.
        tokens: of the windows of all groups.
        plan: of each GPU; None: it does not fit.
    """

    groups: int
    size: int
    shards: int
    tokens: int
    plan: Plan | None

    @property
    def rate(self) -> float:
        """Tokens of windows in a second, of all GPUs; 0 where it does not fit."""
        return 0.0 if self.plan is None else self.tokens / self.plan.seconds


def combinations(request: Request, tokens: int, gpus: int, limit: int) -> list[Combination]:
    """All ways to use so many GPUs, those that train the most tokens in a second first.

    Args:
        request: the step of one GPU.
        tokens: of a window.
        gpus: how many there are.
        limit: bytes of each that a step may take.
    """
    found = []
    for size, shards in _ways(request, gpus):
        planner = replace(request, processes=size, shards=shards).planner(tokens)
        groups = gpus // size
        windows = groups * request.batch * request.passes
        plan = planner.plan(limit, request.modes)
        found.append(Combination(groups, size, shards, windows * tokens, plan))
    # Of ways that are as fast the one with the least traffic and settings comes first.
    return sorted(found, key=lambda each: (-each.rate, each.shards, each.size))


def _ways(request: Request, gpus: int) -> Iterator[tuple[int, int]]:
    """(GPUs of a group, GPUs over which weights are cut)."""
    elimination = request.elimination
    # What context parallelism refuses (lemo.models.calls.context_checks, lemo.models.training).
    shares = has_one_set(elimination, request.shape.layers)
    shares = shares and not elimination.layerwise.group_size
    shares = shares and not elimination.host_memory and (elimination.head_groups or 1) == 1
    # What sharding refuses: lemo.models.layers.products, lemo.models.memory.offload,
    # lemo.training.sharding.
    cuts = request.quantize in _CUT and elimination.products == "dtype"
    cuts = cuts and request.may_shard and not elimination.host_memory
    for size in range(1, gpus + 1):
        if gpus % size or (size > 1 and not shares):
            continue
        yield size, 1
        if gpus > 1 and cuts:
            yield size, gpus


def combination_lines(found: Sequence[Combination], timed: bool) -> Iterator[str]:
    """One line for each combination.

    Args:
        found: they, the best first.
        timed: whether rates were measured, so that times can be told.
    """
    for each in found:
        words = [f"{each.groups} window{'s' if each.groups > 1 else ''} at a time"]
        options = []
        if each.size > 1:
            words.append(f"each shared out by {each.size} GPUs")
            options.append(f"--context-parallel {each.size}")
        if each.shards > 1:
            words.append(f"weights cut by {each.shards}")
            options.append("--shard")
        line = ", ".join(words) + (f" ({' '.join(options)})" if options else "")
        if each.plan is None:
            yield f"{line}: does not fit"
            continue
        line += f": {bytes_text(each.plan.peak)} of a GPU"
        if timed:
            line += f", {each.plan.seconds:.3g} s a step, {each.rate:.4g} tokens a second"
        yield line
