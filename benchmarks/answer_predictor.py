"""Trains a predictor of relevance on the tasks of answers.py, for its --predictor.

    python benchmarks/answer_predictor.py --model MODEL --train TRAIN.jsonl.xz \\
        --eval EVAL.jsonl.xz --folder FOLDER [--heads HEADS]

It learns from windows of --train: from what retrieval heads of the model look at with --heads,
without them from what the benchmark knows that answers need. Facts of one form that answer nothing
are most of those in a window, in numbers that change (--facts), so that a predictor has to tell
more than what a fact looks like. Held-out windows are of --eval, with other paraphrases. The folder
is that of `lemo prepare`; a row of recall for each task is appended to --output.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from answer_tasks import TASKS, Mixture, Window, load_haystacks
from common import records
from lemo.predictors.model import model_shape
from lemo.preparation.relevance import RelevanceWindow, prepare_relevance
from lemo.relevance.answers import Answers
from lemo.relevance.heads import RetrievalHeads
from lemo.settings.preparation import PredictorSettings
from lemo.training.model import extend_context, load_config, load_model, load_tokenizer, pick_dtype

# Of what is held out, the same for every seed of training.
HELD_OUT_SEED = 20_000


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "relevance_predictor.jsonl")
    records.add_documents(parser)
    parser.add_argument("--folder", type=Path, required=True, help="to write")
    parser.add_argument("--heads", help="file of `lemo relevance heads`, to learn from")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        metavar="TASK",
        default=["reworded", "paraphrase", "number", "name", "key", "book"],
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of a window")
    parser.add_argument("--windows", type=int, default=1200, help="to learn from")
    parser.add_argument("--eval-windows", type=int, default=8, help="held-out windows of a task")
    parser.add_argument(
        "--facts", type=int, nargs="+", default=[24, 48], help="of a window, in turn"
    )
    parser.add_argument("--asked", type=int, default=6, help="questions of a window, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="of PredictorSettings"
    )
    parser.add_argument("--characters", type=int, default=200_000, help="of a document, at most")
    parser.add_argument("--cache", type=Path, default=Path("runs/answers"), help="of tokens")
    parser.add_argument("--workers", type=int, default=2, help="processes that make windows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


class _Windows(torch.utils.data.Dataset):
    """Item number i: window i of the mixtures, in turn for as many windows as there are tasks."""

    def __init__(self, mixtures: list[Mixture], count: int, tokens: int) -> None:
        self._mixtures, self._count, self._tokens = mixtures, count, tokens

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> RelevanceWindow:
        turn = index // len(self._mixtures[0].tasks)
        mixture = self._mixtures[turn % len(self._mixtures)]
        return relevance_window(mixture.window(index, self._tokens))


def relevance_window(window: Window) -> RelevanceWindow:
    """A window of the benchmark with what its answers need, for `prepare_relevance`."""
    labelled = torch.zeros(len(window.ids), dtype=torch.bool)
    labelled[:-1] = window.labels[1:] != -100
    return RelevanceWindow(
        window.task, window.ids, labelled, tuple(answer.needed for answer in window.answers)
    )


def without_needs(window: RelevanceWindow) -> RelevanceWindow:
    """The same, for heads to say what is needed."""
    return RelevanceWindow(window.kind, window.ids, window.labelled)


def made(mixtures: list[Mixture], count: int, options: argparse.Namespace) -> list[RelevanceWindow]:
    loader = DataLoader(
        _Windows(mixtures, count, options.tokens),
        batch_size=None,
        num_workers=options.workers,
        collate_fn=lambda window: window,
    )
    # A copy, because what comes from another process holds a file open.
    return [
        replace(window, ids=window.ids.clone(), labelled=window.labelled.clone())
        for window in loader
        if Answers.of(window.labelled) is not None
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    values = dict(entry.split("=", 1) for entry in options.set)
    settings = PredictorSettings.from_dict(
        {name: _value(value) for name, value in values.items()}
        | {"target": "relevance", "seed": options.seed}
    )
    config = load_config(str(options.model))
    heads = None
    if options.heads is not None:
        heads = RetrievalHeads.load(options.heads, model_shape(config))
    extend_context(config, options.tokens, "linear")
    tokenizer = load_tokenizer(str(options.model))
    characters = max(options.characters, 8 * options.tokens)
    train, held_out = (
        load_haystacks(path, tokenizer, characters, options.cache)
        for path in (options.train, options.eval)
    )

    def mixtures(tasks: list[str], texts: object, seed: int, held: bool) -> list[Mixture]:
        sizes = (tokenizer, seed)
        return [Mixture(tasks, texts, *sizes, n, options.asked, held) for n in options.facts]

    training = made(mixtures(options.tasks, train, options.seed, False), options.windows, options)
    if heads is not None:
        training = [without_needs(window) for window in training]
    tested = made(
        mixtures(options.tasks, held_out, HELD_OUT_SEED, True),
        options.eval_windows * len(options.tasks),
        options,
    )
    dtype = pick_dtype("auto", torch.device(options.device))
    model = load_model(str(options.model), config, dtype).to(options.device)
    start = time.perf_counter()

    def report(stage: str, done: int, total: int, message: str) -> None:
        if done % max(total // 10, 1) == 0:
            print(f"{stage} {done}/{total}: {message}", flush=True)

    description = prepare_relevance(
        model, training, tested, options.folder, settings, heads, True, report
    )
    seconds = time.perf_counter() - start
    rows = []
    for task, recall in description["recall"].items():
        rows.append(
            {
                "bench": "relevance_predictor",
                "model": options.model.name,
                "task": task,
                "tokens": options.tokens,
                "teacher": "known" if heads is None else "heads",
                "keep": settings.keep,
                **{name: round(100 * share, 2) for name, share in recall.items()},
                "facts": options.facts,
                "seed": options.seed,
                "seconds": round(seconds, 1),
                "loss": round(description["loss"], 4),
                "parameters": description["parameters"],
                "settings": values,
                **records.provenance(options.commit, options.device),
            }
        )
        print(task, recall, flush=True)
    records.append(options.output, rows)
    return 0


def _value(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    sys.exit(main())
