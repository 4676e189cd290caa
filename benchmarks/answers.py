"""Answers to long prompts: named methods under one protocol.

    python benchmarks/answers.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz \\
        --method dense lexical-0.25 --seed 0 1 2 --tokens 16384 --steps 100

Windows of real text with facts in it, and questions at the end whose answers alone have labels
(`answer_tasks`). Each method of `answers.yaml` that is named fine-tunes LoRA on the same windows in
the same order, for --steps steps or for --minutes of steps, and is then evaluated densely on
held-out documents: percent of answers of which every token is the one that the model puts first, by
task and by depth of the fact. Measured besides: median seconds of a step with all that it costs to
score blocks, peak memory, the share of the blocks that answers need which were kept (recall, in
percent), and perplexity of ordinary text, which must not suffer.

Runs follow each other in this process. As soon as one is done, its rows are appended to --output:
one for each task, and the row "mean" of all tasks. Methods are fairly compared each at its best
learning rate: --learning-rate takes several and runs every method with each of them; without it a
method has its own (answers.yaml), or 5e-4. Runs that only measure quality may share a card as
several processes with --shared: their rows have no times, and the field "shared".

Longer windows than a model has seen are learned by way of shorter ones: --grow gives the lengths of
earlier parts of the steps, the scaling of the rotary embedding being that of --tokens throughout.

    python benchmarks/answers.py ... --method lexical-0.25 --tokens 32768 --grow 16384 \\
        --steps 200 --micro-batch 4 --learning-rate 1.5e-3

With --relevance nothing is trained: names of methods, or of scorers with blocks of 1/32 of a
window, are measured by the recall of one forward pass over each held-out window, at each of
--keeps. Rows are appended to relevance.jsonl. Their `scoring_s` is the median of what a forward
pass of one window takes longer than with random scores, both in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from answer_runs import (
    Method,
    Protocol,
    Recall,
    Trial,
    exact_answers,
    fine_tune,
    now,
    perplexity,
    shares,
)
from answer_tasks import TASKS, TRAINED, Haystacks, Mixture, Window, load_haystacks
from common import records
from common.methods import read_methods
from lemo import LemoConfig

FIELDS = ("elimination", "scores", "chunks", "in_dtype", "steps", "learning_rate", "about")
MEAN = "mean"
# Scorers that read what was found for the model before, and the field that names it.
FILES = {"attention": "heads", "predictor": "predictor"}
RELEVANCE = records.RESULTS / "relevance.jsonl"
# Of evaluation, the same for every seed of training.
HELD_OUT_SEED = 10_000
# Tokens of the shorter windows of ordinary text.
SHORT = 2048
BLOCK = 1 / 32
# Windows that the time of scores is measured on.
TIMED = 8
# Of methods that have none of their own.
LEARNING_RATE = 5e-4
# What other processes on the card change.
TIMES = ("step_s", "step_s_range", "training_s")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "answers.jsonl")
    records.add_documents(parser)
    parser.add_argument("--method", nargs="+", help="names in --file (default: all)")
    parser.add_argument(
        "--file", type=records.existing, default=Path(__file__).with_suffix(".yaml")
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of a window")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--minutes", type=float, help="of steps, in place of their number")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        choices=TRAINED,
        metavar="TASK",
        help="to train on; text: a document as it is, with labels on its last 128 tokens",
    )
    parser.add_argument("--eval-tasks", nargs="+", choices=TASKS, metavar="TASK", help="(--tasks)")
    parser.add_argument("--eval-windows", type=int, default=24, help="held-out windows of a task")
    parser.add_argument("--guard-windows", type=int, default=8, help="of ordinary text; 0: none")
    parser.add_argument("--facts", type=int, default=24, help="planted in a window")
    parser.add_argument("--asked", type=int, default=6, help="questions of a window, at most")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--micro-batch", type=int, help="windows of a forward pass (--batch)")
    parser.add_argument(
        "--learning-rate",
        type=float,
        nargs="+",
        metavar="RATE",
        help="each (the method's, or 5e-4)",
    )
    parser.add_argument(
        "--shared", action="store_true", help="others use the card meanwhile: no times in the rows"
    )
    parser.add_argument("--warmup", type=int, default=10, help="steps of rising learning rate")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, every linear layer")
    parser.add_argument("--rope", default="linear", help="scaling beyond the model's context")
    parser.add_argument(
        "--grow", type=int, nargs="+", default=[], help="tokens of windows in earlier parts"
    )
    parser.add_argument("--recompute", help="LemoConfig's, for every method that has none")
    parser.add_argument("--heads", help="file of `lemo relevance heads`, for scorer attention")
    parser.add_argument("--predictor", help="folder of `lemo prepare`, for scorer predictor")
    parser.add_argument("--evaluate-every", type=int, default=0, help="steps; 0: only at the end")
    parser.add_argument("--relevance", nargs="+", metavar="SCORER", help="recall only")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--characters", type=int, default=200_000, help="of a document, at most")
    parser.add_argument("--cache", type=Path, default=Path("runs/answers"), help="of tokens")
    parser.add_argument("--workers", type=int, default=2, help="processes that make windows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    options.micro_batch = options.micro_batch or options.batch
    options.eval_tasks = options.eval_tasks or [each for each in options.tasks if each in TASKS]
    if not options.eval_tasks:
        parser.error("--eval-tasks: expected tasks that ask for something, got none")
    if options.minutes and options.shared:
        parser.error("--shared: expected --steps, because time tells nothing, got --minutes")
    if options.minutes and options.grow:
        parser.error("--grow: expected --steps, because its parts are parts of them, got --minutes")
    if options.relevance and options.output == parser.get_default("output"):
        options.output = RELEVANCE
    try:
        options.methods = methods_of(options)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return options


def methods_of(options: argparse.Namespace) -> list[Method]:
    """The methods that are asked for; ArgumentTypeError where --file has none of a name."""
    sizes = {"context": options.tokens}
    if not options.relevance:
        found = read_methods(options.file, options.method, sizes, "--method")
        return [check(name, entry, options) for name, entry in found.items()]
    scorers = get_args(LemoConfig.model_fields["scorer"].annotation)
    known = read_methods(options.file, None, sizes, "--relevance")
    entries = {}
    for name in options.relevance:
        if name not in known and name not in scorers:
            raise argparse.ArgumentTypeError(
                f"--relevance: expected names of {options.file} or one of {', '.join(scorers)}, "
                f"got '{name}'"
            )
        scorer = {"elimination": {"scorer": name, "block_size": BLOCK}}
        entries[name] = known.get(name, scorer)
        if entries[name].get("elimination") is None:
            raise argparse.ArgumentTypeError(f"--relevance: '{name}' scores no blocks")
    return [check(name, entry, options) for name, entry in entries.items()]


def check(name: str, entry: dict, options: argparse.Namespace) -> Method:
    """A method, with the files that its scorer reads; ArgumentTypeError where it is no good."""
    unknown = set(entry) - set(FIELDS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{name}: expected {', '.join(FIELDS)}, got {sorted(unknown)}"
        )
    parts = {key: value for key, value in entry.items() if key != "about"}
    elimination = parts.get("elimination")
    if elimination is not None:
        changed = {"recompute": options.recompute} if options.recompute else {}
        scorer = elimination.get("scorer")
        if scorer is None and elimination.get("keep") != 1.0:
            # lemo's default follows the data: it would be another method under this name.
            raise argparse.ArgumentTypeError(
                f"{name}: expected elimination with a scorer, got none"
            )
        if scorer in FILES:
            changed[FILES[scorer]] = getattr(options, FILES[scorer])
            if changed[FILES[scorer]] is None:
                raise argparse.ArgumentTypeError(
                    f"--{FILES[scorer]}: expected a path, because '{name}' has scorer {scorer}"
                )
        parts["elimination"] = {**changed, **elimination}
        try:
            LemoConfig(**parts["elimination"])
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    return Method(name, **parts)


# --- what all runs share


@dataclass(frozen=True)
class Setting:
    """The model, and the texts.

    Attributes:
        base: the model, on the CPU, its context long enough.
        tokenizer: the model's.
        train, held_out: what windows are made of.
        windows: held-out ones, of every task.
    """

    base: PreTrainedModel
    tokenizer: Any
    train: Haystacks
    held_out: Haystacks
    windows: list[Window]


def load(options: argparse.Namespace) -> Setting:
    from lemo.training.model import (
        extend_context,
        load_config,
        load_model,
        load_tokenizer,
        pick_dtype,
    )

    config = load_config(str(options.model))
    extend_context(config, options.tokens, options.rope)
    tokenizer = load_tokenizer(str(options.model))
    dtype = pick_dtype("auto", torch.device(options.device))
    # Of documents that are shorter than a window no window can be cut.
    characters = max(options.characters, 8 * options.tokens)
    train, held_out = (
        load_haystacks(path, tokenizer, characters, options.cache)
        for path in (options.train, options.eval)
    )
    windows = []
    for task in options.eval_tasks:
        made = mixture_of([task], held_out, tokenizer, HELD_OUT_SEED, options, held_out=True)
        windows += [made.window(i, options.tokens) for i in range(options.eval_windows)]
    return Setting(
        load_model(str(options.model), config, dtype), tokenizer, train, held_out, windows
    )


def mixture_of(
    tasks: list[str],
    haystacks: Haystacks,
    tokenizer: Any,
    seed: int,
    options: argparse.Namespace,
    held_out: bool,
) -> Mixture:
    return Mixture(tasks, haystacks, tokenizer, seed, options.facts, options.asked, held_out)


def by_task(found: Iterable[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for each in found:
        groups.setdefault(each["task"], []).append(each)
    return groups


# --- training and evaluation


def run(
    method: Method, seed: int, rate: float, setting: Setting, options: argparse.Namespace
) -> list[dict]:
    """Fine-tunes with this learning rate and evaluates by one method; its rows."""
    trial = Trial(setting.base, method, options.rank, seed, options.device)
    try:
        training = train(trial, seed, rate, setting, options) if method.steps != 0 else {}
        found = by_task(exact_answers(trial.model, setting.windows))
        guard = {}
        if options.guard_windows:
            lengths = sorted({min(SHORT, options.tokens), options.tokens})
            guard = perplexity(trial.model, setting.held_out, lengths, options.guard_windows)
    finally:
        trial.close()
    if options.shared:
        training = {name: value for name, value in training.items() if name not in TIMES}
    return list(rows_of(method, seed, rate, training, found, guard, options))


def train(
    trial: Trial, seed: int, rate: float, setting: Setting, options: argparse.Namespace
) -> dict:
    protocol = Protocol(
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        micro_batch=options.micro_batch,
        learning_rate=rate,
        warmup=options.warmup,
        lengths=(*options.grow, options.tokens),
        workers=options.workers,
        evaluate_every=options.evaluate_every,
    )
    windows = mixture_of(
        options.tasks, setting.train, setting.tokenizer, seed, options, held_out=False
    )
    return fine_tune(
        trial,
        windows,
        protocol,
        lambda: mean_of(by_task(exact_answers(trial.model, setting.windows))),
    )


def mean_of(found: dict[str, list[dict]]) -> float:
    """Percent of exact answers, the mean over the tasks."""
    return round(statistics.mean(shares(answers)["exact"] for answers in found.values()), 2)


def rows_of(
    method: Method,
    seed: int,
    rate: float,
    training: dict,
    found: dict[str, list[dict]],
    guard: dict[str, float],
    options: argparse.Namespace,
) -> Iterator[dict]:
    """A row for each task, and that of the mean, which has what concerns the whole run."""
    recall = training.get("recall", {})
    described = records.provenance(options.commit, options.device)

    def row(task: str, exact: float, recalled: float | None, more: dict) -> dict:
        return {
            "bench": "answers",
            "model": options.model.name,
            "task": task,
            "tokens": options.tokens,
            "method": method.name,
            "scorer": method.scorer,
            "keep": method.keep,
            "seed": seed,
            "steps": training.get("steps", 0),
            "equal": "time" if options.minutes else "steps",
            "exact": exact,
            "step_s": training.get("step_s"),
            "scoring_s": None,
            "peak_gib": training.get("peak_gib"),
            "recall": None if recalled is None else round(recalled, 2),
            **({"minutes": options.minutes} if options.minutes else {}),
            **({"shared": True} if options.shared else {}),
            **more,
            **described,
        }

    for task, answers in found.items():
        shown = shares(answers)
        more = {name: value for name, value in shown.items() if name != "exact"}
        yield row(task, shown["exact"], recall.get(task), more)
    names = ("step_s_range", "training_s", "kept_share", "loss", "curve")
    more = {
        "tasks": options.tasks,
        "shape": {
            name: rate if name == "learning_rate" else getattr(options, name)
            for name in ("batch", "micro_batch", "learning_rate", "rank", "facts", "asked", "rope")
        },
        **({"grow": options.grow} if options.grow else {}),
        **{name: training[name] for name in names if training.get(name)},
        "perplexity": guard,
    }
    yield row(MEAN, mean_of(found), statistics.mean(recall.values()) if recall else None, more)


# --- recall without training


def relevance(method: Method, setting: Setting, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of one scorer, at each share of --keeps."""
    for keep in options.keeps:
        entry = {**method.elimination, "keep": keep}
        of_none = {name: x for name, x in entry.items() if name not in FILES.values()}
        trial, random = (
            Trial(setting.base, each, options.rank, 0, options.device)
            for each in (
                Method(method.name, entry, method.scores),
                Method("random", {**of_none, "scorer": "random"}),
            )
        )
        recall = Recall()
        for window in setting.windows:
            forward(trial, window)
            recall.add([window], trial.kept([window])())
        timed = setting.windows[:: max(len(setting.windows) // TIMED, 1)][:TIMED]
        longer = [forward(trial, each) - forward(random, each) for each in timed for _ in range(2)]
        trial.close()
        random.close()
        percent = recall.percent()
        percent[MEAN] = statistics.mean(percent.values())
        for task, value in percent.items():
            yield {
                "bench": "relevance",
                "model": options.model.name,
                "task": task,
                "tokens": options.tokens,
                "method": method.name,
                "scorer": method.scorer,
                "keep": keep,
                "recall": round(value, 2),
                "scoring_s": round(statistics.median(longer), 5),
                **records.provenance(options.commit, options.device),
            }


def forward(trial: Trial, window: Window) -> float:
    """Seconds of a training forward pass of one window, without its backward."""
    tensors = trial.prepared([window])
    start = now(trial.device)
    trial.loss(tensors)
    return now(trial.device) - start


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    setting = load(options)
    failed = 0
    for seed in [0] if options.relevance else options.seed:
        for method, rate in with_rates(options):
            try:
                if options.relevance:
                    rows = list(relevance(method, setting, options))
                else:
                    rows = run(method, seed, rate, setting, options)
            except torch.OutOfMemoryError as error:
                # The other methods may need less.
                print(f"{method.name}: {error}", flush=True)
                failed += 1
                continue
            records.append(options.output, rows)
            for row in rows:
                show(row)
    return 1 if failed else 0


def with_rates(options: argparse.Namespace) -> list[tuple[Method, float]]:
    """Every method with each learning rate that it runs with."""
    if options.relevance:
        return [(method, 0.0) for method in options.methods]
    return [(method, rate) for method in options.methods for rate in rates_of(method, options)]


def rates_of(method: Method, options: argparse.Namespace) -> list[float]:
    if method.steps == 0 or options.learning_rate is None:
        return [method.learning_rate or LEARNING_RATE]
    return options.learning_rate


def show(row: dict) -> None:
    """Prints what a row says, in a line."""
    names = ("exact", "recall", "step_s", "scoring_s", "peak_gib", "depth", "perplexity")
    figures = ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)
    rate = f", rate {row['shape']['learning_rate']:g}" if "shape" in row else ""
    print(f"{row['method']} keep {row['keep']:g}{rate}, {row['task']}: {figures}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
