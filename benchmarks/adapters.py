"""Steps with LoRA of every usual kind, of a small model on one GPU, beside Transformers and PEFT.

    python benchmarks/adapters.py [--tokens 16384] [--keep 0.25] [--kinds bf16 fp32 dropout dora]
        [--graphs off auto]

Measured: milliseconds and peak memory of one step (forward, backward) of the SmolLM2-135M shape,
random bf16 weights, LoRA of rank 16 on all linear layers, batch 1, no autocast, nothing recomputed.
Against: the same model without lemo, measured after it in one process. Kinds: adapters in
bf16; in fp32, which is PEFT's default; in fp32 with a dropout of .05; DoRA in fp32. "graphs" of a
shape is the setting cuda_graphs; what graphs hold counts as activations.
"host" of a record is the milliseconds for which the host is busy with a step.

Appends two figures for each kind to --output.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import lemo
from common import records
from common.timing import Times, milliseconds, summary
from small_models import SHAPES, host_milliseconds

SMOLLM2 = SHAPES["135M"]
RANK = 16
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {},
    "dropout": {"lora_dropout": 0.05},
    "dora": {"use_dora": True},
}
PEER = "Transformers + PEFT"
WARM_UP = 4
GIB = 2**30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "h200_finetune.jsonl")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--graphs", nargs="+", default=["off"], choices=["off", "auto", "on"])
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--reps", type=int, default=7, help="steps that count")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


def make_model(options: argparse.Namespace, kind: str) -> torch.nn.Module:
    config = LlamaConfig(
        **SMOLLM2 | {"num_hidden_layers": options.layers},
        max_position_embeddings=options.tokens,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        base = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        **KINDS[kind],
    )
    return get_peft_model(base, lora, autocast_adapter_dtype=kind != "bf16").train()


class Measured(NamedTuple):
    """Milliseconds of a step, GiB above the weights, and milliseconds of the host."""

    times: Times
    peak: float
    host: float


def measured(options: argparse.Namespace, kind: str, graphs: str | None) -> Measured:
    """What a step takes with this setting of graphs; None: without lemo."""
    model, handle = make_model(options, kind), None
    if graphs is not None:
        config = lemo.LemoConfig(keep=options.keep, recompute="none", cuda_graphs=graphs)
        handle = lemo.enable(model, config)
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, options.tokens), device=options.device)
    cuda = options.device.startswith("cuda")
    weights = torch.cuda.memory_allocated() if cuda else 0

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(WARM_UP):
        step()
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = summary([milliseconds(step, options.device) for _ in range(options.reps)], digits=2)
    peak = (torch.cuda.max_memory_allocated() - weights) / GIB if cuda else 0.0
    if handle is not None and handle.graphs is not None:
        peak += handle.graphs.bytes / GIB
    return Measured(times, peak, host_milliseconds(step, options.device))


def figures(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """Two figures for each setting of graphs."""
    found, peer = [], None
    for graphs in options.graphs:
        ours = measured(options, kind, graphs)
        peer = measured(options, kind, None) if peer is None else peer
        found += compared(options, kind, graphs, ours, peer)
    return found


def compared(
    options: argparse.Namespace, kind: str, graphs: str, ours: Measured, peer: Measured
) -> list[dict[str, Any]]:
    shape = {
        "model": "SmolLM2-135M shape",
        "layers": options.layers,
        "tokens": options.tokens,
        "keep": options.keep,
        "adapters": kind,
        "lora_rank": RANK,
        "lora_targets": "all-linear",
        "recompute": "none",
        "graphs": graphs,
    }
    return [
        records.figure(
            "adapters step",
            shape,
            "ms",
            ours.times.median,
            PEER,
            peer.times.median,
            range=ours.times.range,
            peer_range=peer.times.range,
            host=ours.host,
            peer_host=peer.host,
            reps=options.reps,
        ),
        records.figure("adapters activations", shape, "GiB", ours.peak, PEER, peer.peak),
    ]


def main() -> None:
    options = parse_arguments()
    provenance = records.provenance(options.commit, options.device)
    for kind in options.kinds:
        found = [figure | provenance for figure in figures(options, kind)]
        records.append(options.output, found)
        for figure in found:
            records.show(figure, f"{kind:<8} {figure['shape']['graphs']:<4} ")


if __name__ == "__main__":
    main()
