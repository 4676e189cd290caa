"""The longest window that trains within a cap of GPU memory, for each contender of comparison.py.

    python benchmarks/comparison_longest.py --memory 24 [--only NAME ...] [--quantize nf4]
        [--step-limit S] [--deadline S] [--output FILE.jsonl]

Measured: whole optimizer steps of the Llama-3-8B shape as in `comparison.py`, with PyTorch's
allocator capped at --memory less --context, which is what the driver and a process's own context
take of a GPU of that size. With --quantize nf4 the linear layers of the decoder are stored in 4
bits.

Peers train 8192 and then 16384 tokens (half as many where those do not fit). Their peaks are a
line, which says what fits; 0.985 of that is tried, and 1.03 times as much where it trains, or 0.95
of it in a new process where it does not, until a length trains and one that is at most 6% longer
does not, or --trials are over. Where rows of the same contender and weights are known, of any cap,
the line is theirs, and no short steps are trained. Lengths are multiples of 1024. A length whose
step takes longer than --step-limit is too long, too: "bounded_by" is "time" then, and "too_slow"
the shortest such length. One whose step would, by the square of the length, is not tried.

lemo's contenders are planned: the longest window that the planner fits into 0.99 of the cap, in a
new process 0.97 where that does not train, and so on. lemo-1-host may take as much of the host as
Unsloth's row of the same cap has pinned (or --host-memory).

A contender gets an equal share of what is left of --deadline, and its process is ended where it
needs more.

Appends rows of bench "longest window" to --output: tokens, too_long (the shortest that ran out of
memory; null: none did), too_slow, step_s, peak_gib, trials ([tokens, GiB or null, seconds or
null]), of the whole process host_gib and pinned_gib, and of plans predicted_gib, predicted_s,
head_groups and modes ([layers, mode, share on the host]).
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
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from common import records
from common.planned import longest_plan, settings_of
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
from contenders import CONTENDERS, Built, adapted, labelled
from gpu_finetune import ENVIRONMENT, GIB, RANK, TARGETS

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
# Shares of the cap that plans are made for, in turn.
SHARES = (0.99, 0.97, 0.95, 0.92, 0.88)
# Those whose window does not grow.
LEFT_OUT = ("pose", "sparselora", "fa4", "plain", "s2-plain")


@dataclass(frozen=True)
class Planned:
    """A way of lemo, as the planner has it.

    Attributes:
        title: what tables call it.
        keep: share of tokens that layers work on.
        host: whether it may take as much of the host as Unsloth does.
    """

    title: str
    keep: float
    host: bool = False


PLANNED = {
    "lemo-1-planned": Planned("lemo, keep 1, planned", 1.0),
    "lemo-1-host": Planned("lemo, keep 1, planned, with memory of the host", 1.0, True),
    "lemo-0.5-planned": Planned("lemo, keep 0.5, planned", 0.5),
    "lemo-0.25-planned": Planned("lemo, keep 0.25, planned", 0.25),
}
# Whose bytes of the host those are, the first that has a row.
HOSTS = ("unsloth-tiled", "unsloth")
NAMES = [*PLANNED, *(n for n in CONTENDERS if n not in LEFT_OUT and not n.startswith("lemo"))]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "memory.jsonl")
    count, above_zero, from_zero = records.at_least(1), records.above_zero, records.from_zero
    parser.add_argument("--memory", type=above_zero, help="GiB of a GPU", default=24.0)
    parser.add_argument("--context", type=from_zero, help="GiB that are no tensors", default=0.75)
    parser.add_argument("--quantize", choices=["nf4"], help="how weights are stored")
    parser.add_argument("--host-memory", type=above_zero, help="GiB of lemo-1-host, not as Unsloth")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", default=NAMES)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=count, help="the shape's own number where left out")
    parser.add_argument(
        "--short", type=records.at_least(GRAIN), default=SHORT, help="tokens of the first step"
    )
    parser.add_argument(
        "--most", type=records.at_least(GRAIN), default=1048576, help="tokens that are not exceeded"
    )
    parser.add_argument("--trials", type=count, default=4, help="long steps of a contender")
    parser.add_argument("--timeout", type=above_zero, default=240.0, help="seconds of a trial")
    parser.add_argument("--step-limit", type=above_zero, default=60.0, help="seconds of a step")
    parser.add_argument("--deadline", type=from_zero, help="seconds of all contenders")
    parser.add_argument(
        "--ahead", type=records.at_least(0), default=2, help="processes that import and wait"
    )
    parser.add_argument("--logs", type=Path, default=records.BUILD / "comparison_longest")
    parser.add_argument("--device", type=records.device, default="cuda")
    options = parser.parse_args(arguments)
    if options.memory <= options.context:
        parser.error(
            f"--memory: expected more than the {options.context:g} GiB of --context, got "
            f"{options.memory:g}"
        )
    return options


# --- which length is next

# A trial: tokens, GiB or None, seconds or None. Without GiB and seconds it ran out of memory;
# without GiB it was ended after so many seconds.
Trial = list[Any]


def next_length(
    trials: list[Trial], usable: float, limits: dict[str, Any], known: list[Trial] | None = None
) -> tuple[int | None, str]:
    """What to try next, and what bounds it; None where the search is over.

    Args:
        trials: that were made.
        usable: GiB that there are.
        limits: short, most, trials and step_limit as of the options.
        known: trials of earlier rows, by which the first length is guessed.
    """
    limit = limits["step_limit"]
    slow = [tokens for tokens, _, seconds in trials if seconds is not None and seconds > limit]
    failed = [tokens for tokens, peak, seconds in trials if peak is None and seconds is None]
    fast = sorted(each for each in trials if each[1] is not None and each[2] <= limit)
    high = min(slow + failed, default=None)
    bound = "time" if high is not None and high in slow else "memory"
    if not fast:
        wanted: float = limits["short"] if high is None else high / 2
        if high is None:
            wanted = guess(known or [], usable, limits) or wanted
        tokens = int(wanted) // GRAIN * GRAIN
        return (tokens, "") if tokens else (None, bound)
    low, _, seconds = fast[-1]
    if high is not None and high <= max(CLOSE * low, low + GRAIN):
        return None, bound
    if sum(tokens > 2 * limits["short"] for tokens, _, _ in trials) >= limits["trials"]:
        return None, "trials"
    # Of those that were too slow, too, the peak is known.
    line = trained(trials) if len(trained(trials)) > 1 else trained([*trials, *(known or [])])
    wanted = 2.0 * low
    if len(line) > 1:
        wanted = FIRST * crossing(line, usable)
        wanted = min(max(wanted, LONGER * low, low + GRAIN), MOST_GROWTH * low)
    if high is not None:
        is_near = len(line) > 1 and len(failed) == 1
        wanted = min(wanted, max(SHORTER * high if is_near else 0.0, (low + high) / 2))
    slowest = low * (limit / seconds) ** 0.5
    for most, what in ((slowest, "time"), (limits["most"], "most")):
        if wanted > most:
            wanted, bound = most, what
    if bound == "time" and wanted < CLOSE * low:
        return None, bound
    tokens = int(wanted) // GRAIN * GRAIN
    return (tokens, bound) if tokens > low else (None, bound)


def trained(trials: list[Trial]) -> list[tuple[int, float]]:
    """(tokens, GiB) of those that trained, ascending, each length once."""
    return sorted({tokens: peak for tokens, peak, _ in trials if peak is not None}.items())


def crossing(line: list[tuple[int, float]], usable: float) -> float:
    """The tokens at which the line through the last two points reaches some GiB."""
    (before, less), (here, more) = line[-2:]
    return here + (usable - more) * (here - before) / max(more - less, 1e-3)


def guess(known: list[Trial], usable: float, limits: dict[str, Any]) -> float | None:
    """The first length, by trials of earlier rows; None where they do not say one."""
    line = trained(known)
    if len(line) < 2:
        return None
    longest, seconds = max((tokens, taken) for tokens, _, taken in known if taken is not None)
    slowest = longest * (limits["step_limit"] / seconds) ** 0.5
    wanted = min(FIRST * crossing(line, usable), FIRST * slowest, limits["most"])
    # The line says too much where a part of the memory grows faster.
    failed = [tokens for tokens, peak, seconds in known if peak is None and seconds is None]
    wanted = min(wanted, SHORTER * min(failed, default=limits["most"]))
    return wanted if wanted >= GRAIN else None


# --- trials of one process


def worker(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """Imports what a contender needs, and trains a length, or a plan, when it is asked to."""
    if "share" in settings:
        return answering(settings, lambda _: planned_trial(settings))
    made: list[Steps] = []

    def answer(question: str) -> dict[str, Any]:
        if not made:
            made.append(Steps(settings, settings["most"]))
            # Compiles what has to be compiled.
            made[0].seconds(GRAIN)
        if not question:
            return {}
        return trial(made[0], json.loads(question), settings["memory"])

    return answering(settings, answer)


def trial(steps: Steps, tokens: int, usable: float) -> dict[str, Any]:
    """One step of so many tokens; the process is of no use where it runs out of memory."""
    reset_peak(steps.device)
    try:
        taken = steps.seconds(tokens)
    except RuntimeError as error:
        if reason(error) != OUT_OF_MEMORY:
            raise
        return {"trials": [[tokens, None, None]]}
    gc.collect()
    memory = held(steps.device)
    peak = memory.get("peak_gib", memory["host_gib"])
    if peak > usable:  # no allocator is capped on the CPU
        return {"trials": [[tokens, None, None]]}
    print(f"{tokens} tokens: {peak:.2f} GiB, {taken:.2f} s", file=sys.stderr, flush=True)
    return {"trials": [[tokens, peak, round(taken, 3)]], **memory}


def planned_trial(settings: dict[str, Any]) -> dict[str, Any]:
    """One step of the longest window that is planned for a share of the memory."""
    import torch

    import lemo
    from common.models import config_of_shape
    from lemo.planner.request import Request
    from lemo.planner.shape import Adapters, shape_of
    from lemo.training.calibration import calibrated

    device = torch.device(settings["device"])
    shape = shape_of(config_of_shape(settings["shape"], 1, settings["layers"]))
    chosen = {name: settings[name] for name in ("keep", "host_memory")}
    request = Request(
        shape,
        Adapters(RANK, frozenset(TARGETS), size=2),
        lemo.LemoConfig(**chosen).resolved(answers=False),
        calibrated(shape, device, torch.bfloat16),
        autocast=False,
        cuda=device.type == "cuda",
        quantize=settings["quantize"],
    )
    usable = round(settings["share"] * settings["memory"] * GIB)
    tokens, plan = longest_plan(request, usable, settings["share"] * settings["step_limit"])
    if plan is None:
        return {"trials": [], "failed": "not even 16 tokens fit"}
    if device.type == "cuda":
        torch.cuda.empty_cache()

    def build(config: Any, where: str, _tokens: int) -> Built:
        model = adapted(config, where)
        handle = lemo.enable(model, request.elimination.model_copy(update=settings_of(plan)))
        if plan.host:
            handle.path.forward.offload.pin(device)  # not a part of the step
        return Built(model, labelled(model), contextlib.nullcontext)

    actions = groupby(zip(plan.modes, plan.shares))
    is_longest = tokens == request.longest(usable)
    found = {
        "bounded_by": "memory" if is_longest else "time",
        "predicted_gib": round(plan.peak / GIB, 3),
        "predicted_s": round(plan.seconds, 3),
        "head_groups": plan.head_groups,
        "modes": [[len([*each]), mode, round(share, 4)] for (mode, share), each in actions],
    }
    print(tokens, found, file=sys.stderr, flush=True)
    steps = Steps(settings, tokens, build)
    steps.seconds(min(GRAIN, tokens))
    answer = trial(steps, tokens, settings["memory"]) | found
    # The pool is none of PyTorch's.
    return answer | {"pinned_gib": round(plan.host / GIB, 2)}


# --- all contenders: the process that drives them


def title_of(name: str) -> str:
    """What tables call a contender."""
    return PLANNED[name].title if name in PLANNED else CONTENDERS[name].title


def row_of(
    options: argparse.Namespace, name: str, trials: list[Trial], more: dict[str, Any]
) -> dict[str, Any]:
    """What is recorded of a contender."""
    model, layers = SHAPES[options.shape]
    limit = options.step_limit
    fitting = [each for each in trials if each[1] is not None and each[2] <= limit]
    failed = [tokens for tokens, peak, seconds in trials if peak is None and seconds is None]
    slow = [tokens for tokens, _, seconds in trials if seconds is not None and seconds > limit]
    tokens, peak, seconds = max(fitting, default=(None, None, None))
    planned = PLANNED.get(name)
    return {
        "bench": BENCH,
        "contender": name,
        "memory": options.memory,
        "context_gib": options.context,
        "quantize": options.quantize,
        "tokens": tokens,
        "too_long": min(failed, default=None),
        "too_slow": min(slow, default=None),
        "step_s": seconds,
        "keep": planned.keep if planned else CONTENDERS[name].keep,
        "shape": {"model": model, "layers": options.layers or layers, "lora_rank": RANK},
        "settings": {"planned": True} if planned else dict(CONTENDERS[name].settings),
        "step_limit": limit,
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
            names = ("shape", "layers", "quantize", "device", "most", "step_limit")
            settings = {each: getattr(options, each) for each in names}
            settings |= {"contender": name, "memory": options.memory - options.context}
            if name in PLANNED:
                keep = PLANNED[name].keep
                settings |= {"contender": f"lemo-{keep:g}-planned", "keep": keep}
                settings |= {"share": SHARES[count], "host_memory": self.host_memory(name) or 0.0}
            log = options.logs / f"{name}-{options.memory:g}-{options.quantize}-{count}.log"
            worker = Worker(__file__, settings, ENVIRONMENT | QUIET, log)
            self._started[name, count] = self._stack.enter_context(worker)
        return self._started[name, count]

    def ahead(self, names: list[str]) -> None:
        """Starts the first processes of these contenders; not what Unsloth's row has yet to say."""
        for name in names:
            if self.host_memory(name) is not None:
                self._start(name, 0)

    def host_memory(self, name: str) -> float | None:
        """GiB of the host that a contender may take; None: that is not known."""
        if name not in PLANNED or not PLANNED[name].host:
            return 0.0
        if self._options.host_memory is not None:
            return self._options.host_memory
        wanted = {"memory": self._options.memory, "quantize": self._options.quantize}
        for other in HOSTS:
            for row in reversed(self._rows(other)):
                if row["tokens"] and wanted.items() <= row.items():
                    return row["pinned_gib"]
        return None

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a contender that were recorded before, of the same model."""
        model, layers = SHAPES[self._options.shape]
        shape = {"model": model, "layers": self._options.layers or layers, "lora_rank": RANK}
        wanted = {"contender": name, "shape": shape}
        paths = dict.fromkeys((records.RESULTS / "memory.jsonl", self._options.output))
        rows = [row for path in paths for row in records.read(path, BENCH)]
        on_gpu = self._options.device.startswith("cuda")
        return [r for r in rows if wanted.items() <= r.items() and (r["gpu"] is not None) == on_gpu]

    def row(self, name: str, seconds: float = float("inf")) -> dict[str, Any]:
        """What is recorded of a contender.

        Args:
            seconds: that it may take.
        """
        until = time.monotonic() + seconds
        if self.host_memory(name) is None:
            failed = "no row of Unsloth, and no --host-memory"
            return row_of(self._options, name, [], {"failed": failed})
        find = self._planned if name in PLANNED else self._searched
        return row_of(self._options, name, *find(name, until))

    def _ask(self, worker: Worker, question: str, until: float) -> dict[str, Any]:
        """The answer; where there is none, "failed", and "ended" where that took too long."""
        most = max(min(self._options.timeout, until - time.monotonic()), 0.1)
        began = time.monotonic()
        try:
            return worker.ask(question, most)
        except WorkerError as error:
            taken = time.monotonic() - began
            return {"failed": str(error)} | ({"ended": round(taken, 1)} if taken >= most else {})

    def _planned(self, name: str, until: float) -> tuple[list[Trial], dict[str, Any]]:
        trials: list[Trial] = []
        more: dict[str, Any] = {}
        for count in range(len(SHARES)):
            worker = self._start(name, count)
            more = self._ask(worker, "", until)
            more.pop("ended", None)
            worker.close()
            trials += more.pop("trials", [])
            is_over = more.get("failed") or time.monotonic() > until
            if is_over or (trials[-1][1] and trials[-1][2] <= self._options.step_limit):
                break
        return trials, more

    def _searched(self, name: str, until: float) -> tuple[list[Trial], dict[str, Any]]:
        options = self._options
        limits = {each: getattr(options, each) for each in ("short", "most", "trials")}
        limits["step_limit"] = options.step_limit
        usable = options.memory - options.context
        same = [row for row in self._rows(name) if row["quantize"] == options.quantize]
        known = [
            trial
            for row in same
            for trial in row["trials"]
            # What does not fit into less may fit here.
            if trial[1] is not None or row["memory"] >= options.memory
        ]
        trials: list[Trial] = []
        more: dict[str, Any] = {}
        count, bound, is_new = 0, "memory", True
        worker = self._start(name, count)
        while True:
            # One more waits for the case that memory runs out.
            self._start(name, count + 1)
            tokens, bound = next_length(trials, usable, limits, known)
            if tokens is None or tokens in [each[0] for each in trials]:
                break
            if time.monotonic() > until:
                bound = "deadline"
                break
            # Imports and weights take time, too, which is none of a step.
            answer = self._ask(worker, "", until) if is_new else {}
            is_late = answer.pop("ended", None) is not None and bool(trained(trials))
            if "failed" in answer:
                bound = "deadline" if is_late else bound
                more |= {} if is_late else answer
                break
            is_new = False
            answer = self._ask(worker, json.dumps(tokens), until)
            ended = answer.pop("ended", None)
            made = answer.pop("trials", [])
            if ended is not None and ended > options.step_limit:
                # It takes longer than a step may.
                answer, made = {}, [[tokens, None, ended]]
            elif ended is not None and trained(trials):
                answer, bound = {}, "deadline"
            more |= answer
            trials += made
            if not made:
                break
            if made[0][1] is None:
                worker.close()
                count, is_new = count + 1, True
                worker = self._start(name, count)
        worker.end()
        unused = self._started.get((name, count + 1))
        if unused is not None:
            unused.end()  # it may still import
        return trials, {"bounded_by": bound} | more


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began, failures = time.monotonic(), 0
    gpu = card(options.device)
    common = records.provenance(options.commit, "cpu") | {"gpu": gpu}
    deadline = float("inf") if options.deadline is None else options.deadline
    with contextlib.ExitStack() as stack:
        search = Search(options, stack)
        for index, name in enumerate(options.only):
            left = deadline - (time.monotonic() - began)
            search.ahead(options.only[index : index + 1 + options.ahead])
            row = search.row(name, left / (len(options.only) - index)) | common
            records.append(options.output, [row])
            failures += "failed" in row and row["tokens"] is None
            names = ("tokens", "too_long", "too_slow", "step_s", "peak_gib", "bounded_by")
            text = {each: row.get(each) for each in names}
            print(f"{name:<20} {row.get('failed') or text} {row['trials']}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main, worker)
