"""Time of fine-tuning steps of small models on one GPU, with and without CUDA graphs.

    python benchmarks/small_models.py --output FILE.jsonl [--models 28M 135M] [--keep 0.5 0.25]
        [--tokens 16384]

Measured: milliseconds of a step with lemo (forward, backward, fused AdamW), as the host and the GPU
together take: several steps in a row between two events. Against: the same step of dense LoRA by
Transformers and PEFT, in turns with it in the same process. Takes half a minute a model.

Random bf16 weights of the models' shapes, LoRA of rank 16 in bf16 on all linear layers, batch 1,
nothing recomputed: right for times, meaningless for quality. Blocks are quarters of the window,
drawn at random. "graphs" of a shape is the setting cuda_graphs; "host" of a record is the
milliseconds for which the host is busy with a step, "replays" the steps that were replayed, and
"graph_gib" the memory that stays with the graphs.

    python benchmarks/small_models.py --device cpu --tokens 256 --calls 1 --repeats 1 --shrink 8

tries everything on the CPU; such times mean nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lemo
from common import records
from common.models import training_step, with_lora
from common.timing import take_turns

SHAPES = {
    "28M": {
        "vocab_size": 16384,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 14,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
RANK = 16
HOST_STEPS = 5
GIB = 2**30

Step = Callable[[], None]


def parse_arguments(arguments: list[str] | None = None):
    parser = records.parser(__doc__, records.BUILD / "small_models.jsonl")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each contender")
    parser.add_argument("--calls", type=int, default=10, help="steps of a measurement")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide vocabulary and layers by it")
    return parser.parse_args(arguments)


def make_model(name: str, tokens: int, device: str, shrink: int):
    shape = dict(SHAPES[name])
    for field in ("vocab_size", "num_hidden_layers"):
        shape[field] = max(shape[field] // shrink, 1)
    config = LlamaConfig(
        **shape, max_position_embeddings=tokens, tie_word_embeddings=True, use_cache=False
    )
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return with_lora(base, RANK, "all-linear").train()


def make_step(options, name: str, config: lemo.LemoConfig | None) -> tuple[Step, Any]:
    """(a step, lemo's handle); without a config dense LoRA's."""
    model = make_model(name, options.tokens, options.device, options.shrink)
    handle = None if config is None else lemo.enable(model, config)
    vocabulary = model.get_base_model().config.vocab_size
    ids = torch.randint(0, vocabulary, (1, options.tokens), device=options.device)
    return partial(training_step(model), ids), handle


def contenders(options) -> dict[tuple[float, str] | None, lemo.LemoConfig | None]:
    """Settings by (keep, graphs); None: dense LoRA."""
    found: dict[tuple[float, str] | None, lemo.LemoConfig | None] = {None: None}
    for keep in options.keep:
        for graphs in ("off", "on"):
            found[keep, graphs] = lemo.LemoConfig(
                keep=keep, scorer="random", block_size=0.25, recompute="none", cuda_graphs=graphs
            )
    return found


def host_milliseconds(step: Step, device: str) -> float:
    """For which the host is busy with a step, where the device does not keep it waiting."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    taken = []
    for _ in range(HOST_STEPS):
        wait()
        start = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - start))
    wait()
    return round(min(taken), 2)


def measure(options, name: str) -> list[dict]:
    """The records of one model."""
    settings = contenders(options)
    made = {}
    for key, config in settings.items():
        made[key] = make_step(options, name, config)
        for _ in range(3):
            made[key][0]()
    times = dict(
        zip(
            made,
            take_turns(
                [step for step, _ in made.values()], options.device, options.repeats, options.calls
            ),
        )
    )
    dense = times[None]
    found = []
    for key, (step, handle) in made.items():
        if key is None:
            continue
        keep, graphs = key
        shape = {
            "model": name,
            "tokens": options.tokens,
            "lora_rank": RANK,
            "lora_targets": "all-linear",
            "dtype": "bfloat16",
            "keep": keep,
            "scorer": "random",
            "recompute": "none",
            "graphs": graphs,
        }
        found.append(
            records.figure(
                "small model step",
                shape,
                "ms",
                times[key].median,
                "lora",
                dense.median,
                range=times[key].range,
                peer_range=dense.range,
                host=host_milliseconds(step, options.device),
                peer_host=host_milliseconds(made[None][0], options.device),
                replays=0 if handle.graphs is None else handle.graphs.replays,
                graph_gib=0 if handle.graphs is None else round(handle.graphs.bytes / GIB, 2),
            )
        )
    return found


def main() -> int:
    options = parse_arguments()
    common = records.provenance(options.commit, options.device)
    for name in options.models:
        for row in measure(options, name):
            records.append(options.output, [row | common])
            shape = row["shape"]
            records.show(row, f"{name:>5} keep {shape['keep']:<5} graphs {shape['graphs']:<4} ")
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
