"""The main job on one GPU through the command line, with trained predictors and a resumption.

    python benchmarks/gpu_main_job.py --model MODEL --train TRAIN --eval EVAL --output FILE.jsonl

Runs, each as a process of its own:

    lemo prepare     predictors from windows of the training documents
    lemo eval        the model before, its context extended by position interpolation
    lemo finetune    with the predictors; interrupted after half of the steps, then --resume
    lemo finetune    the same without an interruption: the losses must agree
    lemo finetune    --dense, the peer: the same LoRA, windows, order and seed
    lemo eval        both adapters, densely

The job fails where a command fails, the resumed losses differ, or the perplexity does not fall.
Figures are printed in the last two cases, too, and otherwise appended to --output: seconds of a
step, memory, perplexity of every kind of document.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

PEER = "dense LoRA"
INTERRUPTED = 130


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument("--train", type=Path, required=True, help="documents to train on")
    parser.add_argument("--eval", type=Path, required=True, help="held-out documents")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_main_job"), help="emptied")
    parser.add_argument("--context", type=int, default=16384, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, every linear layer")
    parser.add_argument("--windows", type=int, default=16, help="windows for the predictors")
    parser.add_argument("--predictor-steps", type=int, default=150)
    parser.add_argument("--eval-documents", type=int, default=4, help="documents of each kind")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="unknown", help="commit of the measured tree")
    options = parser.parse_args(arguments)
    if options.steps < 8 or options.steps % 2:
        parser.error(f"--steps: expected an even number of at least 8, got {options.steps}")
    return options


class Job:
    """The commands of one job; `seconds` tells how long each took."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.seconds: dict[str, float] = {}

    def lemo(self, name: str, *arguments: object) -> None:
        """Runs one command to its end."""
        start = time.perf_counter()
        code = self._start(*arguments).wait()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name}: {self.seconds[name]} s", flush=True)
        if code != 0:
            raise SystemExit(f"{name}: exit code {code}")

    def _start(self, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "lemo", *map(str, arguments)]
        # A shell may have this script ignore the signal that the job needs.
        return subprocess.Popen(
            [*command, "--device", self.options.device],
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def prepare(self, folder: Path) -> dict:
        options = self.options
        self.lemo(
            "prepare",
            *("prepare", "--model", options.model, "--documents", options.train),
            *("--output", folder, "--lengths", options.context, "--windows", options.windows),
            *("--held-out-windows", 4, "--steps", options.predictor_steps),
            *("--keep", options.keep, "--search-rounds", 0),
        )
        return json.loads((folder / "predictor.json").read_text())

    def evaluate(self, name: str, run: Path | None) -> list[dict]:
        options = self.options
        path = options.work / f"{name}.json"
        whose = ["--model", options.model, "--rope-scaling", "linear"]
        self.lemo(
            f"eval {name}",
            *("eval", "--documents", options.eval, "--lengths", options.context),
            *("--limit", options.eval_documents, "--json", path),
            *(whose if run is None else ["--adapter", run]),
        )
        return json.loads(path.read_text())

    def _finetune(self, run: Path, predictor: Path | None) -> list[object]:
        options = self.options
        how: list[object] = ["--dense"]
        if predictor is not None:
            how = ["--predictor", predictor, "--keep", options.keep]
            # The losses after the resumption are compared bit by bit; the peer is left as fast as
            # it can be.
            how += ["--set", "deterministic=true"]
        return [
            *("finetune", "--model", options.model, "--documents", options.train, "--output", run),
            *("--context-length", options.context, "--steps", options.steps),
            *("--learning-rate", options.learning_rate, "--lora-rank", options.rank),
            *("--save-every", options.steps // 2, "--set", "warmup_steps=4", *how),
        ]

    def finetune(self, name: str, run: Path, predictor: Path | None) -> None:
        self.lemo(name, *self._finetune(run, predictor))

    def finetune_in_two_parts(self, run: Path, predictor: Path) -> None:
        """Interrupted as by Ctrl-C once the checkpoint of half of the steps is there."""
        start = time.perf_counter()
        arguments = self._finetune(run, predictor)
        process = self._start(*arguments)
        checkpoint = run / "checkpoints" / f"step-{self.options.steps // 2}"
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code = process.wait()
        if code != INTERRUPTED:
            raise SystemExit(f"finetune: expected to be interrupted, got exit code {code}")
        done = read_log(run)[-1]["step"]
        print(f"finetune: interrupted after step {done}", flush=True)
        self.lemo("resume", *arguments, "--resume")
        self.seconds["finetune in two parts"] = round(time.perf_counter() - start, 1)


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def timing(log: list[dict]) -> tuple[float, list[float]]:
    """Median and range of the seconds of a step; the first steps warm up."""
    seconds = [record["seconds"] for record in log[3:]]
    return statistics.median(seconds), [round(min(seconds), 4), round(max(seconds), 4)]


def check(log: list[dict], whole: list[dict], steps: int) -> list[str]:
    """What tells that the run is not complete, or not the one that was not interrupted."""
    for records in (log, whole):
        if [record["step"] for record in records] != list(range(1, steps + 1)):
            raise SystemExit(f"finetune: expected steps 1 to {steps} once each in the log")
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(log, whole, strict=True)]
    print(f"largest difference of a loss to the run without interruption: {max(apart):.2e}")
    if max(apart) <= 1e-6:
        return []
    first = next(step for step, distance in enumerate(apart, 1) if distance > 1e-6)
    return [
        f"resume: expected the losses of an uninterrupted run, got {max(apart):.2e} off, "
        f"from step {first} on; the checkpoint is of step {steps // 2}"
    ]


def check_learning(before: list[dict], after: list[dict]) -> list[str]:
    """Dense perplexity falls, in the mean of the kinds; single losses depend on the window."""
    first, last = (
        statistics.mean(math.log(row["perplexity"]) for row in rows) for rows in (before, after)
    )
    print(f"dense evaluation: mean loss {first:.4f} before, {last:.4f} after")
    if last < first:
        return []
    return [f"finetune: expected the loss to fall, got {first:.4f}, then {last:.4f}"]


def records(
    options: argparse.Namespace,
    job: Job,
    description: dict,
    logs: tuple[list[dict], list[dict]],
    evaluations: tuple[list[dict], list[dict], list[dict]],
) -> list[dict]:
    """Figures of lemo beside the peer: time, memory, perplexity."""
    import torch

    on_gpu = options.device == "cuda"
    shape = {
        "model": options.model.resolve().name,
        "context": options.context,
        "batch": 1,
        "steps": options.steps,
        "lora_rank": options.rank,
        "keep": options.keep,
        "scorer": "predictor",
        "select_at": "first",
        "deterministic": True,
    }
    extra = {
        "recall": {kind: round(value, 4) for kind, value in description["recall"].items()},
        "seconds": job.seconds,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
        "commit": options.commit,
        "date": datetime.date.today().isoformat(),
    }

    def figure(bench: str, unit: str, ours: float, peer: float, **more: object) -> dict:
        return {
            "bench": f"gpu_main_job.{bench}",
            "shape": shape,
            "ours": round(ours, 4),
            "peer": PEER,
            "peer_value": round(peer, 4),
            "ratio": round(ours / peer, 4),
            "unit": unit,
            **more,
            **extra,
        }

    (ours, spread), (peer, peer_spread) = map(timing, logs)
    found = [figure("step", "s", ours, peer, range=spread, peer_range=peer_spread)]
    peaks = [max(record["peak_memory_bytes"] for record in log) / 2**30 for log in logs]
    found.append(figure("memory", "GiB", *peaks))
    for before, after, dense in zip(*evaluations, strict=True):
        for part, name in (("whole", "perplexity"), ("tail", "tail_perplexity")):
            more = {"before": round(before[name], 4), "documents": after["documents"]}
            bench = f"perplexity.{after['kind']}.{part}"
            found.append(figure(bench, "perplexity", after[name], dense[name], **more))
    return found


def main() -> None:
    options = parse_arguments()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    job = Job(options)
    predictor, run, whole, dense = (
        options.work / name for name in ("predictors", "run", "uninterrupted", "dense")
    )
    description = job.prepare(predictor)
    before = job.evaluate("before", None)
    job.finetune_in_two_parts(run, predictor)
    job.finetune("finetune", whole, predictor)
    problems = check(read_log(run), read_log(whole), options.steps)
    job.finetune("finetune dense", dense, None)
    evaluations = before, job.evaluate("after", run), job.evaluate("dense", dense)
    problems += check_learning(*evaluations[:2])
    # Times come from the run that nothing disturbed.
    logs = read_log(whole), read_log(dense)
    found = records(options, job, description, logs, evaluations)
    for record in found:
        print(
            f"{record['bench']:<36} {record['ours']:>9} {record['unit']:<10} "
            f"{PEER} {record['peer_value']:>9} ratio {record['ratio']}"
        )
    if problems:
        raise SystemExit("\n".join(problems))
    with options.output.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in found)


if __name__ == "__main__":
    main()
