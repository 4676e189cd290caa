"""Time and memory of fine-tuning steps of the Llama-3-8B shape on one GPU, beside other methods.

    python benchmarks/gpu_finetune.py --output FILE.jsonl --tokens 16384 32768 65536
        [--variants 0.5-layer ...] [--peers NAME ...] [--peers-script SCRIPT]
    python benchmarks/gpu_finetune.py --profile 0.5-layer --tokens 32768

Measured: milliseconds of a step and peak memory of the same steps, for each variant of lemo.
Against: each peer at the same length. Takes one to two minutes a variant or peer and length.

Random bf16 weights, LoRA of rank 8 on q, k, v and o in bf16, fused AdamW, batch 1: right for time
and memory, meaningless for quality. A variant is KEEP-RECOMPUTE[-SCORER]: "1-layer",
"0.5-selective", "0.5-none-predictor". KEEP holds for attention and MLP of every layer. The scorers:

    (none)      lemo's defaults: quarters of the window, drawn at random, one kept set
    outside     the same, with a loss that the model does not compute: chunks of hidden states
                under checkpointing, as trainers do
    computed    blocks of 64 tokens, drawn at random; left-out rows are computed without gradients
    pooled      blocks of 64 tokens, scored in the first layer
    random      blocks of 64 tokens, drawn anew in every layer
    predictor   blocks of 64 tokens, scored by predictors in every layer: beside "random", what
                they cost
    predictors  the same, and the MLP has a kept set of its own
    lexical     labels on the last hundredth of the tokens; blocks of 64 tokens, scored by words
    attention   the same, and by a head of layer 7, so that eight layers run twice

Behind a variant: "+nf4": the base model's linear layers are stored in 4 bits (bitsandbytes), and
--memory caps the memory that PyTorch may take; "+groups8192": attention has shifted groups of so
many tokens; "+heads4": attention's backward works on so many groups of heads, one after the other.

A variant or peer may be bound to one length: "1-none@16384". Peers are modes of --peers-script,
which is called as SCRIPT MODE TOKENS --layers N --warmup N --reps N and prints one JSON object last
("step_ms", "step_ms_range", "peak_gib"). Without one there is a single peer, "checkpointing":
Transformers and PEFT with gradient checkpointing and a loss in chunks.

Every measurement is a process of its own; those of lemo and of the peers take turns. For each pair
of a variant and a peer at the same length two JSON lines are appended to --output, or for a variant
alone where no peer was measured.

    python benchmarks/gpu_finetune.py --device cpu --shrink 32 --layers 2 --tokens 512
        --variants 0.5-layer 0.5-layer-predictor --reps 1 --output /dev/null

tries everything on the CPU with a small model; such times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from common import records
from common.processes import last_object, measure, run_script

PEER = "checkpointing"
PEERS = ("lora@16384", "liger@16384", "sac@32768", "liger@32768", "sac@65536", "liger@65536")
VARIANTS = (
    "1-none@16384",
    "0.5-none@16384",
    "1-layer@32768",
    "0.5-selective@32768",
    "0.5-selective-predictor@32768",
    "1-layer@65536",
    "0.5-layer@65536",
    "0.5-layer-predictor@65536",
)
BLOCK_SIZE, LOSS_CHUNK = 64, 4096
OUTSIDE = "outside"
# Fields of LemoConfig that a scorer of a variant sets, those of its group `layerwise` apart.
SCORERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    OUTSIDE: ({}, {}),
    "computed": ({"scorer": "random", "visible_keys": "computed"}, {"select_at": "first"}),
    "pooled": ({"scorer": "pooled"}, {"select_at": "first"}),
    "random": ({"scorer": "random"}, {"select_at": "all"}),
    "predictor": ({"scorer": "predictor"}, {"select_at": "all"}),
    "predictors": ({"scorer": "predictor"}, {"select_at": "all", "keep_mlp": "keep"}),
    "lexical": ({"scorer": "lexical"}, {}),
    "attention": ({"scorer": "attention"}, {}),
}
# Scorers of answers, and the share of tokens that have labels then.
ANSWERS, LABELLED = ("lexical", "attention"), 0.01
HEADS = ((7, 0),)
RANK, TARGETS = 8, ["q_proj", "k_proj", "v_proj", "o_proj"]
# The fields of LemoConfig that stand in a record: what shapes a figure.
RECORDED = ("policy", "block_size", "keep_first", "keep_last", "keep", "keep_mlp", "dense_layers")
RECORDED += ("select_at", "scorer", "visible_keys", "recompute")
# The same where a variant sets them.
OPTIONAL = ("group_size", "head_groups")
# The allocator of all measurements: segments that grow, so that sizes that change waste nothing.
ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
GIB = 2**30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.BUILD / "gpu_finetune.jsonl")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--peers", nargs="*", metavar="NAME")
    parser.add_argument("--peers-script", type=Path)
    records.add_shape(parser)
    records.add_repeats(parser)
    parser.add_argument("--profile", metavar="VARIANT", help="show where one step's time goes")
    parser.add_argument("--memory", type=float, help="GiB that a variant in 4 bits may take")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if options.memory is not None and not options.device.startswith("cuda"):
        parser.error("--memory: expected a GPU, whose memory is capped, got --device cpu")
    if options.peers is None:
        options.peers = [PEER] if options.peers_script is None else list(PEERS)
    if options.peers_script is None and any(at(peer)[0] != PEER for peer in options.peers):
        parser.error(f"--peers: expected '{PEER}' without --peers-script")
    for variant in [*options.variants, *filter(None, [options.profile])]:
        try:
            config_of(at(variant)[0], "folder")
        except ValueError as error:
            parser.error(f"variant '{variant}': {error}")
    return options


def at(name: str) -> tuple[str, int | None]:
    """("1-layer", 16384) of "1-layer@16384"; the length is None where none is given."""
    name, _, tokens = name.partition("@")
    return name, int(tokens) if tokens else None


def config_of(variant: str, scored_by: str | None):
    """The LemoConfig of a variant; `scored_by` is the folder of predictors, or the file of heads,
    for those that score by them."""
    from lemo import LemoConfig

    keep, recompute, scorer = [*variant.partition("+")[0].split("-"), "defaults"][:3]
    if recompute not in ("none", "layer", "selective") or scorer not in SCORERS:
        raise ValueError(f"expected KEEP-none|layer|selective[-{'|'.join(SCORERS)}][+nf4]")
    fields, layerwise = map(dict, SCORERS[scorer])
    if fields:
        # Small blocks are the harder case: more of them to score and to gather.
        fields |= {"block_size": BLOCK_SIZE, "keep_last": 1}
        fields |= {"keep_first": 0 if scorer in ANSWERS else 1}
    if fields.get("scorer") == "predictor":
        fields["predictor"] = scored_by
    if fields.get("scorer") == "attention":
        fields["heads"] = scored_by
    for extra in extras(variant):
        if extra.startswith("groups"):
            layerwise["group_size"] = int(extra.removeprefix("groups"))
        elif extra.startswith("heads"):
            fields["head_groups"] = int(extra.removeprefix("heads"))
        elif extra != "nf4":
            raise ValueError(f"expected +nf4, +groupsN or +headsN, got +{extra}")
    if "keep_mlp" in layerwise:
        layerwise["keep_mlp"] = float(keep)
    return LemoConfig(keep=float(keep), recompute=recompute, layerwise=layerwise, **fields)


def recorded(variant: str) -> dict[str, Any]:
    """What a record's shape says of a variant, in one group of fields."""
    values = config_of(variant, "folder").resolved(has_answers(variant)).to_dict()
    values |= values.pop("layerwise") | {"keep": values["keep"]}
    shape = {name: values[name] for name in RECORDED}
    shape |= {name: values[name] for name in OPTIONAL if values[name] is not None}
    if is_outside(variant):
        shape |= {"loss": OUTSIDE}
    if has_answers(variant):
        shape |= {"labelled": LABELLED}
    if quantised_by(variant) is not None:
        shape |= {"quantize": quantised_by(variant)}
    return shape


