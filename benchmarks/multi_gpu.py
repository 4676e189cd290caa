"""Training steps on several GPUs of one host, beside one of them alone.

    torchrun --nproc_per_node 2 benchmarks/multi_gpu.py context --tokens 131072 --keep 1 0.5
    torchrun --nproc_per_node 2 benchmarks/multi_gpu.py data fsdp --tokens 32768 --keep 0.5

context: one sequence, whose kept rows all processes share out. data: a sequence for each process,
whole weights, gradients averaged by DDP. fsdp: the same with weights that FSDP2 shards.

Measured: median seconds of a training step (forward, backward, AdamW) of the Llama-3-8B shape,
random bf16 weights and LoRA of rank 8 on q, k, v and o; the highest memory of a process; the loss
of the first step. Against: the first process alone with the sequence that it has in the group, or
with the whole one in "context", unless --no-one-gpu leaves that out.

Appends one row for each bench and share to --output: gpus, tokens (of a sequence), keep, step_s,
one_gpu_s and their ranges, peak_gib, one_gpu_gib, weights_gib (of one GPU), loss, one_gpu_loss. In
"context" also layer_bytes: what a process receives in a layer, computed.

Runs with NCCL on GPUs, or with gloo on CPUs (--device cpu, with --shrink and few tokens).
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from common import models, records
from common.timing import summary

RANK, TARGETS = 8, ["q_proj", "k_proj", "v_proj", "o_proj"]
GIB = 2**30
# Longer than any step of one process, for which the others wait.
PATIENCE = timedelta(minutes=15)


@dataclass(frozen=True)
class Steps:
    """What the steps of one process or of a group took; `loss` is that of the first."""

    seconds: list[float]
    peak_gib: float
    weights_gib: float
    loss: float


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "multi_gpu.jsonl")
    parser.add_argument("bench", nargs="+", choices=["context", "data", "fsdp"])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--recompute", default="layer")
    parser.add_argument("--visible-keys", default="kept", choices=["kept", "computed"])
    parser.add_argument("--head-groups", type=int, nargs="+", default=[4], help="of context")
    records.add_shape(parser)
    records.add_repeats(parser)
    parser.add_argument("--no-one-gpu", action="store_true", help="no steps of one process alone")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    device = place(options.device)
    waiting = dist.new_group(backend="gloo", timeout=PATIENCE)  # to wait without a GPU
    for bench in options.bench:
        for keep in options.keep:
            alone = None
            if dist.get_rank() == 0 and not options.no_one_gpu:
                alone = steps_alone(options, keep, device)
            free(device)
            dist.monitored_barrier(waiting, PATIENCE)
            for groups in options.head_groups if bench == "context" else options.head_groups[:1]:
                together = highest(measured(options, bench, keep, device, groups), device)
                if dist.get_rank() == 0:
                    write(options, bench, keep, groups, together, alone)
                free(device)
    dist.destroy_process_group()


def place(kind: str) -> torch.device:
    """This process's device, in a group of all of them."""
    if kind == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_node_local_rank(0))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def steps_alone(options: argparse.Namespace, keep: float, device: torch.device) -> Steps | None:
    """Steps of this process alone; None where it has not the memory for them."""
    try:
        return measured(options, None, keep, device)
    except torch.OutOfMemoryError:
        return None


