"""Time and memory of fine-tuning steps of the Llama-3-8B shape on one GPU, beside other methods.

    python benchmarks/gpu_finetune.py --output h200_finetune.jsonl --tokens 16384 32768 65536
        [--variants 0.5-layer ...] [--peers NAME ...] [--peers-script SCRIPT]
    python benchmarks/gpu_finetune.py --profile 0.5-layer --tokens 32768

Random bf16 weights, LoRA of rank 8 on q, k, v and o in bf16, fused AdamW, batch 1: right for time
and memory, meaningless for quality. A variant is KEEP-RECOMPUTE[-SCORER]: "1-layer",
"0.5-selective", "0.5-none-predictor". KEEP holds for attention and MLP of every layer (no layer is
dense). Without a scorer all other settings are lemo's defaults: quarters of the window, drawn at
random. With one, blocks are of 64 tokens, which are more to score and to gather: "pooled" scores in
the first layer only; "predictor" scores in every layer with predictors of the default size,
"predictors" also has the MLP choose a set of its own by its own predictors. Where every layer has a
set of its own, the loss counts nearly every row, with "pooled" only those that were kept; "random"
chooses in every layer, too, so what predictors cost is the difference to it. "computed" draws one
set, and computes the other rows as context of the kept ones (`visible_keys`). "outside" is the
defaults with a loss that the model does not compute: a segment of hidden states at a time, under
checkpointing, as trainers do. A variant or peer may be bound to one length: "1-none@16384".

Peers are modes of --peers-script, which is called as SCRIPT MODE TOKENS --layers N --warmup N
--reps N and prints one JSON object last ("step_ms", "step_ms_range", "peak_gib"). Without one there
is a single peer, "checkpointing": Transformers and PEFT with gradient checkpointing and a loss in
segments.

Every measurement is a process of its own; those of lemo and of the peers take turns. Step time and
peak memory come from the same steps. For each pair of a variant and a peer at the same length two
JSON lines are appended to --output, or for a variant alone where no peer was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

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
BLOCK_SIZE = 64
DEFAULTS = "defaults"
OUTSIDE = "outside"
SCORERS = (DEFAULTS, OUTSIDE, "pooled", "random", "predictor", "predictors", "computed")
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
RANK, ALPHA = 8, 16
# The fields of LemoConfig that shape a figure.
RECORDED = (
    "block_size",
    "keep_first",
    "keep_last",
    "keep",
    "scorer",
    "visible_keys",
    "recompute",
    "layerwise",
)
GIB = 2**30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--peers", nargs="*", metavar="NAME")
    parser.add_argument("--peers-script", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=1, help="steps that do not count")
    parser.add_argument("--reps", type=int, default=3, help="steps that count")
    parser.add_argument("--commit", default="unknown", help="commit of the measured tree")
    parser.add_argument("--profile", metavar="VARIANT", help="show where one step's time goes")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peers is None:
        options.peers = [PEER] if options.peers_script is None else list(PEERS)
    if options.output is None and options.profile is None and options.worker is None:
        parser.error("--output: expected a file, or --profile")
    if options.peers_script is None and any(at(p)[0] != PEER for p in options.peers):
        parser.error(f"--peers: expected '{PEER}' without --peers-script")
    for variant in [*options.variants, *filter(None, [options.profile])]:
        try:
            settings_of(at(variant)[0])
        except ValueError as error:
            parser.error(f"variant '{variant}': {error}")
    return options


def at(name: str) -> tuple[str, int | None]:
    """("1-layer", 16384) of "1-layer@16384"; the length is None where none is given."""
    name, _, tokens = name.partition("@")
    return name, int(tokens) if tokens else None


def settings_of(variant: str) -> dict:
    """LemoConfig fields of a variant, without the predictor's folder."""
    keep, recompute, scorer = [*variant.split("-"), DEFAULTS][:3]
    if recompute not in ("none", "layer", "selective") or scorer not in SCORERS:
        raise ValueError(f"expected KEEP-none|layer|selective[-{'|'.join(SCORERS)}]")
    keep = float(keep)
    if scorer in (DEFAULTS, OUTSIDE):
        from lemo.settings.elimination import LemoConfig

        values = LemoConfig(keep=keep, recompute=recompute).to_dict()
        return {name: values[name] for name in RECORDED}
    return {
        # Small blocks are the harder case: more of them to score and to gather.
        "block_size": BLOCK_SIZE,
        "keep_first": 1,
        "keep_last": 1,
        "keep": keep,
        "scorer": "random" if scorer == "computed" else scorer.removesuffix("s"),
        "visible_keys": "computed" if scorer == "computed" else "kept",
        "recompute": recompute,
        "layerwise": {
            "keep_mlp": keep if scorer == "predictors" else None,
            "select_at": "first" if scorer in ("pooled", "computed") else "all",
        },
    }


# --- one measurement: a process of its own


