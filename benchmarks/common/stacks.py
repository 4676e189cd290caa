"""Which code the host was in while a GPU did nothing, from a profile with Python's stacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from common.traces import LEAST_GAP, Span, busy, gaps

__all__ = ["frames_of_gaps", "frames_of_threads", "runtime_calls"]

# A gap is looked at in so many places.
_PLACES = 8
_LONGEST = 16
# A function of lemo as the profiler names it: file(line): name.
_OWN = re.compile(r"(?:^|/)lemo/(?P<file>[^()]+\.py)\((?P<line>\d+)\): (?P<name>\S+)")
_IN_FILE = re.compile(r"(?P<file>[^/()]*(?:/[^/()]+)?)\((?P<line>\d+)\): (?P<name>\S+)$")
_FOREIGN = "~"
_WAITS = re.compile(r"^~.*\b(acquire|sleep|synchronize)$")
_BACKWARD = re.compile(r"torch/autograd/function\.py\(\d+\): apply$")
_LOOP = "train"
_OTHER = "not in lemo"


def frames_of_threads(events: Iterable[Mapping[str, Any]]) -> tuple[list[Span], list[list[Span]]]:
    """(calls of the training loop, those of each other thread), sorted.

    Backward passes on a GPU run in a thread of autograd, while the main thread waits for them: they
    are a part of the loop.
    """
    calls = [e for e in events if e.get("ph") == "X" and e.get("cat") == "python_function"]
    of_loop = {e["tid"] for e in calls if e["tid"] == e["pid"] or _BACKWARD.search(e["name"])}
    loop: list[Span] = []
    others: dict[int, list[Span]] = {}
    for event in calls:
        begin, length = float(event["ts"]), float(event.get("dur", 0))
        span = Span(begin, begin + length, _name(event["name"]))
        (loop if event["tid"] in of_loop else others.setdefault(event["tid"], [])).append(span)
    return _by_depth(loop), [_by_depth(frames) for frames in others.values()]


@cache
def _name(name: str) -> str:
    """A function by file and line; of others than lemo's the end of the path, behind a mark."""
    own = _OWN.search(name)
    if own is not None:
        return f"{own['file']}:{own['line']} {own['name']}"
    other = _IN_FILE.search(name)
    if other is not None:
        return f"{_FOREIGN}{other['file']}:{other['line']} {other['name']}"
    return _FOREIGN + name.partition(" of ")[0].partition(" at 0x")[0].strip("<>")[:60]


def _by_depth(frames: list[Span]) -> list[Span]:
    # Callers come before what they call.
    return sorted(frames, key=lambda frame: (frame.begin, -frame.end))


def frames_of_gaps(
    on_gpu: Sequence[Span], loop: Sequence[Span], others: Sequence[Sequence[Span]]
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds in which nothing ran, and in how many gaps, by what the host was in.

    Args:
        on_gpu: kernels and copies.
        loop, others: from `frames_of_threads`.

    Returns:
        "loop": what the training loop had called, the innermost function of lemo, and what that had
        called; "beside": the innermost function of lemo in another thread. The longest sums.
    """
    found = [g for g in gaps(busy(on_gpu)) if g.end - g.begin >= LEAST_GAP]
    parts = [(g.end - g.begin) / _PLACES for g in found]
    places = [g.begin + (i + 0.5) * part for g, part in zip(found, parts) for i in range(_PLACES)]
    by_loop: dict[str, list[Any]] = {}
    beside: dict[str, list[Any]] = {}
    for sums, threads in ((by_loop, [loop]), (beside, others)):
        for frames in threads:
            for index, stack in enumerate(_stacks(frames, places)):
                label = _described(stack) if sums is by_loop else _busy(stack)
                if label is not None:
                    entry = sums.setdefault(label, [0.0, set()])
                    entry[0] += parts[index // _PLACES] / 1e3
                    entry[1].add(index // _PLACES)
    return {"loop": _ranked(by_loop), "beside": _ranked(beside)}


def _stacks(frames: Sequence[Span], places: Sequence[float]) -> Iterator[list[str]]:
    """The functions that are under way at each of some times, which ascend; outermost first."""
    stack: list[Span] = []
    waiting = iter(frames)
    next_ = next(waiting, None)
    for place in places:
        while next_ is not None and next_.begin <= place:
            while stack and stack[-1].end <= next_.begin:
                stack.pop()
            stack.append(next_)
            next_ = next(waiting, None)
        while stack and stack[-1].end < place:
            stack.pop()
        yield [frame.name for frame in stack]


def _described(stack: Sequence[str]) -> str:
    """What the loop had called, the innermost function of lemo, and what that had called."""
    own = [index for index, name in enumerate(stack) if not name.startswith(_FOREIGN)]
    if not own:
        return _OTHER
    names = [stack[index] for index in own]
    loops = [index for index, name in enumerate(names) if name.endswith(f" {_LOOP}")]
    inside = names[loops[0] + 1 :] if loops else names
    found = [inside[0], inside[-1]] if len(inside) > 1 else inside or names[-1:]
    called = [name.removeprefix(_FOREIGN) for name in stack[own[-1] + 1 : own[-1] + 2]]
    return " > ".join([*found, *called])


def _busy(stack: Sequence[str]) -> str | None:
    """The innermost function of lemo; None: there is none, or the thread waits for another one."""
    if not stack or _WAITS.search(stack[-1]):
        return None
    return next((name for name in reversed(stack) if not name.startswith(_FOREIGN)), None)


def _ranked(sums: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    order = sorted(sums.items(), key=lambda item: -item[1][0])
    return {name: [round(ms, 2), len(in_gaps)] for name, (ms, in_gaps) in order[:_LONGEST]}


def runtime_calls(events: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """[milliseconds, how often, the longest in milliseconds] of calls of CUDA's runtime, by name.

    The longest sums, of all threads. A replay of a CUDA graph is a "cudaGraphLaunch".
    """
    sums: dict[str, list[float]] = {}
    for event in events:
        kind = event.get("cat")
        if event.get("ph") != "X" or kind not in ("cuda_runtime", "cuda_driver"):
            continue
        milliseconds = float(event.get("dur", 0)) / 1e3
        entry = sums.setdefault(event["name"], [0.0, 0, 0.0])
        entry[0] += milliseconds
        entry[1] += 1
        entry[2] = max(entry[2], milliseconds)
    order = sorted(sums.items(), key=lambda item: -item[1][0])[:_LONGEST]
    return {n: [round(ms, 2), int(count), round(most, 3)] for n, (ms, count, most) in order}
