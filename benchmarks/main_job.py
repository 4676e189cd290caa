"""The main job on real input: extend a model's context, dense LoRA against lemo, on the CPU.

    python benchmarks/main_job.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz

Measured: seconds of a step, memory above the weights, and perplexity of held-out documents, every
token present, over the whole window and over its last quarter, for each method lemo-KEEP. Against:
"dense", plain Transformers and PEFT. Takes about half an hour on two cores with the defaults.

Every method is a process of its own that runs the same loop: the model's own dtype, scaled
dot-product attention, no checkpointing, AdamW, the same LoRA, windows, order and seed. The peer
never imports lemo; "lemo-K" calls `lemo.enable` with keep K and is otherwise the same code. The
processes take turns, one step each, so that a change of the machine's speed meets all of them.

One JSON line is appended to --output for each quantity of each lemo method.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import records
from common.processes import Worker, WorkerError, run_script

PEER = "dense"
PEER_NAME = "Transformers + PEFT, dense LoRA, sdpa"
PARTS = ("whole", "tail")
# Rows whose logits exist at a time in an evaluation: those of a window would be the memory's peak.
ROWS = 1024


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "cpu.jsonl")
    records.add_documents(parser)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=2, help="first steps, not timed")
    parser.add_argument("--methods", nargs="+", default=["lemo-0.5", "lemo-1"], metavar="lemo-KEEP")
    parser.add_argument(
        "--lemo", type=json.loads, default={}, help="more fields of LemoConfig, as JSON"
    )
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on every linear layer")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--eval-documents", type=int, default=4, help="documents of each kind")
    parser.add_argument("--dtype", help="dtype of the weights (the model's own)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 0 <= options.warmup < options.steps:
        parser.error(
            f"--warmup: expected less than --steps ({options.steps}), got {options.warmup}"
        )
    for method in options.methods:
        with contextlib.suppress(ValueError):
            if 0 < keep_of(method) <= 1:
                continue
        parser.error(f"--methods: expected 'lemo-KEEP', KEEP in (0, 1], got '{method}'")
    return options


def keep_of(method: str) -> float:
    prefix, _, keep = method.partition("-")
    return float(keep) if prefix == "lemo" else 0.0


# --- the windows, made once and the same for every method


def make_windows(options: argparse.Namespace) -> dict[str, Any]:
    """Windows of token ids: {"train": one a step, "eval": {kind: one a document}}."""
    from transformers import AutoTokenizer

    from lemo.data import first_windows, read_documents, token_windows

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents = list(read_documents(options.train))
    train = token_windows(documents, tokenizer, options.context, options.seed)
    by_kind: dict[str, list] = {}
    for document in read_documents(options.eval):
        by_kind.setdefault(document.kind, []).append(document)
    held_out = {}
    for kind, of_kind in by_kind.items():
        found, _ = first_windows(of_kind, tokenizer, options.context)
        held_out[kind] = [ids.tolist() for _, ids in found[: options.eval_documents]]
    return {"train": train.batch(0, options.steps).tolist(), "eval": held_out}


# --- one method: the process that trains


def load_extended(settings: dict[str, Any]):
    """The model; its positions are squeezed into the trained range where windows are longer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(settings["model"])
    factor = settings["context"] / config.max_position_embeddings
    if factor > 1:
        linear = {"rope_type": "linear", "factor": factor}
        config.rope_parameters = {**config.rope_parameters, **linear}
        config.max_position_embeddings = settings["context"]
    config.use_cache = False
    dtype = config.dtype or torch.float32
    return AutoModelForCausalLM.from_pretrained(
        settings["model"],
        config=config,
        dtype=getattr(torch, settings["dtype"]) if settings["dtype"] else dtype,
        attn_implementation="sdpa",
    )


def worker(settings: dict[str, Any]) -> Callable[[str], dict]:
    """Answers "step", "memory" and "evaluate" for one method."""
    import torch

    from common.models import with_lora
    from common.timing import milliseconds

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    causal = load_extended(settings)
    model = with_lora(causal, settings["rank"], "all-linear").train()
    handle = None
    if settings["name"] != PEER:
        import lemo

        config = lemo.LemoConfig(keep=keep_of(settings["name"]), **settings["lemo"])
        handle = lemo.enable(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0)
    windows = json.loads(Path(settings["windows"]).read_text())
    train = iter(windows["train"])
    baseline = resident_bytes("VmRSS")
    with contextlib.suppress(OSError):
        # Forget the memory peak of loading the model, where the system can (Linux).
        Path("/proc/self/clear_refs").write_text("5")

    def step(ids: torch.Tensor, losses: list[float]) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    def answer(question: str) -> dict:
        if question == "step":
            ids, losses = torch.tensor([next(train)]), []
            taken = milliseconds(lambda: step(ids, losses), "cpu")
            return {"seconds": taken / 1e3, "loss": losses[0]}
        if question == "memory":
            return {"baseline_bytes": baseline, "peak_bytes": resident_bytes("VmHWM")}
        if handle is not None:
            handle.remove()
        model.eval()
        return {kind: perplexity(causal, ids) for kind, ids in windows["eval"].items()}

    return answer


