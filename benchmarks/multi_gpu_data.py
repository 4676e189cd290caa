"""Training steps of several GPUs with sequences of their own: whole weights, or sharded ones.

    torchrun --nproc_per_node N benchmarks/multi_gpu_data.py --output FILE.jsonl
        [--tokens 32768] [--keep 0.5] [--recompute layer] [--shard] [--no-peer]

Measured: tokens of all processes in a second, and the highest memory of a process, of the
Llama-3-8B shape with random bf16 weights and LoRA of rank 8 on q, k, v and o, one sequence in each
process; gradients are averaged by DDP, or with --shard by FSDP2. Against: the first process alone,
before the others begin. The ratio is what N GPUs do of one's work. --no-peer leaves the peer out,
for weights that do not fit one GPU.

    torchrun --nproc_per_node 2 benchmarks/multi_gpu_data.py --device cpu --shrink 32 --layers 2
        --tokens 256 --reps 1 --output /dev/null

tries everything on the CPU with a small model; such times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import records

RANK, TARGETS = 8, ["q_proj", "k_proj", "v_proj", "o_proj"]


def parse_arguments() -> argparse.Namespace:
    parser = records.parser(__doc__, records.BUILD / "multi_gpu_data.jsonl")
    parser.add_argument("--tokens", type=int, default=32768, help="of a sequence")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--recompute", default="layer")
    parser.add_argument("--shard", action="store_true", help="FSDP2 in place of DDP")
    parser.add_argument("--no-peer", action="store_true", help="no steps of one process alone")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divides the sizes of the model")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def seconds_of_steps(options: argparse.Namespace, device: str, wrap: Callable) -> tuple[float, int]:
    """(median seconds of a step, highest allocated bytes) of this process."""
    import torch

    import lemo
    from common.models import llama_config, random_llama, with_lora

    config = llama_config(options.tokens, options.layers, options.shrink)
    model = with_lora(random_llama(config, device), RANK, TARGETS).train()
    lemo.enable(model, lemo.LemoConfig(keep=options.keep, recompute=options.recompute))
    model = wrap(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    ids = torch.randint(0, config.vocab_size, (1, options.tokens), device=device)
    on_gpu = device.startswith("cuda")
    times: list[float] = []
    for step in range(options.warmup + options.reps):
        if step == options.warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return median(times[options.warmup :]), peak


def shared(model: Any, options: argparse.Namespace, device: str) -> Any:
    """The model in all processes: sharded, or whole in each of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if not options.shard:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.partition(":")[0], (int(os.environ["WORLD_SIZE"]),))
    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(base.model.embed_tokens, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    options = parse_arguments()
    import torch
    from torch import distributed

    rank, device = int(os.environ["LOCAL_RANK"]), options.device
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    count = distributed.get_world_size()
    alone = None
    if rank == 0 and not options.no_peer:
        alone, _ = seconds_of_steps(options, device, lambda model: model)
    distributed.barrier()
    seconds, peak = seconds_of_steps(options, device, lambda m: shared(m, options, device))
    found = torch.tensor([seconds, peak], dtype=torch.float64, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    seconds, peak = found.tolist()
    if rank == 0:
        shape = {"tokens": options.tokens, "layers": options.layers, "shrink": options.shrink}
        shape |= {"keep": options.keep, "recompute": options.recompute, "processes": count}
        row = records.figure(
            "fsdp step" if options.shard else "data parallel step",
            shape,
            "tokens/s",
            count * options.tokens / seconds,
            None if alone is None else "one process",
            None if alone is None else options.tokens / alone,
            digits=1,
            seconds=round(seconds, 4),
            peak_gib=round(peak / 2**30, 2),
        )
        records.append(Path(options.output), [row | records.provenance(options.commit, device)])
        records.show(row)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
