"""Times of functions that take turns: medians and ranges, after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Times", "milliseconds", "summary", "take_turns"]

WARM_UP = 3


@dataclass(frozen=True)
class Times:
    """Median of several times, and [the shortest, the longest] of them, in one unit."""

    median: float
    range: list[float]


def summary(times: Sequence[float], digits: int = 4) -> Times:
    return Times(statistics.median(times), [round(min(times), digits), round(max(times), digits)])


def milliseconds(function: Callable[[], object], device: str) -> float:
    """One call, timed by the GPU's events or by the clock."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def take_turns(
    functions: Sequence[Callable[[], object]], device: str, repeats: int = 20, calls: int = 10
) -> list[Times]:
    """Milliseconds of one call of each function.

    A measurement is `calls` calls in a row, so that a GPU never waits for the host. Each round
    begins with another function: how hot one leaves the GPU is the next one's clock.
    """
    times: list[list[float]] = [[] for _ in functions]

    def call_often(function: Callable[[], object]) -> None:
        for _ in range(calls):
            function()

    for repeat in range(WARM_UP + repeats):
        for turn in range(len(functions)):
            index = (turn + repeat) % len(functions)
            taken = milliseconds(lambda f=functions[index]: call_often(f), device) / calls
            if repeat >= WARM_UP:
                times[index].append(taken)
    return [summary(taken) for taken in times]
