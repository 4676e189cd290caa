"""Training steps whose saved activations go to the host, in several ways.

    python benchmarks/offload.py [--tokens 65536] [--sets falling one] [--bytes 24]
        [--ways none uniform sensitive torch unsloth] [--recompute selective] [--host-memory 100]

Measured: optimizer steps of the Llama-3-8B shape with random bf16 weights and LoRA on q, k, v and
o, batch 1, one process for each way; random weights are right for time and memory, meaningless for
quality. Sets of kept rows:

    one      each layer keeps the same quarter of the tokens
    falling  each layer has a set of its own: all tokens in the first eight layers, then a half, a
             quarter, an eighth
    turns    each layer has a set of its own: a half of the tokens, a quarter, a half, and so on.
             Little of what a layer stores hides behind a layer of fewer tokens
    far      the same with three quarters and a quarter
    pairs    the same with all of the tokens twice, and an eighth twice

Ways:

    none       nothing goes to the host; each layer stores what --recompute says
    uniform    the same share of each layer's bytes goes there, --bytes GiB in all
    sensitive  as many bytes, at most, from the layers that the planner chooses by their kept rows
               and the rate of the link
    torch      checkpoints of layers (recompute "layer" of lemo, whose inputs are what is saved),
               moved by PyTorch's own torch.autograd.graph.save_on_cpu(pin_memory=True)
    unsloth    the same checkpoints, moved as Unsloth's gradient checkpointing does: the input of
               each layer to pinned memory in forward, without waiting, and back when its backward
               pass begins
    whole      the same checkpoints, moved by lemo

Overlap is that of one more step under torch.profiler: the share of the time of copies between
device and host in which a kernel runs, too. Host bytes are what the pool, or the hooks, held at
most. Appends rows of bench "offload" to --output: step_s, step_s_range, peak_gib, host_gib, copy_s,
overlap, shares, loss (of the first step, the same in all ways of one set), and for lemo's own ways
predicted_s, predicted_gib and predicted_host_gib by rates calibrated here, and their link_gb_s and
launch_us, the host's time for an operation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from common import records
from common.planned import settings_of
from common.processes import measure, run_script
from gpu_finetune import ENVIRONMENT, RANK, TARGETS

GIB = 2**30
SETS = ("one", "falling", "turns", "far", "pairs")
WAYS = ("none", "uniform", "sensitive", "torch", "unsloth", "whole")
# Shares of the tokens that quarters of the layers keep, where sets differ.
FALLING = (1.0, 0.5, 0.25, 0.125)
# The same of layers in turn.
IN_TURN = {"turns": (0.5, 0.25), "far": (0.75, 0.25), "pairs": (1.0, 1.0, 0.125, 0.125)}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "memory.jsonl")
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536])
    parser.add_argument("--sets", nargs="+", default=["one", "falling"], choices=SETS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    modes = ["none", "selective", "layer"]
    parser.add_argument("--recompute", default="none", choices=modes, help="of lemo's own ways")
    parser.add_argument("--bytes", type=float, default=24.0, help="GiB that move, of lemo's ways")
    parser.add_argument("--host-memory", type=float, default=100.0, help="GiB of the pool, at most")
    records.add_shape(parser)
    records.add_repeats(parser)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


def keep_of(name: str, layers: int) -> float | list[float]:
    """The share of the tokens that each layer keeps."""
    if name == "one":
        return 0.25
    if name in IN_TURN:
        shares = IN_TURN[name]
        return [shares[index % len(shares)] for index in range(layers)]
    return [FALLING[len(FALLING) * index // layers] for index in range(layers)]


# --- one measurement: a process of its own


def worker(settings: dict) -> Callable[[str], dict]:
    import torch

    import lemo
    from common.models import llama_config, random_llama, with_lora
    from common.timing import milliseconds, summary
    from lemo.planner.request import Request
    from lemo.planner.shape import Adapters, shape_of
    from lemo.training.calibration import calibrated

    def plan_of(config: Any, elimination: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of lemo for a way, and what is predicted of it."""
        way, device, tokens = settings["way"], torch.device(settings["device"]), settings["tokens"]
        own_mode = way in ("none", "uniform", "sensitive")
        mode = settings["recompute"] if own_mode else "layer"
        shape = shape_of(config)
        rates = calibrated(shape, device, torch.bfloat16)
        adapters = Adapters(RANK, frozenset(TARGETS), size=2)
        on_gpu = device.type == "cuda"
        request = Request(shape, adapters, elimination, rates, autocast=False, cuda=on_gpu)
        planner, modes = request.planner(tokens), [mode] * shape.layers
        shares: Any = 1.0 if way == "whole" else 0.0
        if way in ("uniform", "sensitive"):
            kept = sum(each.kept for each in planner.of(modes, 0, 1).layers)
            size = min(settings["bytes"] * GIB, kept)
            shares = size / kept
            if way == "sensitive":
                shares = planner.sensitive_shares(mode, round(size))
        of_layers = shares if isinstance(shares, tuple) else (shares,) * shape.layers
        plan = planner.of(modes, 0, 1, of_layers)
        predicted = {
            "predicted_s": round(plan.seconds, 4),
            "predicted_gib": round(plan.peak / GIB, 3),
            "predicted_host_gib": round(plan.host / GIB, 3),
            "link_gb_s": round(rates.link / 1e9, 2),
            "launch_us": round(1e6 * rates.launch, 2),
        }
        if plan.host > settings["host_memory"] * GIB:
            raise ValueError(
                f"--host-memory: expected at least {plan.host / GIB:.1f}, got "
                f"{settings['host_memory']:g}"
            )
        chosen = settings_of(plan)
        # Hooks of others are not predicted.
        return chosen, {} if way in ("torch", "unsloth") else predicted

    def answer(_: str) -> dict:
        device, tokens = settings["device"], settings["tokens"]
        config = llama_config(tokens, settings["layers"], settings["shrink"])
        keep = keep_of(settings["set"], settings["layers"])
        own = isinstance(keep, list)
        elimination = lemo.LemoConfig(
            scorer="random",
            block_size=64,
            keep=0.25,
            layerwise={"keep": keep, "select_at": "all"} if own else {},
        )
        chosen, predicted = plan_of(config, elimination.resolved(answers=False))
        model = with_lora(random_llama(config, device), RANK, TARGETS).train()
        handle = lemo.enable(model, elimination.model_copy(update=chosen))
        ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
        parameters = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.startswith("cuda"))
        around = {"torch": on_cpu, "unsloth": moved_one_by_one}.get(settings["way"], nullcontext)
        losses, most = [], [0]

        def step() -> None:
            handle.begin_step(0, 1)
            with around(most):
                loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        times = []
        on_gpu = device.startswith("cuda")
        for repeat in range(settings["warmup"] + settings["reps"]):
            if repeat == settings["warmup"] and on_gpu:
                torch.cuda.reset_peak_memory_stats()
            most[0] = 0
            times.append(milliseconds(step, device))
        counted = summary(times[settings["warmup"] :], digits=1)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        pool = handle.path.forward.offload.pool
        shares = chosen["offload"] or 0.0
        return {
            "step_s": round(counted.median / 1e3, 4),
            "step_s_range": [round(each / 1e3, 4) for each in counted.range],
            "peak_gib": round(peak / GIB, 3),
            "host_gib": round((most[0] if pool is None else pool.most) / GIB, 3),
            "shares": [round(s, 4) for s in shares] if isinstance(shares, tuple) else shares,
            "loss": losses[0].item(),
            **predicted,
            **(overlap(step) if on_gpu else {}),
        }

    return answer