def free(device: torch.device) -> None:
    """Gives back a model that nothing but its own cycles refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measured(
    options: argparse.Namespace,
    bench: str | None,
    keep: float,
    device: torch.device,
    head_groups: int = 1,
) -> Steps:
    """Steps of this process with the others; bench None: alone."""
    import lemo

    config = models.llama_config(options.tokens, options.layers, options.shrink)
    model = models.with_lora(models.random_llama(config, str(device)), RANK, TARGETS).train()
    elimination = lemo.LemoConfig(
        keep=keep, recompute=options.recompute, visible_keys=options.visible_keys
    )
    context = None
    if bench == "context":
        context = lemo.ContextParallel(head_groups=head_groups)
    handle = lemo.enable(model, elimination, context)
    wrapped = in_all_processes(model, bench, device)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    # In "context" all processes have the same sequence.
    generator = torch.Generator().manual_seed(dist.get_rank() if bench != "context" else 0)
    ids = torch.randint(config.vocab_size, (1, options.tokens), generator=generator).to(device)
    on_gpu = device.type == "cuda"
    weights = torch.cuda.memory_allocated() if on_gpu else 0
    times, losses = [], []
    for number in range(options.warmup + options.reps):
        if number == options.warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        synchronize(device, bench is not None)
        handle.begin_step(number, 10**6)
        start = time.perf_counter()
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device, bench is not None)
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Steps(times[options.warmup :], peak / GIB, weights / GIB, losses[0])


def in_all_processes(model: Any, bench: str | None, device: torch.device) -> nn.Module:
    """The model as this bench runs it: sharded, with averaged gradients, or as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if bench == "data":
        return DistributedDataParallel(model)
    if bench != "fsdp":
        return model
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(base.model.embed_tokens, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def synchronize(device: torch.device, together: bool) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if together:
        dist.barrier()


def highest(steps: Steps, device: torch.device) -> Steps:
    """A group's steps end with its last process; memory is that of the process with the most."""
    found = torch.tensor([*steps.seconds, steps.peak_gib], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    *seconds, peak = found.tolist()
    return Steps(seconds, peak, steps.weights_gib, steps.loss)


def exchanged(options: argparse.Namespace, keep: float) -> int:
    """Bytes that a process receives in a layer, of forward and backward (docs/MULTI_GPU.md)."""
    config = models.llama_config(options.tokens, options.layers, options.shrink)
    computed = options.visible_keys == "computed"
    # Quarters of the window are kept, as many as the share is rounded up to.
    rows = options.tokens if computed else options.tokens * math.ceil(4 * keep - 1e-9) / 4
    size = config.hidden_size // config.num_attention_heads
    width = 2 * config.num_key_value_heads * size * torch.bfloat16.itemsize
    processes = dist.get_world_size()
    gathers = 3 + (options.recompute == "layer") + computed
    return int(gathers * rows * width * (processes - 1) / processes)


def write(
    options: argparse.Namespace,
    bench: str,
    keep: float,
    head_groups: int,
    together: Steps,
    alone: Steps | None,
) -> None:
    times = summary(together.seconds)
    row: dict[str, Any] = {
        "bench": bench,
        "shape": "Llama-3-8B",
        "gpus": dist.get_world_size(),
        "tokens": options.tokens,
        "keep": keep,
        "step_s": round(times.median, 4),
        "range": times.range,
        "one_gpu_s": None,
        "one_gpu_range": None,
        "peak_gib": round(together.peak_gib, 2),
        "one_gpu_gib": None,
        "weights_gib": None,
        "loss": round(together.loss, 5),
        "one_gpu_loss": None,
    }
    if alone is not None:
        peer = summary(alone.seconds)
        row |= {"one_gpu_s": round(peer.median, 4), "one_gpu_range": peer.range}
        row |= {"one_gpu_gib": round(alone.peak_gib, 2), "one_gpu_loss": round(alone.loss, 5)}
        row |= {"weights_gib": round(alone.weights_gib, 2)}
    names = ("layers", "shrink", "recompute", "visible_keys", "reps")
    row |= {name: getattr(options, name) for name in names}
    if bench == "context":
        row |= {"head_groups": head_groups, "layer_bytes": exchanged(options, keep)}
    records.append(options.output, [row | records.provenance(options.commit, options.device)])
    print(
        f"{bench:<8} {row['gpus']} GPUs, {options.tokens} tokens, keep {keep:<5} "
        f"head groups {row.get('head_groups')}: "
        f"{row['step_s']} s and {row['peak_gib']} GiB; one: {row['one_gpu_s']} s and "
        f"{row['one_gpu_gib']} GiB; loss {row['loss']} and {row['one_gpu_loss']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
