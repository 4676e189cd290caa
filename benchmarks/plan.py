"""Predicted memory and time of steps beside measured ones.

    python benchmarks/plan.py [--tokens 8192 16384 65536] [--keep 0.25 0.5 1]
        [--recompute auto none selective layer] [--memory 80] [--device cpu --shrink 32 --layers 4]
    python benchmarks/plan.py --recorded

Measured: optimizer steps of the Llama-3-8B shape with random weights and LoRA on q, k, v and o, one
process for each length, share and mode; with "auto" each layer does what the planner chooses for
--memory GiB, and what does not fit is named and left out. Predicted: by `lemo.planner`, with rates
that are calibrated on this machine. On the CPU memory is resident memory above the weights, and
coarse.

With --recorded nothing is measured: predictions of now stand beside the steps that other scripts
measured on GPUs earlier. A row names the file and the commit that it was measured at, and whether
rates were fitted to it; such rows validate nothing.

Appends rows of bench "plan" to --output: predicted_gib, measured_gib, predicted_s, measured_s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from common import records
from common.planned import settings_of
from common.processes import measure, run_script
from gpu_finetune import ENVIRONMENT, RANK, TARGETS

GIB = 2**30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "memory.jsonl")
    parser.add_argument(
        "--recorded", action="store_true", help="of steps that were measured before"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 65536])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    modes = ["auto", "none", "selective", "layer"]
    parser.add_argument("--recompute", nargs="+", default=modes, choices=modes)
    parser.add_argument("--memory", type=float, default=80.0, help="GiB that a step may take")
    records.add_shape(parser)
    records.add_repeats(parser)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


# --- one measurement: a process of its own


def worker(settings: dict) -> Callable[[str], dict]:
    """Plans a step, and measures it as it was planned."""
    import torch

    import lemo
    from common.models import llama_config, random_llama, training_step, with_lora
    from common.timing import milliseconds, summary
    from lemo.planner.request import Request
    from lemo.planner.shape import Adapters, shape_of
    from lemo.training import memory
    from lemo.training.calibration import calibrated

    def answer(_: str) -> dict:
        device, tokens = torch.device(settings["device"]), settings["tokens"]
        config = llama_config(tokens, settings["layers"], settings["shrink"])
        shape = shape_of(config)
        request = Request(
            shape,
            Adapters(RANK, frozenset(TARGETS), size=2),
            lemo.LemoConfig(keep=settings["keep"]).resolved(answers=False),
            calibrated(shape, device, torch.bfloat16),
            autocast=False,
            cuda=device.type == "cuda",
        )
        limit, planner = round(settings["memory"] * GIB), request.planner(tokens)
        if settings["recompute"] == "auto":
            plan = planner.plan(limit)
            if plan is None:
                return {"refused": request.advice(tokens, limit)}
        else:
            plan = planner.of([settings["recompute"]] * shape.layers, limit)
            if plan.peak > limit:
                return {"refused": f"{plan.peak / GIB:.1f} GiB"}
        model = with_lora(random_llama(config, settings["device"]), RANK, TARGETS).train()
        elimination = request.elimination.model_copy(update=settings_of(plan))
        lemo.enable(model, elimination)
        ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
        step = partial(training_step(model), ids)
        memory.reset_peak(device)
        # On the CPU what the process holds beside the weights is no part of a step.
        others = 0 if device.type == "cuda" else memory.peak_bytes(device) - planner.weights
        times = []
        for repeat in range(settings["warmup"] + settings["reps"]):
            if repeat == settings["warmup"]:
                memory.reset_peak(device)
            times.append(milliseconds(step, settings["device"]))
        counted = summary(times[settings["warmup"] :], digits=1)
        return {
            "modes": [[len(layers), mode] for layers, mode, _ in plan.runs()],
            "head_groups": plan.head_groups,
            "predicted_gib": round(plan.peak / GIB, 3),
            "measured_gib": round((memory.peak_bytes(device) - others) / GIB, 3),
            "predicted_s": round(plan.seconds, 4),
            "measured_s": round(counted.median / 1e3, 4),
            "measured_s_range": [round(each / 1e3, 4) for each in counted.range],
        }

    return answer


# --- all measurements


def measured_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Appends a row for each step that fits."""
    names = ("layers", "warmup", "reps", "device", "shrink", "memory")
    common = {name: getattr(options, name) for name in names}
    rows = []
    for tokens in options.tokens:
        for keep in options.keep:
            for recompute in options.recompute:
                settings = common | {"tokens": tokens, "keep": keep, "recompute": recompute}
                result = measure(__file__, settings, ENVIRONMENT)
                print(
                    f"{tokens:>8} keep {keep:<6} {recompute:<10} {result or 'failed'}", flush=True
                )
                if result is None or "refused" in result:
                    continue
                shape = {"model": "Llama-3-8B shape", **settings, "lora_rank": RANK}
                row = {"bench": "plan", "shape": shape, **result}
                rows.append(row | records.provenance(options.commit, options.device))
    return rows


def recorded_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each recorded step: measured then, predicted now."""
    from common.recorded_steps import (
        is_fitted,
        predicted_bytes,
        predicted_seconds,
        rates_of,
        recorded_steps,
        timed_steps,
    )

    timed, rows = set(map(id_of, timed_steps())), []
    for step in recorded_steps():
        has_time = id_of(step) in timed
        seconds = predicted_seconds(step, rates_of(step)) if has_time else None
        shape = {
            "model": step.model,
            "tokens": step.tokens,
            "windows": len(step.step.lengths),
            "keep": step.keep,
            "kept_rows": sorted({rows.attention for rows in step.step.rows}),
            "recompute": step.recompute,
            "quantize": step.quantize,
            "group_size": step.group_size,
        }
        rows.append(
            {
                "bench": "plan",
                "shape": shape,
                "predicted_gib": round(predicted_bytes(step) / GIB, 3),
                "measured_gib": step.peak_gib,
                "predicted_s": None if seconds is None else round(seconds, 4),
                "measured_s": step.seconds if has_time else None,
                "rates_fitted_to_it": has_time and is_fitted(step),
                "source": f"{step.source}.jsonl",
                "source_commit": step.commit,
                "note": "measured earlier, at source_commit; predicted now, at commit",
                **records.provenance(options.commit, "cpu"),
                "gpu": step.gpu,
            }
        )
    return rows


def id_of(step: Any) -> tuple[Any, ...]:
    """What tells recorded steps apart."""
    return step.source, step.commit, step.name, step.step, step.seconds


def show(rows: list[dict[str, Any]]) -> None:
    """Prints how far predictions are off."""
    for what in ("gib", "s"):
        errors = [
            row[f"predicted_{what}"] / row[f"measured_{what}"] - 1
            for row in rows
            if row[f"measured_{what}"] and not (what == "s" and row.get("rates_fitted_to_it"))
        ]
        if errors:
            print(f"{what}: {len(errors)} rows, errors {min(errors):+.1%} to {max(errors):+.1%}")


def main() -> int:
    options = parse_arguments()
    rows = recorded_rows(options) if options.recorded else measured_rows(options)
    records.append(options.output, rows)
    show(rows)
    return 0 if rows else 1


if __name__ == "__main__":
    run_script(main, worker)
