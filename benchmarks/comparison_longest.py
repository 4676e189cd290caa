"""The longest window that trains within a cap of GPU memory, for each contender of comparison.py.

    python benchmarks/comparison_longest.py --memory 24 [--only NAME ...] [--quantize nf4]
        [--step-limit S] [--deadline S] [--output FILE.jsonl]

Measured: whole optimizer steps of the Llama-3-8B shape as in `comparison.py`, with PyTorch's
allocator capped at --memory less --context, which is what the driver and a process's own context
take of a GPU of that size. With --quantize nf4 the linear layers of the decoder are stored in 4
bits. lemo with a plan is `longest.py`'s part: --longest.

Each contender trains 8192 and then 16384 tokens (half as many where those do not fit). Their peaks
are a line, which says what fits; 0.985 of that is tried, and 1.03 times as much where it trains,
or 0.95 of it in a new process where it does not, until a length trains and one that is at most 6%
longer does not, or --trials are over. Lengths are multiples of 1024. A length whose step would take
longer than --step-limit, by the square of the length, is replaced by the longest one that does not,
and the row has "bounded_by": "time".

Appends rows of bench "longest window" to --output: tokens, too_long (the shortest that ran out of
memory; null: none did), step_s, peak_gib, trials ([tokens, GiB or null, seconds]), and of the
whole process host_gib and pinned_gib.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import records
from common.processes import Worker, WorkerError, run_script
from comparison import (
    OUT_OF_MEMORY,
    QUIET,
    SHAPES,
    Steps,
    answering,
    card,
    held,
    reason,
    reset_peak,
)
from contenders import CONTENDERS
from gpu_finetune import ENVIRONMENT, RANK

BENCH = "longest window"
SHORT = 8192
# Lengths are multiples of it.
GRAIN = 1024
# Of the predicted length, and what is tried after a length that trains, or does not.
FIRST, LONGER, SHORTER = 0.985, 1.03, 0.95
# How many times longer a trial is than the last one, at most.
MOST_GROWTH = 8.0
# How much longer than one that trains a length may be that does not.
CLOSE = 1.06
# Those whose window does not grow, and shares of lemo that have no plan.
LEFT_OUT = ("pose", "sparselora", "fa4", "plain", "s2-plain")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "memory.jsonl")
    names = [name for name in CONTENDERS if name not in LEFT_OUT and "planned" not in name]
    parser.add_argument("--memory", type=float, help="GiB of a GPU", default=24.0)
    parser.add_argument("--context", type=float, help="GiB that are no tensors", default=0.75)
    parser.add_argument("--quantize", choices=["nf4"], help="how weights are stored")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="the shape's own number where left out")
    parser.add_argument("--short", type=int, default=SHORT, help="tokens of the first step")
    parser.add_argument("--most", type=int, default=1048576, help="tokens that are not exceeded")
    parser.add_argument("--trials", type=int, default=4, help="long steps of a contender")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds of a process")
    parser.add_argument("--step-limit", type=float, default=60.0, help="seconds of a step")
    parser.add_argument("--deadline", type=float, help="seconds after which none is begun")
    parser.add_argument("--ahead", type=int, default=2, help="processes that import and wait")
    parser.add_argument("--logs", type=Path, default=records.BUILD / "comparison_longest")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


# --- trials of one process


def next_length(
    peaks: dict[int, float | None], seconds: dict[int, float], usable: float, limits: dict[str, Any]
) -> tuple[int | None, str]:
    """What to try next, and what bounds it; None where the search is over.

    Args:
        peaks: GiB of each length that was tried; None: it ran out of memory.
        seconds: of each length that trained.
        usable: GiB that there are.
        limits: short, most and trials as of the options, step_limit.
    """
    trained = sorted(tokens for tokens, peak in peaks.items() if peak is not None)
    failed = [tokens for tokens, peak in peaks.items() if peak is None]
    high = min(failed, default=None)
    if not trained:
        wanted = limits["short"] if high is None else high / 2
        return (int(wanted), "") if wanted >= GRAIN else (None, "memory")
    low = trained[-1]
    if high is not None and high <= max(CLOSE * low, low + GRAIN):
        return None, "memory"
    if sum(tokens > 2 * limits["short"] for tokens in peaks) >= limits["trials"]:
        return None, "trials"
    wanted = 2.0 * low
    if len(trained) > 1:
        # The last two lengths and their peaks are a line.
        here, before = (float(peaks[tokens] or 0) for tokens in (low, trained[-2]))
        growth = max(here - before, 1e-3) / (low - trained[-2])
        wanted = FIRST * (low + (usable - here) / growth)
        wanted = min(max(wanted, LONGER * low, low + GRAIN), MOST_GROWTH * low)
    if high is not None:
        is_near = len(trained) > 1 and len(failed) == 1
        wanted = min(wanted, max(SHORTER * high if is_near else 0.0, (low + high) / 2))
    bound = "memory"
    slowest = low * (limits["step_limit"] / seconds[low]) ** 0.5
    for most, what in ((slowest, "time"), (limits["most"], "most")):
        if wanted > most:
            wanted, bound = most, what
    if bound == "time" and wanted < CLOSE * low:
        return None, bound
    tokens = int(wanted) // GRAIN * GRAIN
    return (tokens, bound) if tokens > low else (None, bound)


def worker(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """Imports what a contender needs, and tries lengths when it is asked to."""
    return answering(settings, lambda question: tried(settings, json.loads(question)))


def tried(settings: dict[str, Any], known: list[list[Any]]) -> dict[str, Any]:
    """Trials until one runs out of memory, or none is left to try.

    Args:
        settings: of the worker.
        known: trials of processes before: (tokens, GiB or None, seconds or None).
    """
    steps = Steps(settings, settings["most"])
    peaks = {tokens: peak for tokens, peak, _ in known}
    seconds = {tokens: taken for tokens, _, taken in known if taken is not None}
    if known:
        steps.seconds(min(settings["short"], min(seconds, default=GRAIN)))
    made: list[list[Any]] = []
    bound = ""
    while True:
        tokens, bound = next_length(peaks, seconds, settings["memory"], settings)
        if tokens is None or tokens in peaks:
            return {"trials": made, "bounded_by": bound, "over": True} | held(steps.device)
        if not seconds:
            # Compiles what has to be compiled.
            steps.seconds(GRAIN)
        reset_peak(steps.device)
        try:
            taken = steps.seconds(tokens)
        except RuntimeError as error:
            if reason(error) != OUT_OF_MEMORY:
                raise
            made.append([tokens, None, None])
            return {"trials": made, "bounded_by": "memory", "over": False}
        gc.collect()
        memory = held(steps.device)
        peak = memory.get("peak_gib", memory["host_gib"])
        if peak > settings["memory"]:  # no allocator is capped on the CPU
            made.append([tokens, None, None])
            return {"trials": made, "bounded_by": "memory", "over": False}
        print(f"{tokens} tokens: {peak:.2f} GiB, {taken:.2f} s", file=sys.stderr, flush=True)
        peaks[tokens], seconds[tokens] = peak, taken
        made.append([tokens, peak, round(taken, 3)])


# --- all contenders: the process that drives them


def row_of(
    options: argparse.Namespace, name: str, trials: list[list[Any]], more: dict[str, Any]
) -> dict[str, Any]:
    """What is recorded of a contender."""
    model, layers = SHAPES[options.shape]
    trained = [trial for trial in trials if trial[1] is not None]
    failed = [trial[0] for trial in trials if trial[1] is None]
    tokens, peak, seconds = max(trained, default=(None, None, None))
    return {
        "bench": BENCH,
        "contender": name,
        "memory": options.memory,
        "context_gib": options.context,
        "quantize": options.quantize,
        "tokens": tokens,
        "too_long": min(failed, default=None),
        "step_s": seconds,
        "keep": CONTENDERS[name].keep,
        "shape": {"model": model, "layers": options.layers or layers, "lora_rank": RANK},
        "settings": dict(CONTENDERS[name].settings),
        "trials": trials,
        **more,
        "peak_gib": peak,
    }


class Search:
    """The longest window of each contender, the next processes always started ahead."""

    def __init__(self, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self._options, self._stack = options, stack
        self._started: dict[tuple[str, int], Worker] = {}

    def _start(self, name: str, count: int) -> Worker:
        """The process of a contender with this number; started now where it was not."""
        if (name, count) not in self._started:
            options = self._options
            options.logs.mkdir(parents=True, exist_ok=True)
            names = ("shape", "layers", "quantize", "device", "short", "most", "trials")
            settings = {each: getattr(options, each) for each in (*names, "step_limit")}
            settings |= {"contender": name, "memory": options.memory - options.context}
            log = options.logs / f"{name}-{options.memory:g}-{options.quantize}-{count}.log"
            worker = Worker(__file__, settings, ENVIRONMENT | QUIET, log)
            self._started[name, count] = self._stack.enter_context(worker)
        return self._started[name, count]

    def ahead(self, names: list[str]) -> None:
        """Starts the first processes of these contenders."""
        for name in names:
            self._start(name, 0)

    def row(self, name: str) -> dict[str, Any]:
        """What is recorded of a contender."""
        trials: list[list[Any]] = []
        more: dict[str, Any] = {}
        for count in range(self._options.trials + 4):
            worker = self._start(name, count)
            # One more waits for the case that memory runs out.
            self._start(name, count + 1)
            try:
                answer = worker.ask(json.dumps(trials), self._options.timeout)
            except WorkerError as error:
                answer = {"failed": str(error)}
            worker.close()
            trials += answer.pop("trials", [])
            over = answer.pop("over", True)
            more |= answer
            if over:
                break
        unused = self._started.get((name, count + 1))
        if unused is not None:
            unused.end()  # it may still import
        return row_of(self._options, name, trials, more)


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began, failures = time.monotonic(), 0
    gpu = card() if options.device.startswith("cuda") else None
    common = records.provenance(options.commit, "cpu") | {"gpu": gpu}
    with contextlib.ExitStack() as stack:
        search = Search(options, stack)
        for index, name in enumerate(options.only):
            if options.deadline is not None and time.monotonic() - began > options.deadline:
                print(f"{name:<20} not measured: {options.deadline:g} s are over", flush=True)
                continue
            search.ahead(options.only[index : index + 1 + options.ahead])
            row = search.row(name) | common
            records.append(options.output, [row])
            failures += "failed" in row and row["tokens"] is None
            text = {each: row.get(each) for each in ("tokens", "too_long", "step_s", "peak_gib")}
            print(f"{name:<20} {row.get('failed') or text} {row['trials']}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main, worker)