def perplexity(causal, windows: list[list[int]]) -> dict[str, float]:
    """Perplexity over windows of tokens: {"whole", "tail"}, the tail their last quarter."""
    import torch
    from torch.nn.functional import cross_entropy

    decoder, head = causal.get_decoder(), causal.get_output_embeddings()
    losses = []
    with torch.no_grad():
        for ids in torch.tensor(windows):
            hidden = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
            parts = zip(hidden.split(ROWS), ids[1:].split(ROWS), strict=True)
            of_rows = [cross_entropy(head(x).float(), y, reduction="none") for x, y in parts]
            losses.append(torch.cat(of_rows))
    losses = torch.stack(losses)
    tail = losses[:, losses.shape[1] - losses.shape[1] // 4 :]
    return {"whole": losses.mean().exp().item(), "tail": tail.mean().exp().item()}


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, in bytes.

    Not `ru_maxrss` where it can be helped: on Linux a child starts with its parent's value.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- all methods: the process that drives them


def measure(settings: dict[str, Any], methods: list[str]) -> dict[str, dict]:
    """Trains and evaluates the methods, which take turns: {method: result}."""
    environment = {"OMP_NUM_THREADS": str(settings["threads"])}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(__file__, settings | {"name": name}, environment))
            for name in methods
        }
        steps: dict[str, list[dict]] = {name: [] for name in methods}
        for step in range(settings["steps"]):
            # The order turns round, so that no method is always the one after another.
            start = step % len(methods)
            for name in methods[start:] + methods[:start]:
                found = workers[name].ask("step")
                steps[name].append(found)
                taken = f"{found['seconds']:7.2f} s  loss {found['loss']:.4f}"
                print(f"step {step + 1}/{settings['steps']}  {name:>8}  {taken}", flush=True)
        return {
            name: {
                "seconds": [found["seconds"] for found in steps[name]],
                # The memory of training is asked for before the evaluation adds its own.
                **each.ask("memory"),
                "after": each.ask("evaluate"),
            }
            for name, each in workers.items()
        }


def machine() -> dict[str, str]:
    """The CPU's name, and the versions that a record states besides torch's."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = [*names, platform.processor() or platform.machine()][0]
    versions = {name: version(name) for name in ("transformers", "peft")}
    return {"cpu": cpu, **versions, "python": platform.python_version()}


def rows(
    options: argparse.Namespace, documents: dict[str, int], before: dict, peer: dict, ours: dict
) -> list[dict]:
    """One record for each quantity of one lemo method against the peer, `ours` with its name."""
    from common.timing import summary

    shape = {
        "model": options.model.resolve().name,
        "context": options.context,
        "batch": 1,
        "steps": options.steps,
        "lora_rank": options.rank,
        "keep": keep_of(ours["name"]),
        **options.lemo,
    }

    def record(quantity: str, unit: str, value: float, peer_value: float, **more) -> dict:
        bench = f"main_job.{quantity}"
        return records.figure(bench, shape, unit, value, PEER_NAME, peer_value, **more)

    mine, theirs = (summary(each["seconds"][options.warmup :], digits=3) for each in (ours, peer))
    ranges = {"range": mine.range, "peer_range": theirs.range}
    peaks = {"peak": ours["peak_bytes"], "peer_peak": peer["peak_bytes"]}
    above = [each["peak_bytes"] - each["baseline_bytes"] for each in (ours, peer)]
    found = [
        record("step", "s", mine.median, theirs.median, **ranges),
        record("memory", "bytes", *above, **peaks),
    ]
    for kind, count in documents.items():
        for part in PARTS:
            values = [each["after"][kind][part] for each in (ours, peer)]
            more = {"before": round(before[kind][part], 4), "documents": count}
            found.append(record(f"perplexity.{kind}.{part}", "perplexity", *values, **more))
    return found


def main() -> int:
    options = parse_arguments()
    methods = [PEER, *dict.fromkeys(options.methods)]
    names = ("context", "steps", "lemo", "rank", "learning_rate", "dtype", "threads", "seed")
    with tempfile.TemporaryDirectory() as folder:
        windows = make_windows(options)
        path = Path(folder) / "windows.json"
        path.write_text(json.dumps(windows))
        settings = {name: getattr(options, name) for name in names}
        settings |= {"model": str(options.model), "windows": str(path)}
        try:
            with Worker(__file__, settings | {"name": PEER}) as worker_:
                before = worker_.ask("evaluate")
            results = measure(settings, methods)
        except WorkerError as error:
            print(f"a method failed: {error}", file=sys.stderr)
            return 1
    common = {
        **machine(),
        **records.provenance(options.commit, "cpu"),
        "threads": options.threads,
        "dtype": options.dtype or "model",
    }
    documents = {kind: len(found) for kind, found in windows["eval"].items()}
    for name in methods[1:]:
        for row in rows(options, documents, before, results[PEER], results[name] | {"name": name}):
            records.append(options.output, [row | common])
            records.show(row, f"{name:<9} ")
    return 0


if __name__ == "__main__":
    run_script(main, worker)
