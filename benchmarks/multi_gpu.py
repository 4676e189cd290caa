"""Training steps on several GPUs of one host, beside one of them alone.

    torchrun --nproc_per_node 2 benchmarks/multi_gpu.py context [--tokens 131072] [--keep 0.5]

context: one sequence whose kept rows all processes share out, in a model of Llama-3-8B's shape with
random weights and LoRA. Measured: the median time of forward and backward, with the mean of the
gradients, and the highest memory of a process. Against: the first process alone with the same rows,
where it has the memory for them. Beside it stands what a layer exchanges in bytes, computed.

Runs with NCCL on GPUs, or with gloo on CPUs (--device cpu, with --shrink and few tokens).
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.distributed as dist

from common import models, records
from common.timing import Times, summary

WARM_UP = 2


def parse_arguments() -> argparse.Namespace:
    parser = records.parser(__doc__, records.BUILD / "multi_gpu.jsonl")
    parser.add_argument("bench", choices=["context"])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divides the sizes of a layer")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--recompute", default="selective")
    parser.add_argument("--visible-keys", default="kept", choices=["kept", "computed"])
    parser.add_argument("--head-groups", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA, on every linear layer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    device = place(options.device)
    group = dist.new_group(backend="gloo")  # to wait for each other without a GPU
    model, ids = made(options, device)
    for keep in options.keep:
        shared = step_times(options, model, ids, keep, group)
        alone, failure = None, [None]
        if dist.get_rank() == 0:
            try:
                alone = step_times(options, model, ids, keep, None)
            except torch.OutOfMemoryError:
                failure = ["out of memory"]
        dist.monitored_barrier(group)
        if dist.get_rank() == 0:
            write(options, keep, shared, alone, failure[0])
    dist.destroy_process_group()


def place(kind: str) -> torch.device:
    """This process's device, in a group of all of them."""
    if kind == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    dist.init_process_group("nccl")
    device = torch.device("cuda", dist.get_node_local_rank(0))
    torch.cuda.set_device(device)
    return device


def made(options: argparse.Namespace, device: torch.device):
    """The same model and the same window in every process."""
    torch.manual_seed(0)
    config = models.llama_config(options.tokens, options.layers, options.shrink)
    base = models.random_llama(config, str(device))
    model = models.with_lora(base, options.rank, "all-linear").train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, options.tokens), generator=generator)
    return model, ids.to(device)


def step_times(
    options: argparse.Namespace, model, ids: torch.Tensor, keep: float, group
) -> tuple[Times, float]:
    """Seconds of a step, and the highest memory of this process in GiB (0 on the CPU).

    Args:
        group: where the processes wait for each other; None: this one trains alone.
    """
    import lemo

    config = lemo.LemoConfig(
        keep=keep, recompute=options.recompute, visible_keys=options.visible_keys
    )
    context = None
    if group is not None:
        context = lemo.ContextParallel(head_groups=options.head_groups)
    handle = lemo.enable(model, config, context)
    try:
        times = [one_step(model, ids, handle, n, group) for n in range(WARM_UP + options.repeats)]
    finally:
        handle.remove()
        model.zero_grad()
    return summary(times[WARM_UP:]), peak(ids.device)


def one_step(model, ids: torch.Tensor, handle, number: int, group) -> float:
    handle.begin_step(number, 10**6)
    model.zero_grad()
    if number == WARM_UP and ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(ids.device)
    if group is not None:
        dist.monitored_barrier(group)
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    synchronize(ids.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


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


def write(options, keep: float, shared, alone, failure: str | None) -> None:
    names = ("tokens", "layers", "shrink", "recompute", "visible_keys", "head_groups", "rank")
    shape = {name: getattr(options, name) for name in names}
    shape |= {"keep": keep, "processes": dist.get_world_size(), "device": options.device}
    row = records.figure(
        "context parallel step",
        shape,
        "s",
        shared[0].median,
        "one process",
        None if alone is None else alone[0].median,
        range=shared[0].range,
        peer_range=None if alone is None else alone[0].range,
        gib=round(shared[1], 2),
        peer_gib=None if alone is None else round(alone[1], 2),
        peer_failure=failure,
        layer_bytes=exchanged(options, keep),
    )
    records.append(options.output, [row | records.provenance(options.commit, options.device)])
    records.show(row, f"keep {keep:<4} ")


if __name__ == "__main__":
    main()
