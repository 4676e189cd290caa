"""The share of time in which a GPU does nothing while `lemo finetune` runs, and what it waits for.

    python benchmarks/timeline.py --output FILE.jsonl --model FOLDER --documents FILE
        [--steps 50] [--tokens 16384] [--keep 0.5] [--graphs auto] [--save-every 25]

Measured: of some steps in the middle of a run, under torch.profiler (CUPTI), the time in which
neither a kernel nor a copy ran, as a share of the whole. Tokenizing, logs and checkpoints are those
of every run; --save-every says how many checkpoints fall into the steps. Against: nothing. Takes a
quarter of a minute for a small model.

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


def profiled_run(options, folder: Path) -> Path:
    """The trace of the steps in the middle of a run."""
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
    last = WARM_UP + options.steps

    def watch(record: dict[str, Any]) -> None:
        if record["step"] == WARM_UP:
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
        elimination=LemoConfig(keep=options.keep, cuda_graphs=options.graphs),
    )
    finetune(config, watch)
    trace = options.trace or folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    return trace


def main() -> int:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        found = traces.summary(*traces.read_trace(profiled_run(options, Path(folder))))
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
        100 * found["idle"],
        None,
        None,
        digits=2,
        steps=options.steps,
        step_ms=round(found["milliseconds"] / options.steps, 2),
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
