"""The share of time in which a GPU does nothing while `lemo finetune` runs, and what it waits for.

    python benchmarks/timeline.py --output FILE.jsonl --model FOLDER --documents FILE
        [--steps 50] [--tokens 16384] [--keep 0.5] [--graphs auto] [--save-every 25]

Measured: of some steps in the middle of a run the time that they took, and of as many steps behind
them, under torch.profiler (CUPTI), the time in which a kernel or a copy ran. What is missing of the
former is the share in which nothing ran. The profiler slows the host down: "profiled" is the share
of its own steps, and "profiled_step_ms" what they took. Tokenizing, logs and checkpoints are those
of every run; --save-every says how many checkpoints fall into either steps. Against: nothing. Takes
half a minute for a small model.

Every gap of more than 5 microseconds has a cause: the call of CUDA's runtime in which the host
waited, if it did for most of the gap, else the operator that it was busy with, else "Python" and
the kernel that ran behind it. The longest sums are printed, and stand in the record as "gaps":
{cause: [milliseconds, how often]}.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import records, traces

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
    parser.add_argument("--trace", type=Path, help="keep the trace in this file")
    return parser.parse_args(arguments)


def watched_run(options, folder: Path) -> tuple[float, Path]:
    """(seconds of the steps in the middle of a run, the trace of as many behind them)."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from lemo import LemoConfig
    from lemo.settings.finetune import FinetuneConfig
    from lemo.training.finetune import finetune

    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    # What the profiler needs of CUDA is there before the first graph.
    with profile(activities=kinds):
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    profiler = profile(activities=kinds)
    begin = WARM_UP + options.steps
    last, seconds = begin + options.steps, []

    def watch(record: dict[str, Any]) -> None:
        if WARM_UP < record["step"] <= begin:
            seconds.append(record["seconds"])
        if record["step"] == begin:
            profiler.start()
        elif record["step"] == last:
            profiler.stop()

    config = FinetuneConfig(
        model=str(options.model),
        documents=str(options.documents),
        output=str(folder / "run"),
        context_length=options.tokens,
        # The last step, with which every run ends, is not looked at.
        steps=last + 2,
        save_every=options.save_every,
        device="cuda",
        elimination=LemoConfig(keep=options.keep, scorer="random", cuda_graphs=options.graphs),
    )
    finetune(config, watch)
    trace = options.trace or folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    return sum(seconds), trace


def main() -> int:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        seconds, trace = watched_run(options, Path(folder))
        found = traces.summary(*traces.read_trace(trace))
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
        100 * (1 - (1 - found["idle"]) * found["milliseconds"] / (1e3 * seconds)),
        None,
        None,
        digits=2,
        steps=options.steps,
        step_ms=round(1e3 * seconds / options.steps, 2),
        profiled=round(100 * found["idle"], 2),
        profiled_step_ms=round(found["milliseconds"] / options.steps, 2),
        short_gaps=round(100 * found["short_gaps"], 2),
        gaps=found["gaps"],
    )
    records.append(options.output, [row | records.provenance(options.commit, "cuda")])
    records.show(row)
    for name, (milliseconds, count) in found["gaps"].items():
        print(f"{milliseconds:>10.2f} ms {count:>7} times  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
