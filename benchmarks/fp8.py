"""Steps of the Llama-3-8B shape whose frozen weights multiply in 8 bits, beside the same in bf16.

    python benchmarks/fp8.py --output FILE.jsonl [--tokens 32768] [--variants 1-layer 0.25-none]
        [--products fp8 fp8_fast]

Measured: milliseconds of a step and peak memory with products "fp8" or "fp8_fast". Against:
products "dtype", which is bf16, in the same process: they take turns, each enabled anew. A variant
is KEEP-RECOMPUTE as in gpu_finetune.py, whose records these are, with `products` in their shape.
Takes about half a minute a variant. Random weights: right for time and memory, meaningless for
quality.

    python benchmarks/fp8.py --device cpu --shrink 32 --layers 2 --tokens 512 --output /dev/null

tries everything on the CPU with a small model; such times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch

import lemo
from common import records
from common.models import llama_config, random_llama, training_step, with_lora
from common.timing import Times, milliseconds, summary
from gpu_finetune import GIB, RANK, TARGETS, config_of, recorded

PRODUCTS = ("fp8", "fp8_fast")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.BUILD / "fp8.jsonl")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument(
        "--variants", nargs="+", default=["1-layer", "1-selective", "0.25-layer", "0.25-none"]
    )
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=["fp8"])
    records.add_shape(parser)
    parser.add_argument("--rounds", type=int, default=2, help="turns of either")
    parser.add_argument("--reps", type=int, default=3, help="steps of a turn that count")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


def turn(model: torch.nn.Module, ids: torch.Tensor, options: Any, config: Any) -> dict[str, Any]:
    """Times and memory of some steps after one that makes what is made once."""
    cuda = options.device.startswith("cuda")
    handle, step = lemo.enable(model, config), partial(training_step(model), ids)
    first = step().item()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(step, options.device) for _ in range(options.reps)]
    peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
    left = handle.unquantised_products()
    handle.remove()
    return {"times": times, "peak": peak, "loss": first, "left": left}


def measure(model: torch.nn.Module, options: argparse.Namespace, variant: str) -> list[dict]:
    """The records of a variant."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, options.tokens), device=options.device)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("dtype", *options.products)}
    for _ in range(options.rounds):
        for name in found:
            config = config_of(variant, None).model_copy(update={"products": name})
            found[name].append(turn(model, ids, options, config))
    times = {
        name: summary([ms for each in turns for ms in each["times"]], digits=1)
        for name, turns in found.items()
    }
    peaks = {name: max(each["peak"] for each in turns) for name, turns in found.items()}
    losses = {name: statistics.fmean(each["loss"] for each in found[name]) for name in found}
    print(f"{variant}: losses {losses}", flush=True)
    rows = []
    for name in options.products:
        left = found[name][-1]["left"]
        print(f"{variant}: left in bf16 with {name}: {left or 'none'}", flush=True)
        rows += compared(options, variant, name, times, peaks, len(left))
    return rows


def compared(
    options: argparse.Namespace,
    variant: str,
    name: str,
    times: dict[str, Times],
    peaks: dict[str, float],
    left: int,
) -> list[dict]:
    """The records of some products beside bf16's."""
    shape = {
        "model": "Llama-3-8B shape",
        "tokens": options.tokens,
        "layers": options.layers,
        "lora_rank": RANK,
        "lora_targets": ",".join(name.removesuffix("_proj") for name in TARGETS),
        "dtype": "bfloat16",
        **recorded(variant),
        "products": name,
    }
    ours, peer = times[name], times["dtype"]
    return [
        records.figure(
            *("finetune step", shape, "ms", round(ours.median, 1)),
            *("products in bf16", round(peer.median, 1)),
            range=ours.range,
            reps=options.rounds * options.reps,
            peer_range=peer.range,
            left=left,
        ),
        records.figure(
            *("finetune peak memory", shape, "GiB", round(peaks[name], 2)),
            *("products in bf16", round(peaks["dtype"], 2)),
            range=[round(peaks[name], 2)] * 2,
        ),
    ]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    common = records.provenance(options.commit, options.device)
    config = llama_config(options.tokens, options.layers, options.shrink)
    model = with_lora(random_llama(config, options.device), RANK, TARGETS).train()
    for variant in options.variants:
        for row in measure(model, options, variant):
            records.append(options.output, [row | common])
            shape = row["shape"]
            records.show(row, f"{shape['tokens']:>7} keep {shape['keep']:<5} {variant:<16} ")


if __name__ == "__main__":
    main()