# --- what others do


@contextmanager
def on_cpu(most: list[int]) -> Iterator[None]:
    """PyTorch's own: what is saved goes to pinned memory of its own, and is waited for."""
    import torch

    inner = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: torch.Tensor) -> Any:
        packed = inner.pack_hook(tensor)
        most[0] += tensor.nbytes
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, inner.unpack_hook):
        yield


@contextmanager
def moved_one_by_one(most: list[int]) -> Iterator[None]:
    """What is saved goes to the host without waiting, on the stream that computes, and comes back
    there when it is needed: as Unsloth's gradient checkpointing moves inputs of layers."""
    import torch

    on_gpu = torch.cuda.is_available()

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.nbytes < 2**20:
            return tensor.detach() if not tensor.is_leaf else tensor
        most[0] += tensor.nbytes
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
        return tensor.device, there.copy_(tensor, non_blocking=True)

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, there = packed
        return there.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def overlap(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of copies between device and host in a step, and which share of them is hidden."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    copies, kernels = [], []
    for event in recorded.profiler.kineto_results.events():
        if "cuda" not in str(event.device_type()).lower():
            continue
        span = event.start_ns(), event.start_ns() + event.duration_ns()
        name = event.name()
        if "HtoD" in name or "DtoH" in name:
            copies.append(span)
        elif "Memcpy" not in name and "Memset" not in name:
            kernels.append(span)
    total = sum(end - start for start, end in copies)
    hidden = hidden_time(copies, joined(kernels))
    return {"copy_s": round(total / 1e9, 4), "overlap": round(hidden / total, 4) if total else None}


def joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same time as spans that do not overlap, ascending."""
    made: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = made[-1][0], max(end, made[-1][1])
        else:
            made.append((start, end))
    return made


def hidden_time(copies: list[tuple[int, int]], kernels: list[tuple[int, int]]) -> int:
    """The time of the copies in which a kernel runs; `kernels` as from `joined`."""
    hidden, first = 0, 0
    for start, end in sorted(copies):
        while first < len(kernels) and kernels[first][1] <= start:
            first += 1
        index = first
        while index < len(kernels) and kernels[index][0] < end:
            hidden += min(end, kernels[index][1]) - max(start, kernels[index][0])
            index += 1
    return hidden


# --- all measurements


def main() -> int:
    options = parse_arguments()
    names = ("layers", "warmup", "reps", "device", "shrink", "recompute", "bytes", "host_memory")
    common, rows = {name: getattr(options, name) for name in names}, []
    for tokens in options.tokens:
        for name in options.sets:
            for way in options.ways:
                settings = common | {"tokens": tokens, "set": name, "way": way}
                result = measure(__file__, settings, ENVIRONMENT)
                print(f"{tokens:>8} {name:<8} {way:<10} {result or 'failed'}", flush=True)
                if result is None:
                    continue
                shape = {"model": "Llama-3-8B shape", **settings, "lora_rank": RANK}
                row = {"bench": "offload", "shape": shape, **result}
                rows.append(row | records.provenance(options.commit, options.device))
                records.append(options.output, rows[-1:])
    return 0 if rows else 1


if __name__ == "__main__":
    run_script(main, worker)
