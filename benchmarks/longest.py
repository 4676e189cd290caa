"""One whole training step of a context that needs what each layer's plan saves, under a memory cap.

    python benchmarks/longest.py --memory 80 --tokens 1048576 --keep 0.25 --host-memory 60
    python benchmarks/longest.py --memory 80 --tokens 262144 --keep 1 --host-memory 60
    python benchmarks/longest.py --memory 139 --tokens 4194304 --keep 0.0625 --block-size 64
        --host-memory 30
    python benchmarks/longest.py --memory 24 --longest 1 0.98 0.95 [--quantize nf4]

Measured: a step of the Llama-3-8B shape with random bf16 weights, LoRA on q, k, v and o, batch 1,
after one of --warmup tokens by which libraries and kernels are loaded. Each layer does what the
planner chooses for --memory GiB of the GPU and --host-memory of the host; PyTorch's allocator may
take no more than --memory, of which its own context takes a part. What does not fit is named before
anything runs. With --quantize nf4 the linear layers of the decoder are stored in 4 bits. A window
keeps whole blocks, at least one, so a --keep below a quarter needs a smaller --block-size than the
default, a quarter of the window.

With --longest the lengths are the longest ones that the planner fits into these shares of the cap,
in turn, until one trains: the first share may be too much, as the allocator does not use all of
what it holds.

Appends a row of bench "longest" to --output: predicted_gib, peak_gib, reserved_gib, cap_gib,
predicted_host_gib, host_gib, predicted_s, step_s, head_groups, kept_rows, modes ([layers, mode,
share on the host]), loss; or "failed" with the reason where a step that was planned does not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import groupby
from typing import Any

from common import records
from common.planned import longest_plan, settings_of
from common.processes import measure, run_script
from comparison import OUT_OF_MEMORY, reason
from gpu_finetune import ENVIRONMENT, RANK, TARGETS

GIB = 2**30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "memory.jsonl")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB that a step may take")
    parser.add_argument("--context", type=float, help="GiB that are no tensors; None: as measured")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1048576])
    parser.add_argument(
        "--longest", type=float, nargs="+", metavar="SHARE", help="of the cap, instead of --tokens"
    )
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25])
    parser.add_argument("--block-size", type=float, help="tokens, or below 1 a share of the window")
    parser.add_argument("--host-memory", type=float, default=0.0, help="GiB of the host")
    parser.add_argument("--quantize", choices=["nf4"], help="how weights are stored")
    records.add_shape(parser)
    parser.add_argument("--warmup", type=int, default=4096, help="tokens of a step before; 0: none")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if options.block_size is not None and options.block_size >= 1:
        options.block_size = int(options.block_size)
    return options


def worker(settings: dict) -> Callable[[str], dict]:
    import torch

    import lemo
    from common.models import (
        llama_config,
        random_llama,
        random_llama_in_4_bits,
        training_step,
        with_lora,
    )
    from common.timing import milliseconds
    from lemo.planner.plan import Plan
    from lemo.planner.request import Request
    from lemo.planner.shape import Adapters, shape_of
    from lemo.training.calibration import calibrated

    def answer(_: str) -> dict:
        device, tokens = torch.device(settings["device"]), settings["tokens"]
        on_gpu, limit = device.type == "cuda", round(settings["memory"] * GIB)
        shape = shape_of(llama_config(tokens or 1, settings["layers"], settings["shrink"]))
        rates = calibrated(shape, device, torch.bfloat16)
        names = ("keep", "host_memory", "block_size")
        elimination = lemo.LemoConfig(**{name: settings[name] for name in names})
        cap = None
        if on_gpu:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            # What the driver and the context hold is a part of what a GPU of this size has.
            context = settings["context"]
            context = total - free if context is None else round(context * GIB)
            cap = min(limit - context, free)
            torch.cuda.set_per_process_memory_fraction(cap / total)
        request = Request(
            shape,
            Adapters(RANK, frozenset(TARGETS), size=2),
            elimination.resolved(answers=False),
            rates,
            autocast=False,
            cuda=on_gpu,
            quantize=settings["quantize"],
        )
        usable = limit if cap is None else cap
        if tokens is None:
            tokens, plan = longest_plan(request, round(settings["share"] * usable))
            if plan is None:
                return {"refused": "not even 16 tokens fit"}
        else:
            plan = request.planner(tokens).plan(usable)
            if plan is None:
                return {"refused": request.advice(tokens, usable)}
        found: dict[str, Any] = {"tokens": tokens, "predicted_gib": round(plan.peak / GIB, 3)}
        found |= {"gpu": torch.cuda.get_device_name(device) if on_gpu else None}
        found |= {"kept_rows": max(request.planner(tokens).rows), "head_groups": plan.head_groups}
        found |= {"cap_gib": None if cap is None else round(cap / GIB, 3)}
        found |= {"predicted_host_gib": round(plan.host / GIB, 3)}
        found |= {"predicted_s": round(plan.seconds, 3)}
        actions = groupby(zip(plan.modes, plan.shares))
        found["modes"] = [[len([*each]), mode, round(share, 4)] for (mode, share), each in actions]
        # What was chosen is known before a step that takes minutes ends.
        print(found, file=sys.stderr, flush=True)
        try:
            return found | measured(request, plan, tokens)
        except RuntimeError as error:
            if reason(error) != OUT_OF_MEMORY:
                raise
            print(error, file=sys.stderr, flush=True)
            return found | {"failed": OUT_OF_MEMORY}

    def measured(request: Request, plan: Plan, tokens: int) -> dict:
        device = torch.device(settings["device"])
        on_gpu = device.type == "cuda"
        config = llama_config(tokens, settings["layers"], settings["shrink"])
        make = random_llama if settings["quantize"] is None else random_llama_in_4_bits
        model = with_lora(make(config, settings["device"]), RANK, TARGETS).train()
        elimination = request.elimination.model_copy(update=settings_of(plan))
        handle = lemo.enable(model, elimination)
        if plan.host:
            handle.path.forward.offload.pin(device)  # not a part of the step
        step = training_step(model)
        ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
        losses: list[torch.Tensor] = []
        if settings["warmup"]:
            step(ids[:, : settings["warmup"]])
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = milliseconds(lambda: losses.append(step(ids)), settings["device"]) / 1e3
        pool = handle.path.forward.offload.pool
        return {
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if on_gpu else None,
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if on_gpu else None,
            "host_gib": 0.0 if pool is None else round(pool.most / GIB, 3),
            "step_s": round(seconds, 3),
            "loss": losses[-1].item(),
        }

    return answer


def main() -> int:
    options, failed = parse_arguments(), False
    names = ("layers", "warmup", "device", "shrink", "memory", "host_memory", "quantize")
    common = {name: getattr(options, name) for name in (*names, "block_size", "context")}
    lengths = [{"tokens": tokens} for tokens in options.tokens]
    if options.longest:
        lengths = [{"tokens": None, "share": share} for share in options.longest]
    for keep in options.keep:
        for length in lengths:
            settings = common | length | {"keep": keep}
            result = measure(__file__, settings, ENVIRONMENT)
            if result is None or "refused" in result:
                print(f"{length} keep {keep:<8} {result or 'failed'}", flush=True)
                failed = True
                continue
            shape = {"model": "Llama-3-8B shape", **settings, "tokens": result.pop("tokens")}
            row = {"bench": "longest", "shape": shape | {"lora_rank": RANK}, **result}
            # The card is known already: this process leaves it alone.
            provenance = records.provenance(options.commit, "cpu") | {"gpu": result["gpu"]}
            records.append(options.output, [row | provenance])
            print(f"{shape['tokens']:>8} keep {keep:<8} {result}", flush=True)
            if options.longest and "failed" not in result:
                break
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main, worker)
