"""Quality of fine-tuned models: named methods under one protocol, and one table of them.

    python benchmarks/quality.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz

Measured: perplexity of held-out documents, over the whole window and over its last quarter, each
kind of document separately; retrieval of a passage planted far back (`retrieval.py`); kept share,
seconds of a step and peak memory. Against: the other methods, "dense" (dense LoRA) above all. Takes
two to five minutes a method for a model of 28M parameters on an H200.

Every method of `quality.yaml` (--methods picks some) fine-tunes the same model on the same windows
in the same order and is then evaluated densely. Each run is a process of its own, --jobs at a time
on each of --gpus; times count of runs that had a GPU alone (--jobs 1). What is reported of a method
comes from the very same run.

--copies plants passages and copies of them in the documents to train on, so that the models can
learn what the retrieval task asks for; perplexities of such runs compare with each other only.

--equal steps time afterwards gives every method the wall-clock time that the first one (dense LoRA,
say) took for its steps, judged by how long the steps of each took. --equal time alone takes these
times from --output, where the same protocol has run, one run at a time, on the same kind of GPU.

Rows are appended to --output, and the tables of all of its rows are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common import records
from common.methods import read_methods
from common.processes import measure_all, run_script
from quality_table import protocol_of, table

SETTINGS = ("elimination", "settings")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "quality.jsonl")
    records.add_documents(parser)
    parser.add_argument("--methods", nargs="+", help="names in --file (default: all)")
    parser.add_argument(
        "--file", type=records.existing, default=Path(__file__).with_suffix(".yaml")
    )
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
    parser.add_argument("--threads", type=int, default=4, help="CPU threads of a run")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    options = parser.parse_args(arguments)
    if options.equal == ["time", "steps"]:
        parser.error("--equal: expected 'steps' first, which says how long the steps are")
    sizes = {"context": options.context, "batch": options.batch}
    try:
        found = read_methods(options.file, options.methods, sizes, "--methods")
        options.known = {name: check(name, each, options) for name, each in found.items()}
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    options.methods = list(options.known)
    return options


def check(name: str, method: dict, options: argparse.Namespace) -> dict:
    """A method with all of its parts; ArgumentTypeError where it has another or lacks one."""
    unknown = set(method) - {*SETTINGS, "steps", "about"}
    if unknown:
        expected = ", ".join((*SETTINGS, "about or steps"))
        raise argparse.ArgumentTypeError(f"{name}: expected {expected}, got {sorted(unknown)}")
    elimination = method.get("elimination")
    if elimination is not None:
        # lemo's default follows the labels, and words would be meant by the same name.
        elimination = {"scorer": "random"} | elimination
    if elimination is not None and elimination["scorer"] == "predictor":
        if options.predictors is None:
            raise argparse.ArgumentTypeError(
                f"--predictors: expected a folder, because '{name}' uses one"
            )
        elimination["predictor"] = str(options.predictors)
    return method | {"elimination": elimination, "settings": method.get("settings", {})}


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
    plain = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key != "known"
    }
    for seed in options.seeds:
        for name in steps:
            yield {
                "name": name,
                "seed": seed,
                "equal": equal,
                "steps": steps[name],
                "method": options.known[name],
                "options": plain,
                "output": str(options.work / f"{name}-{options.context}-{equal}-{seed}"),
            }


def run_all(options: argparse.Namespace, jobs: Iterable[dict]) -> list[dict]:
    """Runs the jobs, as many at a time as there are places; the rows of those that succeeded."""
    places = [{"OMP_NUM_THREADS": str(options.threads)} for _ in options.gpus * options.jobs]
    if options.device == "cuda":
        for place, gpu in zip(places, options.gpus * options.jobs):
            place["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with_logs = [(job, Path(job["output"] + ".log")) for job in jobs]
    rows = []
    for row in measure_all(__file__, with_logs, places):
        if row is not None:
            figures = ", ".join(f"{kind} {value:.3f}" for kind, value in row["perplexity"].items())
            print(f"{row['method']} seed {row['seed']}: {figures}; {row['seconds']:.0f} s in all")
            records.append(options.output, [row])
            rows.append(row)
    return rows


def worker(job: dict) -> Callable[[str], dict]:
    """One run: fine-tunes and evaluates; the row."""
    options, method = job["options"], job["method"]

    def answer(_: str) -> dict:
        start = time.perf_counter()
        changed = method["settings"]
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
            "runs_at_a_time": options["jobs"],
            "seconds_evaluating": round(time.perf_counter() - trained, 1),
            "seconds": round(time.perf_counter() - start, 1),
            **records.provenance(options["commit"], options["device"]),
        }

    return answer


def train(job: dict, options: dict, method: dict) -> dict:
    """What the run's log says; nothing where there is nothing to train."""
    if job["steps"] == 0:
        return {}
    from common.timing import summary
    from lemo.settings.finetune import FinetuneConfig
    from lemo.training.finetune import finetune
    from lemo.training.run_log import LOG_NAME, read_log

    changed = method["settings"]
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
    result = finetune(FinetuneConfig.from_dict(settings | changed))
    log = read_log(result.folder / LOG_NAME)

    def mean(name: str, of: list[dict]) -> float:
        return statistics.mean(record[name] for record in of)

    # The first steps allocate and compile; of schedules every part counts as often as it comes.
    timed = log[min(4, len(log) // 2) :]
    return {
        "step_seconds": round(mean("seconds", timed), 4),
        "step_seconds_range": summary([record["seconds"] for record in timed]).range,
        "training_seconds": round(sum(record["seconds"] for record in log), 2),
        "peak_memory_gib": round(result.peak_memory_bytes / 2**30, 3),
        "kept_share": round(mean("kept_share", log), 4),
        "last_loss": round(mean("loss", log[-10:]), 4),
    }


def evaluate_run(job: dict, options: dict) -> dict:
    """Perplexity and retrieval of a job's adapter, or of the model before."""
    from lemo.data import read_documents
    from lemo.training.evaluate import evaluate, load_for_evaluation
    from lemo.training.model import load_tokenizer
    from retrieval import retrieval_accuracy, retrieval_windows

    context, tokenizer = options["context"], load_tokenizer(options["model"])
    model = load_for_evaluation(
        options["model"],
        context,
        adapter=job["output"] if job["steps"] else None,
        rope_scaling="linear",
        device=options["device"],
    )
    documents = list(read_documents(options["eval"]))
    perplexity = {}
    for kind in sorted({document.kind for document in documents}):
        of_kind = [document for document in documents if document.kind == kind]
        limit = options["books"] if kind == "book" else options["others"]
        (row,) = evaluate(model, of_kind, [context], tokenizer=tokenizer, limit=limit)
        perplexity[kind] = round(row["perplexity"], 4)
        perplexity[f"{kind}_tail"] = round(row["tail_perplexity"], 4)
    books = [document for document in documents if document.kind == "book"] or documents
    accuracy = retrieval_accuracy(model.eval(), retrieval_windows(books, tokenizer, context))
    retrieval = {depth: round(value, 2) for depth, value in accuracy.items()}
    return {"perplexity": perplexity, "retrieval": retrieval}


# --- the same time for every method


def earlier_rows(options: argparse.Namespace) -> list[dict]:
    """What --output has of this protocol at equal steps, alone on this kind of GPU."""
    gpu = records.provenance(options.commit, options.device)["gpu"]
    rate = options.learning_rate
    protocol = (options.context, options.steps, options.batch, rate, options.copies, "steps")
    return [
        row
        for row in records.read(options.output, "quality")
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


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.copies:
        options.train = plant_copies(options)
    rows, planned = [], 0
    for equal in options.equal:
        if equal == "steps":
            steps = {
                name: method.get("steps", options.steps) for name, method in options.known.items()
            }
        else:
            steps = equal_time_steps(options, rows or earlier_rows(options))
        jobs = list(jobs_of(options, steps, equal))
        planned += len(jobs)
        rows += run_all(options, jobs)
    print(table(records.read(options.output, "quality")))
    return 0 if len(rows) == planned else 1


if __name__ == "__main__":
    run_script(main, worker)
