"""The main job on real input: extend a model's context, dense LoRA against lemo, on one machine.

    python benchmarks/main_job.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz

Every method is a process of its own that runs the same loop: Transformers and PEFT, the model's
own dtype, scaled dot-product attention, no checkpointing, AdamW, the same LoRA, windows, order and
seed. The peer, ``dense``, never imports lemo; ``lemo-K`` calls ``lemo.enable`` with keep K and is
otherwise the same code. By default the processes take turns, one step each, so that a change of
the machine's speed meets all of them (``--sequential``: one method after the other). Perplexity is
measured densely on held-out documents, over the whole window and over its last quarter.

Results of each method stay in ``--work``, so methods can be measured one at a time (``--methods``).
For each lemo method with a peer, JSON lines are appended to ``--output``, and a table of everything
is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import hashlib
import json
import lzma
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

PEER = "dense"
REPOSITORY = Path(__file__).resolve().parents[1]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument(
        "--train", type=Path, required=True, help="documents, {id, kind, text} a line"
    )
    parser.add_argument(
        "--eval", type=Path, required=True, help="held-out documents, the same format"
    )
    parser.add_argument("--context", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps, warm-up included")
    parser.add_argument(
        "--warmup", type=int, default=2, help="first steps whose time does not count"
    )
    parser.add_argument("--methods", default="dense,lemo-0.5,lemo-1", help="dense, lemo-KEEP, ...")
    parser.add_argument(
        "--lemo",
        type=json.loads,
        default={},
        help="LemoConfig fields of the lemo methods, JSON (default: %(default)s)",
    )
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on every linear layer")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--eval-documents", type=int, default=4, help="documents of each kind")
    parser.add_argument(
        "--dtype", default=None, help="dtype of the weights (default: the model's own)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequential", action="store_true", help="one method after the other")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/main_job"), help="folder of raw results"
    )
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/cpu.jsonl")
    options = parser.parse_args(arguments)
    for name in ("model", "train", "eval"):
        if not getattr(options, name).exists():
            parser.error(f"--{name}: expected an existing path, got '{getattr(options, name)}'")
    if not 0 <= options.warmup < options.steps:
        parser.error(
            f"--warmup: expected less than --steps ({options.steps}), got {options.warmup}"
        )
    for method in options.methods.split(","):
        with contextlib.suppress(ValueError):
            if method == PEER or 0 < keep_of(method) <= 1:
                continue
        parser.error(f"--methods: expected 'dense' or 'lemo-KEEP', KEEP in (0, 1], got '{method}'")
    return options


def keep_of(method: str) -> float:
    prefix, _, keep = method.partition("-")
    return float(keep) if prefix == "lemo" else math.nan


# --- the windows, made once and the same for every method


def read_documents(path: Path) -> Iterator[dict]:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def make_windows(options: argparse.Namespace) -> dict:
    """Windows of token ids: ``{"train": one a step, "eval": {kind: one a document}}``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    generator = random.Random(options.seed)

    def tokens_of(document: dict) -> list[int]:
        return tokenizer(document["text"], add_special_tokens=False, verbose=False)["input_ids"]

    documents = list(read_documents(options.train))
    train: list[list[int]] = []
    while len(train) < options.steps:
        found = len(train)
        for document in generator.sample(documents, len(documents)):
            tokens = tokens_of(document) if len(train) < options.steps else []
            if len(tokens) >= options.context:
                start = generator.randrange(len(tokens) - options.context + 1)
                train.append(tokens[start : start + options.context])
        if len(train) == found:
            raise SystemExit(
                f"--train: no document of {options.context} tokens in '{options.train}'"
            )
    held_out: dict[str, list[list[int]]] = {}
    for document in read_documents(options.eval):
        windows = held_out.setdefault(document.get("kind", "all"), [])
        if len(windows) < options.eval_documents:
            tokens = tokens_of(document)
            if len(tokens) >= options.context:
                windows.append(tokens[: options.context])
    held_out = {kind: windows for kind, windows in held_out.items() if windows}
    if not held_out:
        raise SystemExit(f"--eval: no document of {options.context} tokens in '{options.eval}'")
    return {"train": train, "eval": held_out}


# --- one method: the process that trains


