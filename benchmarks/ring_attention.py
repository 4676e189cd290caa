"""PyTorch's own context parallelism beside lemo's, at the same work: everything is kept.

    torchrun --nproc_per_node 2 benchmarks/ring_attention.py --tokens 131072

Measured: seconds of a training step (forward, backward, AdamW) of the Llama-3-8B shape with random
bf16 weights, LoRA of rank 8 on q, k, v and o, every layer recomputed, on one sequence that all
processes share out; the highest memory of a process; the loss of the first step. The processes do
both in turn:

    lemo       lemo.ContextParallel with keep 1
    torch      torch.distributed.tensor.experimental.context_parallel, which accelerate's
               ParallelismConfig(cp_size=...) and TRL call, around the layers of Transformers with
               torch's checkpoint; the head's loss in chunks of rows, as TRL's is. Without those
               chunks the logits alone would take 31 GiB of each of two GPUs.

DeepSpeed's Ulysses (ALST) is not here: DeepSpeed has to be installed, and compiles when it starts.

Appends a row of bench "ring" to --output: gpus, tokens, step_s and range (lemo), peak_gib, loss,
and peer_s, peer_range, peer_gib, peer_loss. On the CPU torch's context parallelism has no kernels,
so --device cpu takes one process alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import multi_gpu
from common import models, records
from common.timing import summary
from multi_gpu import RANK, TARGETS, Steps

ROWS = 4096  # of a chunk of the loss
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "multi_gpu.jsonl")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--rotate", default="allgather", choices=["allgather", "alltoall"])
    parser.add_argument("--backend", default="flash", choices=[*BACKENDS], help="torch's kernels")
    parser.add_argument("--repeat-heads", action="store_true", help="of keys, before they are sent")
    records.add_shape(parser)
    parser.add_argument("--reps", type=int, default=2, help="steps that count, behind one")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args(arguments)


def loss_of_rows(model: Any, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """The sum of the loss over rows, by the layers of a causal LM of Llama's kind.

    Args:
        model: with LoRA or without.
        ids, positions, targets: [1, r] int64; targets are shifted, -100 does not count.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.model.embed_tokens(ids)
    rotations = base.model.rotary_emb(hidden, positions)
    for layer in base.model.layers:
        given = {"attention_mask": None, "position_embeddings": rotations}
        hidden = checkpoint(layer, hidden, use_reentrant=False, **given)
    hidden = base.model.norm(hidden)[0]

    def of_chunk(rows: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(base.lm_head(rows).float(), wanted, reduction="sum")

    chunks = zip(hidden.split(ROWS), targets[0].split(ROWS))
    return torch.stack([checkpoint(of_chunk, *each, use_reentrant=False) for each in chunks]).sum()


def torch_step(model: Any, ids: Tensor, options: argparse.Namespace) -> Callable[[], Tensor]:
    """A forward and backward pass with PyTorch's context parallelism; it gives the loss."""
    size = dist.get_world_size()
    trainable = [p for p in model.parameters() if p.requires_grad]

    def of_rows(ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of_rows(model, ids, positions, targets) / (options.tokens - 1)
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        positions = torch.arange(options.tokens, device=ids.device)[None]
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        buffers = [ids.clone(), positions, targets]
        if size == 1:
            return of_rows(*buffers)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        mesh = init_device_mesh(ids.device.type, (size,), mesh_dim_names=("cp",))
        set_rotate_method(options.rotate)
        cutting = context_parallel(
            mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)
        )
        with cutting, sdpa_kernel(BACKENDS[options.backend]):
            loss = of_rows(*buffers)
        # One message for all; each has the part of its own rows.
        gradients = torch._utils._flatten_dense_tensors([p.grad for p in trainable])
        dist.all_reduce(gradients)
        parts = torch._utils._unflatten_dense_tensors(gradients, [p.grad for p in trainable])
        for parameter, gradient in zip(trainable, parts):
            parameter.grad = gradient
        dist.all_reduce(loss)
        return loss

    return step


def lemo_step(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """The same with lemo."""
    import lemo

    context = lemo.ContextParallel() if dist.get_world_size() > 1 else None
    lemo.enable(model, lemo.LemoConfig(keep=1.0, recompute="layer"), context)

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    return step


def measured(kind: str, options: argparse.Namespace, device: torch.device) -> Steps:
    """Steps of "lemo" or "torch"."""
    config = models.llama_config(options.tokens, options.layers, options.shrink)
    model = models.with_lora(models.random_llama(config, str(device)), RANK, TARGETS).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, options.tokens), generator=generator).to(device)
    step = lemo_step(model, ids) if kind == "lemo" else torch_step(model, ids, options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times, losses = [], []
    for number in range(1 + options.reps):
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        multi_gpu.synchronize(device, True)
        start = time.perf_counter()
        loss = step()
        optimizer.step()
        optimizer.zero_grad()
        multi_gpu.synchronize(device, True)
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return multi_gpu.highest(Steps(times[1:], peak / multi_gpu.GIB, 0.0, losses[0]), device)


def main() -> None:
    options = parse_arguments()
    device = multi_gpu.place(options.device)
    if options.repeat_heads:
        from transformers.integrations import sdpa_attention

        sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    found = {}
    for kind in ("lemo", "torch"):
        found[kind] = measured(kind, options, device)
        multi_gpu.free(device)
    if dist.get_rank() == 0:
        write(options, found["lemo"], found["torch"])
    dist.destroy_process_group()


def write(options: argparse.Namespace, ours: Steps, peer: Steps) -> None:
    times, theirs = summary(ours.seconds), summary(peer.seconds)
    names = ("tokens", "rotate", "backend", "repeat_heads", "layers", "shrink", "reps")
    row = {"bench": "ring", "shape": "Llama-3-8B", "gpus": dist.get_world_size(), "keep": 1.0}
    row |= {"step_s": round(times.median, 4), "range": times.range}
    row |= {"peak_gib": round(ours.peak_gib, 2), "loss": round(ours.loss, 5)}
    row |= {"peer_s": round(theirs.median, 4), "peer_range": theirs.range}
    row |= {"peer_gib": round(peer.peak_gib, 2), "peer_loss": round(peer.loss, 5)}
    row |= {name: getattr(options, name) for name in names}
    records.append(options.output, [row | records.provenance(options.commit, options.device)])
    print(
        f"{row['gpus']} GPUs, {options.tokens} tokens: lemo {row['step_s']} s and "
        f"{row['peak_gib']} GiB, loss {row['loss']}; torch {row['peer_s']} s and "
        f"{row['peer_gib']} GiB, loss {row['peer_loss']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