def is_outside(variant: str) -> bool:
    return variant.partition("+")[0].endswith(f"-{OUTSIDE}")


def has_answers(variant: str) -> bool:
    return variant.partition("+")[0].endswith(ANSWERS)


def quantised_by(variant: str) -> str | None:
    """ "nf4", or None: weights in bf16."""
    return "nf4" if "nf4" in extras(variant) else None


def extras(variant: str) -> list[str]:
    """["nf4", "heads4"] of "1-layer+nf4+heads4"."""
    return variant.split("+")[1:]


# --- one measurement: a process of its own


def checkpointed_loss(base) -> Callable:
    """The loss as trainers compute it outside the model: logits of LOSS_CHUNK rows at a time."""
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    def of_chunk(x, labels):
        return cross_entropy(base.lm_head(x).float(), labels, reduction="sum")

    def loss(ids):
        hidden, labels = base.model(input_ids=ids).last_hidden_state[0, :-1], ids[0, 1:]
        chunks = zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK))
        losses = [checkpoint(of_chunk, x, y, use_reentrant=False) for x, y in chunks]
        return sum(losses) / labels.numel()

    return loss


def make_step(settings: dict) -> Callable:
    """step() runs one optimizer step and returns (loss, bytes allocated after forward)."""
    import torch

    from common.models import llama_config, random_llama, random_llama_in_4_bits, with_lora

    name, tokens, device = settings["name"], settings["tokens"], settings["device"]
    config = llama_config(tokens, settings["layers"], settings["shrink"])
    if quantised_by(name) is None:
        base = random_llama(config, device)
    else:
        if settings["memory"] is not None:
            share = settings["memory"] * GIB / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share)
        base = random_llama_in_4_bits(config, device)
    model = with_lora(base, RANK, TARGETS).train()
    if name == PEER:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        import lemo

        lemo.enable(model, config_of(name, settings["scored_by"]))
    labels = torch.randint(0, config.vocab_size, (1, tokens), device=device)
    ids = labels.clone()
    if has_answers(name):
        labels[:, : tokens - round(LABELLED * tokens)] = -100
    loss_of = lambda ids: model(input_ids=ids, labels=labels).loss  # noqa: E731
    if name == PEER or is_outside(name):
        loss_of = checkpointed_loss(base)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step():
        loss = loss_of(ids)
        held = torch.cuda.memory_allocated()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), held

    return step


