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

import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from common import records

WARM_UP = 8
LEAST_GAP = 5.0  # microseconds
MOST_LOOKED_AT = 1000  # events before a gap in which its cause is looked for
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
WAITING = ("Synchronize", "cudaMemcpy", "cudaHostAlloc", "cudaMalloc", "cudaFree", "QueryEvent")


class Span(NamedTuple):
    """An event of a trace, in microseconds."""

    begin: float
    end: float
    name: str


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


def read_trace(path: Path) -> tuple[list[Span], list[Span], list[Span]]:
    """(what ran on the GPU, waiting calls of the runtime, operators), each sorted."""
    on_gpu, calls, operators = [], [], []
    # Not all names in a trace are text that the encoding allows.
    for event in json.loads(path.read_text(errors="replace"))["traceEvents"]:
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
        found = summary(*read_trace(profiled_run(options, Path(folder))))
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
