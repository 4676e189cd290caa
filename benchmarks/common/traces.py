"""Traces of torch.profiler: when a GPU did nothing and why, and what ran beside what."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Span",
    "busy",
    "cause",
    "gaps",
    "overlap",
    "overlap_of_trace",
    "read_events",
    "read_trace",
    "spans_of",
    "summary",
]

LEAST_GAP = 5.0  # microseconds
MOST_LOOKED_AT = 1000  # events before a gap in which its cause is looked for
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
WAITING = ("Synchronize", "cudaMemcpy", "cudaHostAlloc", "cudaMalloc", "cudaFree", "QueryEvent")

# Kernels of NCCL, by what they do.
_NCCL = ("nccl", "ncclDevKernel_", "ncclKernel_")
# Kernels that are named in a summary, and letters of a name.
_LONGEST, _NAME = 16, 80
_KINDS = ("AllGather", "ReduceScatter", "AllReduce", "Broadcast", "SendRecv")


class Span(NamedTuple):
    """An event of a trace, in microseconds."""

    begin: float
    end: float
    name: str


def busy(spans: Iterable[Span]) -> list[Span]:
    """The times in which something ran; each is named by what began it."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and span.begin <= found[-1].end:
            if span.end > found[-1].end:
                found[-1] = found[-1]._replace(end=span.end)
        else:
            found.append(span)
    return found


def gaps(running: Sequence[Span]) -> list[Span]:
    """The times between; each is named by what runs behind it."""
    return [Span(one.end, next_.begin, next_.name) for one, next_ in pairwise(running)]


def cause(gap: Span, calls: Sequence[Span], operators: Sequence[Span]) -> str:
    """What the host did in a gap; calls and operators are sorted."""
    length = gap.end - gap.begin
    for spans, least in ((calls, 0.5), (operators, 0.3)):
        # The innermost of those that cover it comes last.
        last = bisect_right(spans, gap.end, key=_begin) - 1
        for index in range(last, max(last - MOST_LOOKED_AT, -1), -1):
            span = spans[index]
            shared = min(span.end, gap.end) - max(span.begin, gap.begin)
            if shared >= least * length:
                return span.name
            if gap.begin - span.begin > 1e5:
                break
    return f"Python, before {gap.name.partition('<')[0].split('(')[0][:60]}"


def _begin(span: Span) -> float:
    return span.begin


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a trace as they are in its file."""
    # Not all names in a trace are text that the encoding allows.
    events: list[dict[str, Any]] = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return events


def read_trace(path: Path) -> tuple[list[Span], list[Span], list[Span]]:
    """(what ran on the GPU, waiting calls of the runtime, operators), each sorted."""
    return spans_of(read_events(path))


def spans_of(events: Iterable[dict[str, Any]]) -> tuple[list[Span], list[Span], list[Span]]:
    """What `read_trace` gives, from the events of a trace."""
    on_gpu, calls, operators = [], [], []
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if event.get("ph") != "X":
            continue
        span = Span(float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0)), name)
        if kind in ON_GPU:
            on_gpu.append(span)
        elif kind in ("cuda_runtime", "cuda_driver") and any(word in name for word in WAITING):
            calls.append(span)
        elif kind in ("cpu_op", "user_annotation"):
            operators.append(span)
    return sorted(on_gpu), sorted(calls), sorted(operators)


def summary(
    on_gpu: Sequence[Span], calls: Sequence[Span], operators: Sequence[Span]
) -> dict[str, Any]:
    """Share of time in which nothing ran, and the sums of the gaps by cause."""
    if not on_gpu:
        raise ValueError("trace: expected kernels of a GPU, got none; CUPTI may be missing")
    running = busy(on_gpu)
    total = running[-1].end - running[0].begin
    if not total:
        raise ValueError(f"trace: expected times of {len(on_gpu)} kernels, got the same for all")
    found = gaps(running)
    causes: dict[str, list[float]] = {}
    for gap in found:
        if gap.end - gap.begin >= LEAST_GAP:
            sums = causes.setdefault(cause(gap, calls, operators), [0.0, 0])
            sums[0] += (gap.end - gap.begin) / 1e3
            sums[1] += 1
    order = sorted(causes.items(), key=lambda item: -item[1][0])
    short = sum(g.end - g.begin for g in found if g.end - g.begin < LEAST_GAP)
    return {
        "idle": sum(gap.end - gap.begin for gap in found) / total,
        "short_gaps": short / total,
        "milliseconds": total / 1e3,
        "gaps": {name: [round(ms, 2), int(count)] for name, (ms, count) in order[:12]},
    }


def overlap_of_trace(path: Path) -> dict[str, Any]:
    """The summary of a trace; see `overlap`. Also the longest gaps, by cause."""
    on_gpu, calls, operators = read_trace(path)
    gaps_by_cause = summary(on_gpu, calls, operators)["gaps"]
    return overlap(on_gpu) | {"gaps": gaps_by_cause}


def overlap(on_gpu: Sequence[Span]) -> dict[str, Any]:
    """Times of one step on one GPU, in milliseconds.

    A kernel of NCCL also counts the time in which it waits for the other GPUs.

    Args:
        on_gpu: kernels and copies.

    Returns:
        profiled_ms: from the first kernel to the last one; compute_ms, communication_ms: in which
        such kernels ran; exposed_ms: in which nothing but communication ran; idle_ms: in which
        nothing ran; hidden: share of the communication that ran beside computation (None without
        communication); kinds: [milliseconds, kernels] of each collective; kernels: the same of the
        kernels and copies beside, by the first words of their names, the longest sums.
    """
    sent = [span for span in on_gpu if span.name.startswith(_NCCL)]
    computing = busy(span for span in on_gpu if not span.name.startswith(_NCCL))
    sending, running = busy(sent), busy(on_gpu)
    total = running[-1].end - running[0].begin
    exposed = _length(running) - _length(computing)
    kinds = _sums((next((k for k in _KINDS if k in s.name), "other"), s) for s in sent)
    others = (span for span in on_gpu if not span.name.startswith(_NCCL))
    kernels = _sums((_short(span.name), span) for span in others)
    return {
        "profiled_ms": round(total / 1e3, 2),
        "compute_ms": round(_length(computing) / 1e3, 2),
        "communication_ms": round(_length(sending) / 1e3, 2),
        "exposed_ms": round(exposed / 1e3, 2),
        "idle_ms": round((total - _length(running)) / 1e3, 2),
        "hidden": hidden_share(_length(sending), exposed),
        "kinds": dict(sorted(kinds.items())),
        "kernels": dict(sorted(kernels.items(), key=lambda each: -each[1][0])[:_LONGEST]),
    }


def _sums(named: Iterable[tuple[str, Span]]) -> dict[str, list[float]]:
    """[milliseconds, how often] of each name."""
    found: dict[str, list[float]] = {}
    for name, span in named:
        sums = found.setdefault(name, [0.0, 0])
        sums[0] += (span.end - span.begin) / 1e3
        sums[1] += 1
    return {name: [round(ms, 2), int(count)] for name, (ms, count) in found.items()}


def _short(kernel: str) -> str:
    """A kernel's name without its arguments, cut."""
    return kernel.removeprefix("void ").split("(")[0][:_NAME]


def hidden_share(sending: float, exposed: float) -> float | None:
    """Share of the communication that ran beside computation."""
    return round(1 - exposed / sending, 4) if sending else None


def _length(spans: Sequence[Span]) -> float:
    return sum(span.end - span.begin for span in spans)