def llama(tokens: int, layers: int):
    """The model with random weights, made on the GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPE, num_hidden_layers=layers, max_position_embeddings=tokens, use_cache=False
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def checkpointed_loss(base) -> Callable:
    """The loss of the built-in peer: gradient checkpointing, and logits of 4096 rows at a time."""
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    def of_segment(x, labels):
        return cross_entropy(base.lm_head(x).float(), labels, reduction="sum")

    def loss(ids):
        hidden, labels = base.model(input_ids=ids).last_hidden_state[0, :-1], ids[0, 1:]
        segments = zip(hidden.split(4096), labels.split(4096))
        losses = [checkpoint(of_segment, x, y, use_reentrant=False) for x, y in segments]
        return sum(losses) / labels.numel()

    return loss


def make_step(name: str, tokens: int, layers: int, predictor: str | None) -> Callable:
    """step() runs one optimizer step and returns (loss, bytes allocated after forward)."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = llama(tokens, layers)
    model = get_peft_model(
        base,
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        ),
        # PEFT's default keeps fp32 adapters and casts every projection's input to fp32.
        autocast_adapter_dtype=False,
    )
    model.train()
    if name == PEER:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of = checkpointed_loss(base)
    else:
        import lemo

        settings = settings_of(name)
        if settings["scorer"] == "predictor":
            settings["predictor"] = predictor
        lemo.enable(model, lemo.LemoConfig(**settings))

        def loss_of(ids):
            return model(input_ids=ids, labels=ids).loss

        if name.endswith(f"-{OUTSIDE}"):
            loss_of = checkpointed_loss(base)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens), device="cuda")

    def step():
        loss = loss_of(ids)
        held = torch.cuda.memory_allocated()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), held

    return step