def worker(settings: dict) -> Callable[[str], dict]:
    """Measures the steps of one variant or of the built-in peer."""
    import torch

    from common.timing import milliseconds, summary

    def answer(_: str) -> dict:
        step = make_step(settings)
        weights = torch.cuda.memory_allocated()
        times, results = [], []
        for repeat in range(settings["warmup"] + settings["reps"]):
            if repeat == settings["warmup"] and settings["device"] == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times.append(milliseconds(lambda: results.append(step()), settings["device"]))
        counted = summary(times[settings["warmup"] :], digits=1)
        return {
            "step_ms": round(counted.median, 1),
            "step_ms_range": counted.range,
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "after_forward_gib": round(results[-1][1] / GIB, 2),
            "weights_gib": round(weights / GIB, 2),
            "loss": round(results[-1][0].item(), 4),
        }

    return answer


def profile(settings: dict) -> None:
    """Shows where one step's time goes, kernel by kernel."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = make_step(settings)
    step()
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="self_device_time_total", row_limit=32))


# --- all measurements: the process that drives them


def plan(options: argparse.Namespace) -> list[dict]:
    """All measurements: of each length, variants and peers taking turns."""
    found = []
    for tokens in options.tokens:
        ours, peers = (
            [name for name, only in map(at, names) if only in (None, tokens)]
            for names in (options.variants, options.peers)
        )
        for pair in zip_longest(peers, ours):
            for is_ours, name in zip((False, True), pair):
                if name is not None:
                    found.append({"name": name, "tokens": tokens, "ours": is_ours})
    return [settings | common_settings(options) for settings in found]


def common_settings(options: argparse.Namespace) -> dict:
    names = ("layers", "warmup", "reps", "device", "shrink", "memory")
    return {name: getattr(options, name) for name in names}


def run_all(options: argparse.Namespace, scored_by: dict[str, str]) -> list[tuple[dict, dict]]:
    """(settings, result) of every measurement that succeeded."""
    results = []
    for settings in plan(options):
        if settings["ours"] or options.peers_script is None:
            settings = settings | {"scored_by": file_of(settings["name"], scored_by)}
            result = measure(__file__, settings, ENVIRONMENT)
        else:
            command = [sys.executable, options.peers_script, settings["name"], settings["tokens"]]
            for name in ("layers", "warmup", "reps"):
                command += [f"--{name}", settings[name]]
            result = last_object(command)
        who = "lemo" if settings["ours"] else "peer"
        print(f"{settings['tokens']:>7} {who} {settings['name']:<28} {result or 'failed'}")
        if result is not None:
            results.append((settings, result))
    return results


def file_of(variant: str, scored_by: dict[str, str]) -> str | None:
    """What a variant is scored by; `scored_by` has it for each scorer that needs something."""
    return next((path for name, path in scored_by.items() if name in variant), None)


def rows(options: argparse.Namespace, results: list[tuple[dict, dict]]) -> list[dict]:
    """Two figures, time and peak memory of the same steps, for each variant beside each peer."""
    found = []
    for settings, ours in results:
        if not settings["ours"]:
            continue
        shape = {
            "model": "Llama-3-8B shape",
            "tokens": settings["tokens"],
            "layers": options.layers,
            "lora_rank": RANK,
            "lora_targets": ",".join(name.removesuffix("_proj") for name in TARGETS),
            "dtype": "bfloat16",
            **recorded(settings["name"]),
            **({"memory": options.memory} if quantised_by(settings["name"]) else {}),
        }
        beside = [
            (other["name"], peer)
            for other, peer in results
            if not other["ours"] and other["tokens"] == settings["tokens"]
        ]
        for name, peer in beside or [(None, {})]:
            found += [
                records.figure(
                    "finetune step",
                    shape,
                    "ms",
                    ours["step_ms"],
                    name,
                    peer.get("step_ms"),
                    range=ours["step_ms_range"],
                    reps=options.reps,
                    peer_range=peer.get("step_ms_range"),
                ),
                records.figure(
                    "finetune peak memory",
                    shape,
                    "GiB",
                    ours["peak_gib"],
                    name,
                    peer.get("peak_gib"),
                    range=[ours["peak_gib"]] * 2,
                    after_forward=ours["after_forward_gib"],
                    weights=ours["weights_gib"],
                    peer_after_forward=peer.get("after_forward_gib"),
                ),
            ]
    return found


def main() -> int:
    from common.models import llama_config, write_random_predictors
    from lemo.predictors.model import model_shape
    from lemo.relevance.heads import RetrievalHeads

    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        names = [*options.variants, options.profile or ""]
        config = llama_config(BLOCK_SIZE, options.layers, options.shrink)
        scored_by = {}
        if any("predictor" in name for name in names):
            place = Path(folder) / "predictors"
            scored_by["predictor"] = write_random_predictors(place, config, BLOCK_SIZE)
        if any("attention" in name for name in names):
            place = Path(folder) / "heads.json"
            RetrievalHeads(model_shape(config), HEADS).save(place)
            scored_by["attention"] = str(place)
        if options.profile is not None:
            settings = {"name": options.profile, "tokens": options.tokens[0]}
            settings["scored_by"] = file_of(options.profile, scored_by)
            profile(common_settings(options) | settings)
            return 0
        results = run_all(options, scored_by)
    common = records.provenance(options.commit, options.device)
    for row in rows(options, results):
        records.append(options.output, [row | common])
        shape = row["shape"]
        records.show(row, f"{shape['tokens']:>7} keep {shape['keep']:<4} {shape['recompute']:<10} ")
    return 0 if len(results) == len(plan(options)) else 1


if __name__ == "__main__":
    run_script(main, worker)
