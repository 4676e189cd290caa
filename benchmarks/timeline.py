"""The share of time in which a GPU does nothing while `lemo finetune` runs, and what it waits for.

    python benchmarks/timeline.py --output FILE.jsonl --model FOLDER --documents FILE
        [--steps 50] [--tokens 16384] [--keep 0.5] [--graphs auto] [--save-every 25]

Measured: the share of some steps in the middle of a run in which no kernel and no copy ran, as
torch.profiler (CUPTI) records them, and nothing of the host. "step_ms" is what those steps took,
"alone_step_ms" what as many before them took without a profiler. Tokenizing, logs and checkpoints
are those of every run; --save-every says how many checkpoints fall into these steps. Against:
nothing. Takes a minute for a small model.

Why nothing ran is asked of as many steps as --save-every says, in which the host's calls and
operators are recorded, too. That slows the host down: "profiled" is the share of these steps, and
"profiled_step_ms" what they took. Each of their gaps of more than 5 microseconds has a cause: the
call of CUDA's runtime in which the host waited, if it did for most of the gap, else the operator
that it was busy with, else "Python" and the kernel that ran behind it. The longest sums are
printed, and stand in the record as "gaps": {cause: [milliseconds, how often]}. "calls" are the
times of CUDA's runtime: {call: [milliseconds, how often, the longest]}, "collections" those of
Python's garbage collector, without a profiler. "short_gaps" is the share of the first steps in gaps
that are shorter.

As many steps as --save-every says are profiled once more, with Python's stacks, which slows the
host down further. Of their gaps "frames" says which function of lemo the training loop was in, by
file and line: {what the loop had called > the innermost function > what that had called, of another
library: [milliseconds, gaps]}; "beside" which function another thread was in meanwhile: Python runs
one of them at a time. "stacks_idle" is the share of these steps in which nothing ran.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import records, stacks, traces

WARM_UP = 8


def parse_arguments(arguments: list[str] | None = None):
    parser = records.parser(__doc__, records.BUILD / "timeline.jsonl")
    parser.add_argument("--model", type=records.existing, required=True, help="folder of a model")
    parser.add_argument("--documents", type=records.existing, required=True)
    parser.add_argument("--steps", type=int, default=50, help="steps that are looked at")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--graphs", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument(
        "--trace", type=Path, help="keep the trace of the host's calls in this file"
    )
    return parser.parse_args(arguments)


class Collections:
    """Python's garbage collections while `counts`.

    Attributes:
        found: [milliseconds, how often, the longest in milliseconds].
    """

    def __init__(self) -> None:
        self.counts, self._began = False, 0.0
        self.found = [0.0, 0, 0.0]

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        elif self.counts:
            milliseconds = 1e3 * (time.perf_counter() - self._began)
            total, count, most = self.found
            self.found = [total + milliseconds, count + 1, max(most, milliseconds)]


class Watched(NamedTuple):
    """What was seen of a run.

    Attributes:
        seconds: of steps in its middle, without a profiler.
        collections: what `Collections` found in them.
        traces: of as many steps behind them kernels; of some more the host's calls, too; of some
            more Python's stacks, too.
    """

    seconds: float
    collections: list[float]
    traces: list[Path]


def watched_run(options, folder: Path) -> Watched:
    """Trains a model, and looks at it in four ways, one behind the other."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from lemo import LemoConfig
    from lemo.settings.finetune import FinetuneConfig
    from lemo.training.finetune import finetune

    kernels = [ProfilerActivity.CUDA]
    all_kinds = [ProfilerActivity.CPU, *kernels]
    # What the profiler needs of CUDA is there before the first graph.
    with profile(activities=all_kinds):
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    profilers = [
        profile(activities=kernels),
        profile(activities=all_kinds),
        profile(activities=all_kinds, with_stack=True),
    ]
    begin = WARM_UP + options.steps
    # Where each profiler begins, and where the last one ends.
    bounds = [begin, begin + options.steps]
    bounds += [bounds[1] + options.save_every, bounds[1] + 2 * options.save_every]
    found = [folder / f"trace{index}.json" for index in range(len(profilers))]
    seconds = 0.0
    collections = Collections()

    def watch(record: dict[str, Any]) -> None:
        nonlocal seconds
        step = record["step"]
        if WARM_UP < step <= begin:
            seconds += record["seconds"]
        collections.counts = WARM_UP <= step < begin
        if step in bounds[1:]:
            index = bounds.index(step) - 1
            profilers[index].stop()
            # Now: in a trace that was written behind the next profile all times were 0.
            profilers[index].export_chrome_trace(str(found[index]))
        if step in bounds[:-1]:
            profilers[bounds.index(step)].start()

    config = FinetuneConfig(
        model=str(options.model),
        documents=str(options.documents),
        output=str(folder / "run"),
        context_length=options.tokens,
        # The last step, with which every run ends, is not looked at.
        steps=bounds[-1] + 3,
        save_every=options.save_every,
        device="cuda",
        elimination=LemoConfig(keep=options.keep, scorer="random", cuda_graphs=options.graphs),
    )
    gc.callbacks.append(collections)
    finetune(config, watch)
    gc.callbacks.remove(collections)
    if options.trace is not None:
        shutil.copy(found[1], options.trace)
    return Watched(seconds, collections.found, found)


def found_in(watched: Watched) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(the summary of kernels alone, that with the host's calls, what is said of the host)."""
    kernels, with_calls, with_stacks = map(traces.read_events, watched.traces)
    spans = traces.spans_of(with_stacks)
    frames = stacks.frames_of_gaps(spans[0], *stacks.frames_of_threads(with_stacks))
    return (
        traces.summary(*traces.spans_of(kernels)),
        traces.summary(*traces.spans_of(with_calls)),
        {
            "calls": stacks.runtime_calls(with_calls),
            "collections": [round(value, 2) for value in watched.collections],
            "stacks_idle": round(100 * traces.summary(*spans)["idle"], 2),
            "frames": frames["loop"],
            "beside": frames["beside"],
        },
    )


def main() -> int:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        watched = watched_run(options, Path(folder))
        kernels, profiled, of_host = found_in(watched)
    shape = {
        "model": options.model.name,
        "tokens": options.tokens,
        "keep": options.keep,
        "graphs": options.graphs,
        "save_every": options.save_every,
    }
    row = records.figure(
        "gpu idle",
        shape,
        "percent",
        100 * kernels["idle"],
        None,
        None,
        digits=2,
        steps=options.steps,
        step_ms=round(kernels["milliseconds"] / options.steps, 2),
        alone_step_ms=round(1e3 * watched.seconds / options.steps, 2),
        short_gaps=round(100 * kernels["short_gaps"], 2),
        profiled=round(100 * profiled["idle"], 2),
        profiled_step_ms=round(profiled["milliseconds"] / options.save_every, 2),
        gaps=profiled["gaps"],
        **of_host,
    )
    records.append(options.output, [row | records.provenance(options.commit, "cuda")])
    records.show(row)
    for about, ranked in (
        ("gaps, by what came behind them", profiled["gaps"]),
        ("gaps with stacks, by where the loop was", of_host["frames"]),
        ("by where other threads were meanwhile", of_host["beside"]),
        ("calls of CUDA's runtime", of_host["calls"]),
        ("garbage collections", {"": of_host["collections"]}),
    ):
        print(f"{about}:")
        for name, (milliseconds, count, *_) in ranked.items():
            print(f"{milliseconds:>10.2f} ms {count:>7} times  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
