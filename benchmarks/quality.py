"""Quality of fine-tuned models: named methods under one protocol, and one table of them.

    python benchmarks/quality.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz

Every method of ``quality.yaml`` (``--methods`` picks some) fine-tunes the same model on the same
windows in the same order and is then evaluated densely: perplexity of held-out documents, over the
whole window and over its last quarter, each kind of document separately, and retrieval of a passage
planted far back (``retrieval.py``). Each run is a process of its own, ``--jobs`` at a time on each
of ``--gpus``. Where they are to be timed, ``--exclusive`` lets one at a time have the GPU, and the
others only load. What is reported of a method - perplexity, kept share, seconds of a step, peak
memory - comes from the very same run.

``--copies`` plants passages and copies of them in the documents to train on, so that the models can
learn what the retrieval task asks for; perplexities of such runs compare with each other only.

``--equal steps time`` afterwards gives every method the wall-clock time that the first one (dense
LoRA, say) took for its steps, judged by how long the steps of each took. ``--equal time`` alone
takes these times from ``--output``, where the same protocol has run, one run at a time, on the same
kind of GPU.

Rows are appended to ``--output``; ``--table`` prints what the file has and runs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
SETTINGS = ("elimination", "settings", "predictor")
TRAINING = ("model", "train", "context", "batch", "learning_rate", "rank", "warmup", "device")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a causal LM")
    parser.add_argument("--train", type=Path, help="documents to train on")
    parser.add_argument("--eval", type=Path, help="held-out documents")
    parser.add_argument("--methods", nargs="+", help="names in --file (default: all)")
    parser.add_argument("--file", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--context", type=int, default=16384, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=10, help="steps of rising learning rate")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, every linear layer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--equal", choices=("steps", "time"), nargs="+", default=["steps"])
    parser.add_argument("--copies", action="store_true", help="train on texts with copies in them")
    parser.add_argument("--books", type=int, default=10, help="documents of the kind 'book'")
    parser.add_argument("--others", type=int, default=8, help="documents of every other kind")
    parser.add_argument("--predictors", type=Path, help="folder that lemo prepare wrote")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="their numbers")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--exclusive", action="store_true", help="one run at a time on a GPU")
    parser.add_argument("--threads", type=int, default=4, help="CPU threads of a run")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/quality")
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "benchmarks/results/quality.jsonl"
    )
    parser.add_argument("--commit", default="unknown", help="commit of the measured tree")
    parser.add_argument("--table", action="store_true", help="print --output and stop")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.table or options.worker:
        return options
    for name in ("model", "train", "eval", "file"):
        path = getattr(options, name)
        if path is None or not path.exists():
            parser.error(f"--{name}: expected an existing path, got '{path}'")
    if options.equal == ["time", "steps"]:
        parser.error("--equal: expected 'steps' first, which says how long the steps are")
    known = yaml.safe_load(options.file.read_text(encoding="utf-8"))
    options.methods = options.methods or list(known)
    for name in options.methods:
        if name not in known:
            parser.error(f"--methods: expected names of {options.file}, got '{name}'")
    options.known = {name: method_of(name, known[name], options) for name in options.methods}
    return options


def method_of(name: str, method: dict | None, options: argparse.Namespace) -> dict:
    """A method with its entries as numbers: "context/4" tokens, "batch*2" windows."""
    method = dict(method or {})
    unknown = set(method) - set(SETTINGS) - {"steps", "about"}
    if unknown:
        raise SystemExit(f"{name}: expected {', '.join(SETTINGS)} or steps, got {sorted(unknown)}")
    elimination = method.get("elimination")
    if elimination is not None:
        sizes = {"context": options.context}
        elimination = {key: _number(value, sizes) for key, value in elimination.items()}
        if elimination.get("scorer") == "predictor":
            if options.predictors is None:
                raise SystemExit(f"--predictors: expected a folder, because '{name}' uses one")
            elimination["predictor"] = str(options.predictors)
    sizes = {"batch": options.batch}
    settings = {key: _number(value, sizes) for key, value in method.get("settings", {}).items()}
    return method | {"elimination": elimination, "settings": settings}


def _number(value: object, sizes: dict[str, int]) -> object:
    """What "context/4" or "batch*2" means, also inside of a group; other values as they are."""
    if isinstance(value, dict):
        return {key: _number(entry, sizes) for key, entry in value.items()}
    words = re.fullmatch(r"(\w+)([*/])(\d+)", value) if isinstance(value, str) else None
    if words is None or words[1] not in sizes:
        return value
    size, factor = sizes[words[1]], int(words[3])
    return size * factor if words[2] == "*" else math.ceil(size / factor)


def plant_copies(options: argparse.Namespace) -> Path:
    """Writes the documents of --train with copies in them; their path."""
    from lemo.data import read_documents
    from retrieval import with_copies

    path = options.work / f"copies-{options.context}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for document in with_copies(list(read_documents(options.train)), options.context):
            line = {"id": document.id, "kind": document.kind, "text": document.text}
            file.write(json.dumps(line) + "\n")
    return path


# --- the runs


def jobs_of(
    options: argparse.Namespace, steps: dict[str, int], equal: str = "steps"
) -> Iterator[dict]:
    """What each process has to know, methods in turn, seed after seed."""
    for seed in options.seeds:
        for name in steps:
            yield {
                "name": name,
                "seed": seed,
                "equal": equal,
                "steps": steps[name],
                "method": options.known[name],
                "options": {key: _plain(value) for key, value in vars(options).items()},
                "output": str(options.work / f"{name}-{options.context}-{equal}-{seed}"),
            }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def run_all(options: argparse.Namespace, jobs: Iterable[dict]) -> list[dict]:
    """Runs the jobs, as many at a time as there are places; the rows of those that succeeded."""
    waiting, rows, failed = list(jobs), [], []
    places = options.gpus * options.jobs
    running: dict[subprocess.Popen, tuple[dict, int]] = {}
    while waiting or running:
        while waiting and places:
            job, gpu = waiting.pop(0), places.pop(0)
            running[_start(job, gpu, options)] = (job, gpu)
        time.sleep(0.2)
        for process in [process for process in running if process.poll() is not None]:
            job, gpu = running.pop(process)
            places.append(gpu)
            result = Path(job["output"] + ".result.json")
            if process.returncode != 0 or not result.exists():
                failed.append(job["name"])
                print(f"{job['name']}: exit code {process.returncode}; {job['output']}.log")
                continue
            rows.append(json.loads(result.read_text(encoding="utf-8")))
            print(f"{job['name']} seed {job['seed']}: {summary(rows[-1])}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return rows


def _start(job: dict, gpu: int, options: argparse.Namespace) -> subprocess.Popen:
    path = Path(job["output"] + ".job.json")
    path.write_text(json.dumps(job), encoding="utf-8")
    Path(job["output"] + ".result.json").unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    if options.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with open(job["output"] + ".log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "--worker", str(path)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def summary(row: dict) -> str:
    figures = [f"{key} {value:.3f}" for key, value in row["perplexity"].items()]
    return f"{', '.join(figures)}; {row['seconds']:.0f} s in all"


def work(path: Path) -> None:
    """One run: fine-tune, evaluate, leave a row in a file. The process of a method."""
    import torch  # noqa: F401  # what takes long, before others have to wait

    import lemo.training.finetune  # noqa: F401

    job = json.loads(path.read_text(encoding="utf-8"))
    options, method = job["options"], job["method"]
    with contextlib.ExitStack() as stack:
        if options["exclusive"]:
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            lock = stack.enter_context(open(Path(options["work"]) / f"gpu{gpu}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        row = measure(job, options, method)
    Path(job["output"] + ".result.json").write_text(json.dumps(row) + "\n", encoding="utf-8")


def measure(job: dict, options: dict, method: dict) -> dict:
    """Trains and evaluates; the row."""
    start = time.perf_counter()
    changed = method.get("settings", {})
    training = train(job, options, method)
    trained = time.perf_counter()
    return {
        "bench": "quality",
        "method": job["name"],
        "seed": job["seed"],
        "equal": job["equal"],
        "protocol_steps": options["steps"],
        "shape": {
            "model": Path(options["model"]).name,
            "context": options["context"],
            "batch": options["batch"],
            "steps": job["steps"],
            "learning_rate": changed.get("learning_rate", options["learning_rate"]),
            "lora_rank": options["rank"],
            **({"windows": changed["batch_size"]} if "batch_size" in changed else {}),
            **({"copies": True} if options["copies"] else {}),
        },
        "settings": {key: method[key] for key in SETTINGS if method.get(key)},
        **training,
        **evaluate_run(job, options),
        "runs_at_a_time": 1 if options["exclusive"] else options["jobs"],
        "seconds_evaluating": round(time.perf_counter() - trained, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "commit": options["commit"],
        "date": datetime.date.today().isoformat(),
    }


def train(job: dict, options: dict, method: dict) -> dict:
    """What the run's log says; nothing where there is nothing to train."""
    if job["steps"] == 0:
        return {}
    from lemo.settings.finetune import FinetuneConfig
    from lemo.training.finetune import finetune

    changed = method.get("settings", {})
    settings = {
        "model": options["model"],
        "documents": options["train"],
        "output": job["output"],
        "context_length": options["context"],
        "steps": job["steps"],
        "batch_size": options["batch"] // changed.get("gradient_accumulation", 1),
        "learning_rate": options["learning_rate"],
        "warmup_steps": min(options["warmup"], job["steps"]),
        "lora_rank": options["rank"],
        "train_norms": True,
        "seed": job["seed"],
        "device": options["device"],
        "save_every": job["steps"],
        "overwrite": True,
        "elimination": method["elimination"],
    }
    result = finetune(FinetuneConfig(**settings | changed))
    from lemo.training.run_log import LOG_NAME, read_log

    records = read_log(result.folder / LOG_NAME)
    # The first steps allocate and compile; of schedules every part counts as often as it comes.
    times = [record["seconds"] for record in records[min(4, len(records) // 2) :]]
    return {
        "step_seconds": round(statistics.mean(times), 4),
        "step_seconds_range": [round(min(times), 4), round(max(times), 4)],
        "training_seconds": round(sum(record["seconds"] for record in records), 2),
        "peak_memory_gib": round(result.peak_memory_bytes / 2**30, 3),
        "kept_share": round(statistics.mean(record["kept_share"] for record in records), 4),
        "last_loss": round(statistics.mean(record["loss"] for record in records[-10:]), 4),
    }


def evaluate_run(job: dict, options: dict) -> dict:
    import torch

    from lemo.data import read_documents
    from lemo.training.evaluate import evaluate, load_for_evaluation
    from lemo.training.model import load_tokenizer
    from retrieval import retrieval_accuracy, retrieval_windows

    tokenizer = load_tokenizer(options["model"])
    model = load_for_evaluation(
        options["model"],
        options["context"],
        adapter=job["output"] if job["steps"] else None,
        rope_scaling="linear",
        device=options["device"],
    )
    documents = list(read_documents(options["eval"]))
    perplexity = {}
    for kind in sorted({document.kind for document in documents}):
        of_kind = [document for document in documents if document.kind == kind]
        limit = options["books"] if kind == "book" else options["others"]
        (row,) = evaluate(model, of_kind, [options["context"]], tokenizer=tokenizer, limit=limit)
        perplexity[kind] = round(row["perplexity"], 4)
        perplexity[f"{kind}_tail"] = round(row["tail_perplexity"], 4)
    books = [document for document in documents if document.kind == "book"] or documents
    model.eval()
    accuracy = retrieval_accuracy(model, retrieval_windows(books, tokenizer, options["context"]))
    cuda = model.device.type == "cuda"
    return {
        "perplexity": perplexity,
        "retrieval": {depth: round(value, 2) for depth, value in accuracy.items()},
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
    }


def earlier_rows(options: argparse.Namespace) -> list[dict]:
    """What --output has of this protocol at equal steps, alone on this kind of GPU."""
    import torch

    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    rate = options.learning_rate
    protocol = (options.context, options.steps, options.batch, rate, options.copies, "steps")
    rows = read_rows(options.output) if options.output.exists() else []
    return [
        row
        for row in rows
        if protocol_of(row) == protocol and row["gpu"] == gpu and row["runs_at_a_time"] == 1
    ]


def equal_time_steps(options: argparse.Namespace, rows: list[dict]) -> dict[str, int]:
    """Steps of the other methods that take as long as those of the first one, from its rows."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if "step_seconds" in row:
            seconds.setdefault(row["method"], []).append(row["step_seconds"])
    first, *others = options.methods
    if first not in seconds:
        raise SystemExit(
            f"--equal time: '{first}' did not train here, nor earlier alone on "
            "this kind of GPU: there is no time to equal"
        )
    budget = options.steps * statistics.mean(seconds[first])
    return {
        name: max(round(budget / statistics.mean(seconds[name])), 1)
        for name in others
        if name in seconds
    }


# --- the table


def read_rows(path: Path) -> list[dict]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["bench"] == "quality"]


def protocol_of(row: dict) -> tuple:
    """What rows have in common that may be compared."""
    shape = row["shape"]
    return (
        shape["context"],
        row["protocol_steps"],
        shape["batch"],
        shape["learning_rate"],
        shape.get("copies", False),
        row["equal"],
    )


def table(rows: Iterable[dict]) -> str:
    """Methods as Markdown, a table for each protocol: means over seeds, perplexities also as shares
    of dense LoRA's."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = protocol_of(row)
        groups.setdefault(key, {}).setdefault(row["method"], []).append(row)
    for key, methods in groups.items():
        # In the time of dense LoRA's own steps.
        same = groups.get((*key[:-1], "steps"), {})
        if "dense" in same:
            groups[key] = {"dense": same["dense"]} | methods
    return "\n\n".join(table_of(key, methods) for key, methods in groups.items())


def table_of(protocol: tuple, methods: dict[str, list[dict]]) -> str:
    """The table of one protocol, from the rows of each method."""
    kinds = list(next(iter(methods.values()))[0]["perplexity"])
    dense = methods.get("dense", [])
    context, steps, batch, rate, copies, equal = protocol
    whose = f"{steps} steps" if equal == "steps" else f"the time of {steps} steps of dense LoRA"
    lines = [
        f"{context} tokens, {whose}, {batch} windows a step, learning rate {rate:g}"
        + (", texts with copies in them" if copies else ""),
        "",
        "| | steps | kept | s a step | GiB | " + " | ".join(kinds) + " | retrieval |",
        "|---" + "|---:" * (5 + len(kinds)) + "|",
    ]
    timed = [row for rows in methods.values() for row in rows if "step_seconds" in row]
    # Times of runs that shared a GPU stand where no run had one alone, and with how many it was.
    fewest = min((row["runs_at_a_time"] for row in timed), default=1)
    for name, rows in methods.items():
        cells = [
            name + (f" ({len(rows)} runs)" if len(rows) > 1 else ""),
            f"{rows[0]['shape']['steps']}",
            _cell(rows, "kept_share", ".2f"),
            _times(rows, fewest),
            _cell(rows, "peak_memory_gib", ".1f"),
        ]
        for kind in kinds:
            value = statistics.mean(row["perplexity"][kind] for row in rows)
            share = share_of(rows, dense, kind)
            cells.append(f"{value:.3f}" + ("" if share is None else f" ({share:.4f})"))
        retrieval = statistics.mean(row["retrieval"]["mean"] for row in rows)
        cells.append(f"{retrieval:.1f}%")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share_of(rows: list[dict], dense: list[dict], kind: str) -> float | None:
    """Mean over runs of their perplexity as a share of dense LoRA's on the same windows.

    Windows and their order are a seed's; None where dense LoRA has not run on any.
    """
    base: dict[int, list[float]] = {}
    for row in dense:
        base.setdefault(row["seed"], []).append(row["perplexity"][kind])
    shares = [
        row["perplexity"][kind] / statistics.mean(base[row["seed"]])
        for row in rows
        if row["seed"] in base
    ]
    return statistics.mean(shares) if shares else None


def _cell(rows: list[dict], name: str, form: str) -> str:
    if name not in rows[0]:
        return ""
    return format(statistics.mean(row[name] for row in rows), form)


def _times(rows: list[dict], at_a_time: int) -> str:
    """Seconds of a step of the runs that were so many at a time, for each kind of GPU."""
    times: dict[str, list[float]] = {}
    shared = f" shared by {at_a_time}" if at_a_time > 1 else ""
    for row in rows:
        if "step_seconds" in row and row["runs_at_a_time"] == at_a_time:
            gpu = (row["gpu"] or "CPU").removeprefix("NVIDIA ").split()[0] + shared
            times.setdefault(gpu, []).append(row["step_seconds"])
    return ", ".join(f"{statistics.mean(values):.3f} {gpu}" for gpu, values in times.items())


def main() -> None:
    options = parse_arguments()
    if options.worker:
        work(options.worker)
        return
    if not options.table:
        options.work.mkdir(parents=True, exist_ok=True)
        if options.copies:
            options.train = plant_copies(options)
        rows = []
        if "steps" in options.equal:
            steps = {
                name: options.known[name].get("steps", options.steps) for name in options.methods
            }
            rows = run_all(options, jobs_of(options, steps))
        if "time" in options.equal:
            steps = equal_time_steps(options, rows or earlier_rows(options))
            rows += run_all(options, jobs_of(options, steps, "time"))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(read_rows(options.output)))


if __name__ == "__main__":
    main()