def work(settings: dict, method: str) -> None:
    """Answer each line of stdin (``step``, ``memory``, ``evaluate``) with a JSON line."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    config = AutoConfig.from_pretrained(settings["model"])
    trained_length = config.max_position_embeddings
    if settings["context"] > trained_length:
        # Position interpolation: the positions of the long window squeezed into the trained range.
        config.rope_parameters = {
            **config.rope_parameters,
            "rope_type": "linear",
            "factor": settings["context"] / trained_length,
        }
        config.max_position_embeddings = settings["context"]
    dtype = (
        getattr(torch, settings["dtype"]) if settings["dtype"] else config.dtype or torch.float32
    )
    causal = AutoModelForCausalLM.from_pretrained(
        settings["model"], config=config, dtype=dtype, attn_implementation="sdpa"
    )
    causal.config.use_cache = False
    # PEFT's default keeps fp32 adapters and casts every projection's input to fp32: slower for
    # every method.
    model = get_peft_model(
        causal,
        LoraConfig(
            r=settings["rank"],
            lora_alpha=2 * settings["rank"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=False,
    )
    handle = None
    if method.startswith("lemo"):
        import lemo

        handle = lemo.enable(model, lemo.LemoConfig(keep=keep_of(method), **settings["lemo"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0)
    windows = json.loads(Path(settings["windows"]).read_text())
    baseline = resident_bytes("VmRSS")
    reset_peak()
    answer = {"ready": method}
    step = 0
    print(json.dumps(answer), flush=True)
    for command in sys.stdin:
        if command.strip() == "step":
            model.train()
            ids = torch.tensor([windows["train"][step]])
            start = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            answer = {"seconds": time.perf_counter() - start, "loss": loss.item()}
            del loss
            step += 1
        elif command.strip() == "memory":
            kept = [
                [s.attention_rows / s.tokens, s.mlp_rows / s.tokens]
                for s in (handle.statistics() if handle else [])
            ]
            peak = resident_bytes("VmHWM")
            answer = {"baseline_bytes": baseline, "peak_bytes": peak, "kept": kept}
        else:
            if handle is not None:
                handle.remove()
                handle = None
            model.eval()
            answer = {kind: perplexity(causal, ids) for kind, ids in windows["eval"].items()}
        print(json.dumps(answer), flush=True)


def perplexity(causal, windows: list[list[int]], rows: int = 1024) -> dict:
    """Perplexity over windows of tokens: ``{"whole", "tail"}``, the tail their last quarter."""
    import torch
    from torch.nn.functional import cross_entropy

    losses = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            # The logits of a whole window would be the memory peak: rows at a time.
            losses.append(
                torch.cat(
                    [
                        cross_entropy(
                            causal.get_output_embeddings()(part).float(), labels, reduction="none"
                        )
                        for part, labels in zip(
                            hidden.split(rows), ids[0, 1:].split(rows), strict=True
                        )
                    ]
                )
            )
    losses = torch.stack(losses)
    tail = losses[:, losses.shape[1] - losses.shape[1] // 4 :]
    return {"whole": losses.mean().exp().item(), "tail": tail.mean().exp().item()}


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in bytes.

    Not ``ru_maxrss`` where it can be helped: on Linux a child starts with its parent's value.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Forget the memory peak of loading the model, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# --- all methods: the process that drives them


class Worker:
    """A method in a process of its own, driven command by command."""

    def __init__(self, settings_path: Path, method: str, threads: int):
        self.method = method
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(settings_path), method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.method}: the process ended with exit code {self.process.wait()}"
            )
        return json.loads(line)

    def ask(self, command: str) -> dict:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(options: argparse.Namespace, settings_path: Path, methods: list[str]) -> dict:
    """Train and evaluate the methods, which take turns: ``{method: result}``."""
    with contextlib.ExitStack() as stack:
        workers = []
        for method in methods:
            workers.append(Worker(settings_path, method, options.threads))
            stack.callback(workers[-1].close)
        steps: dict[str, list[dict]] = {method: [] for method in methods}
        for step in range(options.steps):
            # The order turns round, so that no method is always the one after another.
            for worker in workers[step % len(workers) :] + workers[: step % len(workers)]:
                answer = worker.ask("step")
                steps[worker.method].append(answer)
                print(
                    f"step {step + 1}/{options.steps}  {worker.method:>8}  "
                    f"{answer['seconds']:7.2f} s  loss {answer['loss']:.4f}",
                    flush=True,
                )
        results = {}
        for worker in workers:
            results[worker.method] = {
                "method": worker.method,
                "seconds": [s["seconds"] for s in steps[worker.method]],
                "loss": [s["loss"] for s in steps[worker.method]],
                # The memory of training is asked for before the evaluation adds its own.
                **worker.ask("memory"),
                "after": worker.ask("evaluate"),
            }
            print(f"{worker.method}: after {results[worker.method]['after']}", flush=True)
        return results


def evaluate_before(options: argparse.Namespace, settings_path: Path) -> dict:
    worker = Worker(settings_path, PEER, options.threads)
    before = worker.ask("evaluate")
    worker.close()
    print(f"before: {before}", flush=True)
    return before


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "gpu": None,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "peft": version("peft"),
        "python": platform.python_version(),
    }


def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "") or "unknown"


def timing(result: dict, warmup: int) -> tuple[float, list[float]]:
    seconds = result["seconds"][warmup:]
    return statistics.median(seconds), [round(min(seconds), 3), round(max(seconds), 3)]


def records(
    options: argparse.Namespace, settings: dict, before: dict, peer: dict, ours: dict
) -> list[dict]:
    """One record for each quantity of one lemo method against the peer."""
    shape = {
        "model": options.model.resolve().name,
        "context": options.context,
        "batch": 1,
        "steps": options.steps,
        "lora_rank": options.rank,
        "keep": keep_of(ours["method"]),
        **options.lemo,
    }
    common = {
        **machine(),
        "threads": options.threads,
        "dtype": settings["dtype"] or "model",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }

    def record(quantity: str, value: float, peer_value: float, unit: str, **more) -> dict:
        return {
            "bench": f"main_job.{quantity}",
            "shape": shape,
            "ours": round(value, 4),
            "peer": "Transformers + PEFT, dense LoRA, sdpa",
            "peer_value": round(peer_value, 4),
            "ratio": round(value / peer_value, 4),
            "unit": unit,
            **more,
            **common,
        }

    seconds, spread = timing(ours, options.warmup)
    peer_seconds, peer_spread = timing(peer, options.warmup)
    found = [
        record("step", seconds, peer_seconds, "s", range=spread, peer_range=peer_spread),
        record(
            "memory",
            ours["peak_bytes"] - ours["baseline_bytes"],
            peer["peak_bytes"] - peer["baseline_bytes"],
            "bytes",
            peak=ours["peak_bytes"],
            peer_peak=peer["peak_bytes"],
        ),
    ]
    for kind in ours["after"]:
        for part in ("whole", "tail"):
            found.append(
                record(
                    f"perplexity.{kind}.{part}",
                    ours["after"][kind][part],
                    peer["after"][kind][part],
                    "perplexity",
                    before=round(before[kind][part], 4),
                    documents=settings["eval_documents"][kind],
                )
            )
    return found


def print_table(options: argparse.Namespace, before: dict, results: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{options.context} tokens, {options.steps} steps, {options.threads} threads"
    )
    parts = [(kind, part) for kind in before for part in ("whole", "tail")]
    columns = ["method", "s/step", "range", "of dense", "memory MiB", "of dense"]
    for column in columns + [f"{kind} {part}" for kind, part in parts]:
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_row("before", *[""] * 5, *(f"{before[kind][part]:.3f}" for kind, part in parts))
    peer = results.get(PEER)
    for method, result in results.items():
        seconds, spread = timing(result, options.warmup)
        memory = result["peak_bytes"] - result["baseline_bytes"]
        ratios = ["", ""]
        if peer is not None and method != PEER:
            peer_memory = peer["peak_bytes"] - peer["baseline_bytes"]
            ratios = [
                f"{seconds / timing(peer, options.warmup)[0]:.3f}",
                f"{memory / peer_memory:.3f}",
            ]
        table.add_row(
            method,
            f"{seconds:.2f}",
            f"{spread[0]:.2f}-{spread[1]:.2f}",
            ratios[0],
            f"{memory / 2**20:.0f}",
            ratios[1],
            *(f"{result['after'][kind][part]:.3f}" for kind, part in parts),
        )
    Console(width=140).print(table)


def save(path: Path, value) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def main() -> None:
    options = parse_arguments()
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("methods", "output", "work", "sequential", "warmup")
    }
    # Results of other settings never mix: each set of settings has a folder of its own.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = options.work / digest
    folder.mkdir(parents=True, exist_ok=True)
    settings_path, windows_path = folder / "settings.json", folder / "windows.json"
    if not windows_path.exists():
        save(windows_path, make_windows(options))
    windows = json.loads(windows_path.read_text())
    settings["windows"] = str(windows_path)
    settings["eval_documents"] = {kind: len(found) for kind, found in windows["eval"].items()}
    save(settings_path, settings)

    before_path = folder / "before.json"
    if not before_path.exists():
        save(before_path, evaluate_before(options, settings_path))
    before = json.loads(before_path.read_text())
    methods = list(dict.fromkeys(options.methods.split(",")))
    for group in [[method] for method in methods] if options.sequential else [methods]:
        for method, result in measure(options, settings_path, group).items():
            save(folder / f"{method}.json", result)

    results = {
        method: json.loads((folder / f"{method}.json").read_text())
        for method in sorted({PEER, *methods}, key=lambda name: (name != PEER, name))
        if (folder / f"{method}.json").exists()
    }
    print_table(options, before, results)
    if PEER not in results:
        print(f"No record appended: measure '{PEER}' too.")
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with open(options.output, "a", encoding="utf-8") as output:
        for method in methods:
            if method != PEER:
                for record in records(options, settings, before, results[PEER], results[method]):
                    output.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(Path(sys.argv[2]).read_text()), sys.argv[3])
    else:
        main()