def measure(settings: dict) -> dict:
    """Times the steps of one variant or of the built-in peer."""
    import torch

    step = make_step(settings["name"], *(settings[n] for n in ("tokens", "layers", "predictor")))
    held_before = torch.cuda.memory_allocated()
    times, held = [], 0
    for repeat in range(settings["warmup"] + settings["reps"]):
        if repeat == settings["warmup"]:
            torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss, held = step()
        end.record()
        end.synchronize()
        if repeat >= settings["warmup"]:
            times.append(start.elapsed_time(end))
    return {
        "step_ms": round(statistics.median(times), 1),
        "step_ms_range": [round(min(times), 1), round(max(times), 1)],
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "after_forward_gib": round(held / GIB, 2),
        "weights_gib": round(held_before / GIB, 2),
        "host_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "loss": round(loss.item(), 4),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def work(settings: dict) -> None:
    """Imports what the measurement needs, waits for a line, measures, prints one JSON line."""
    import peft  # noqa: F401
    import transformers.models.llama  # noqa: F401

    if settings["name"] != PEER:
        import lemo.models.enable  # noqa: F401
    sys.stdin.readline()
    print(json.dumps(measure(settings)), flush=True)


def profile(options: argparse.Namespace) -> None:
    """Where one step's time goes on the GPU, and where the GPU waited for the host."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with tempfile.TemporaryDirectory() as folder:
        predictor = None
        if "predictor" in options.profile:
            predictor = write_predictors(Path(folder) / "predictors", options.layers)
        step = make_step(options.profile, options.tokens[0], options.layers, predictor)
    step()
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels = sorted(
        (e for e in found.events() if e.device_type.name == "CUDA" and not e.is_user_annotation),
        key=lambda e: e.time_range.start,
    )
    by_name: dict[str, list[float]] = {}
    busy, gaps, end = 0.0, [], kernels[0].time_range.start
    for before, kernel in zip([None, *kernels], kernels):
        start, stop = kernel.time_range.start, kernel.time_range.end
        by_name.setdefault(kernel.name, []).append(stop - start)
        if start > end and before is not None:
            gaps.append((start - end, before.name, kernel.name))
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - kernels[0].time_range.start
    print(f"{len(kernels)} kernels, GPU busy {busy / 1e3:.1f} of {span / 1e3:.1f} ms")
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:32]:
        total = sum(times)
        print(f"{total / 1e3:9.2f} ms {total / span:6.1%} {len(times):5} x  {name[:96]}")
    print("longest waits for the host:")
    for length, before, after in sorted(gaps, reverse=True)[:12]:
        print(f"{length / 1e3:9.3f} ms  after {before[:48]}  before {after[:48]}")


# --- all measurements: the process that drives them


def write_predictors(folder: Path, layers: int) -> str:
    """A folder as `lemo prepare` writes it, with random weights of the default size."""
    import torch
    from transformers import LlamaConfig

    from lemo.predictors import modules, storage
    from lemo.predictors.position import PositionProfile

    generator = torch.Generator().manual_seed(0)
    hidden = SHAPE["hidden_size"]
    tensors = {}
    for layer in range(layers):
        for kind, places in (("attention", 21), ("mlp", 1)):
            knots = torch.exp2(torch.arange(places) / 2)
            profile = PositionProfile(knots, torch.zeros(places), torch.ones(places))
            rank = modules.default_rank(hidden)
            module = modules.make_predictor(kind, hidden, rank, generator)
            tensors |= storage.tensors_of(layer, kind, module, profile)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers)
    folder.mkdir()
    description = {
        "model": storage.fingerprint(config),
        "block_size": BLOCK_SIZE,
        "num_layers": layers,
        "hidden_size": hidden,
        "thresholds": {kind: [0.0] * layers for kind in ("attention", "mlp")},
    }
    storage.write_folder(folder, tensors, description)
    return str(folder)


class Worker:
    """A measurement of this script: starts to import at once, measures when asked to."""

    def __init__(self, settings: dict) -> None:
        # As the peers' allocator: segments that grow, so that cuts of other sizes waste nothing.
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        )

    def measure(self) -> dict | None:
        return _last_object(self.process.communicate("go\n")[0], self.process.returncode)


class Script:
    """A measurement of the peers' script."""

    def __init__(self, script: Path, settings: dict) -> None:
        self.command = [sys.executable, str(script), settings["name"], str(settings["tokens"])]
        for name in ("layers", "warmup", "reps"):
            self.command += [f"--{name}", str(settings[name])]

    def measure(self) -> dict | None:
        done = subprocess.run(self.command, stdout=subprocess.PIPE, text=True, check=False)
        return _last_object(done.stdout, done.returncode)


def _last_object(output: str, code: int) -> dict | None:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if code == 0 and lines else None


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
    common = {name: getattr(options, name) for name in ("layers", "warmup", "reps")}
    return [settings | common for settings in found]


def run_all(options: argparse.Namespace, predictor: str | None) -> list[tuple[dict, dict]]:
    """(settings, result) of every measurement that succeeded."""
    waiting = []
    for settings in plan(options):
        scripted = not settings["ours"] and options.peers_script is not None
        make = (lambda s: Script(options.peers_script, s)) if scripted else Worker
        waiting.append((settings, lambda s=settings, make=make: make(s | {"predictor": predictor})))
    results: list[tuple[dict, dict]] = []
    upcoming = waiting[0][1]() if waiting else None
    for index, (settings, _) in enumerate(waiting):
        current = upcoming
        # The next process imports while this one measures.
        upcoming = waiting[index + 1][1]() if index + 1 < len(waiting) else None
        result = current.measure()
        who = "lemo" if settings["ours"] else "peer"
        print(
            f"{settings['tokens']:>7} {who} {settings['name']:<28} {result or 'failed'}", flush=True
        )
        if result is not None:
            results.append((settings, result))
    return results


def records(options: argparse.Namespace, results: list[tuple[dict, dict]]) -> list[dict]:
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
            "lora_targets": "q,k,v,o",
            "dtype": "bfloat16",
            **settings_of(settings["name"]),
            **({"loss": OUTSIDE} if settings["name"].endswith(f"-{OUTSIDE}") else {}),
        }
        common = {
            "gpu": ours["gpu"],
            "torch": ours["torch"],
            "commit": options.commit,
            "date": datetime.date.today().isoformat(),
        }
        beside = [
            (other["name"], peer)
            for other, peer in results
            if not other["ours"] and other["tokens"] == settings["tokens"]
        ]
        for name, peer in beside or [(None, {})]:
            time = {
                "bench": "finetune step",
                "shape": shape,
                "ours": ours["step_ms"],
                "range": ours["step_ms_range"],
                "reps": options.reps,
                "peer": name,
                "peer_value": peer.get("step_ms"),
                "peer_range": peer.get("step_ms_range"),
                "ratio": _ratio(ours["step_ms"], peer.get("step_ms")),
                "unit": "ms",
            }
            memory = {
                "bench": "finetune peak memory",
                "shape": shape,
                "ours": ours["peak_gib"],
                "range": [ours["peak_gib"]] * 2,
                "after_forward": ours["after_forward_gib"],
                "weights": ours["weights_gib"],
                "peer": name,
                "peer_value": peer.get("peak_gib"),
                "peer_after_forward": peer.get("after_forward_gib"),
                "ratio": _ratio(ours["peak_gib"], peer.get("peak_gib")),
                "unit": "GiB",
            }
            found += [time | common, memory | common]
    return found


def _ratio(ours: float, peer: float | None) -> float | None:
    return None if peer is None else round(ours / peer, 4)


def main() -> int:
    options = parse_arguments()
    if options.worker is not None:
        work(options.worker)
        return 0
    if options.profile is not None:
        profile(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        predictor = None
        if any("predictor" in variant for variant in options.variants):
            predictor = write_predictors(Path(folder) / "predictors", options.layers)
        results = run_all(options, predictor)
    with options.output.open("a", encoding="utf-8") as lines:
        for record in records(options, results):
            lines.write(json.dumps(record) + "\n")
            print(
                f"{record['shape']['tokens']:>7} keep {record['shape']['keep']:<4} "
                f"{record['shape']['recompute']:<10} {record['bench']:<21} {record['ours']:>9} "
                f"{record['unit']:<4} {record['peer'] or 'alone':<10} "
                f"{record['peer_value'] or '':>9} ratio {record['ratio']}"
            )
    return 0 if len(results) == len(plan(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
