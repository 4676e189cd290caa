"""Recall, size and transfer of the predictors of ``lemo prepare``, on a real model and real text.

    python benchmarks/predictors.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz

Every experiment trains predictors of all sub-blocks, as ``lemo prepare`` does, and asks how much of
the kept set of held-out documents (``--keep``) their ranking finds: mean over layers, attention and
MLP, each kind of document separately, and for the attention what the place of a block finds alone.
``base`` has the last size of ``--blocks``; the others differ from it in one thing each:

    block64, ...      the other sizes of --blocks
    windows           --many-windows instead of --windows
    half-rank, double-rank
    elastic           pruned to --prune-to of the hidden units while it trains
    elastic-attention attention's pruned to .4 of them, the MLP's not
    one-kind          trained on the first kind of documents only, tested on all
    longer            the predictors of base, tested on windows of --long-length
    long              trained and tested on windows of --long-length
    long-block2048    the same with blocks of --long-block tokens

and, where ``--experiments`` names them,

    mixed             trained on windows of both lengths, tested on long ones
    more-steps        three times the steps
    batch16           16 windows a step instead of 4
    rank-loss0, rank-loss1    weight of the ranking loss
    all-in            many windows, three times the steps, 8 windows a step

The inputs and labels of all windows are made once and go to the disk below ``--work`` (tokens x
layers x 2 x hidden size x 2 bytes; gone at the end); labels for more sizes of blocks cost no
further space. The model's context is extended to ``--long-length`` for all of it, as ``lemo
prepare`` does for windows of both lengths. ``--jobs`` processes train, a layer at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lemo.data.documents import Document, read_documents
from lemo.data.windows import token_windows
from lemo.models.architectures import architecture_of
from lemo.models.capture import capture_sub_blocks
from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import default_rank, make_predictor
from lemo.predictors.position import PositionProfile
from lemo.predictors.storage import PredictorSet, fingerprint
from lemo.preparation.exact_scores import KINDS, FeatureStore, SubBlockData
from lemo.preparation.pipeline import _Preparation
from lemo.preparation.training import _candidates, kept_set_recall
from lemo.settings.preparation import PredictorSettings
from lemo.training.model import (
    extend_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)

REPOSITORY = Path(__file__).resolve().parents[1]
# To judge whether a document is long enough takes as long as to cut a window from it: those with
# fewer characters a token are left out, and windows of n tokens come from 2^19 / n documents.
_CHARACTERS_PER_TOKEN, _TOKENS_OF_ALL = 6, 2**19
OPTIONAL = ("mixed", "more-steps", "batch16", "rank-loss0", "rank-loss1", "all-in")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a causal LM")
    parser.add_argument("--train", type=Path, help="documents to train on")
    parser.add_argument("--eval", type=Path, help="held-out documents")
    parser.add_argument("--experiments", nargs="+", help="names, see above (default: the first)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--long-length", type=int, default=32768)
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--long-block", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=32, help="training windows")
    parser.add_argument("--many-windows", type=int, default=96)
    parser.add_argument("--long-windows", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=16, help="windows to test on")
    parser.add_argument("--long-held-out", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150, help="of each predictor")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rank", type=int, help="hidden units (default: hidden size / 16)")
    parser.add_argument("--prune-to", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, help="training processes (default: 8 on a GPU, or 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each of them")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/predictors")
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "benchmarks/results/predictors.jsonl"
    )
    parser.add_argument("--commit", default="unknown", help="commit of the measured tree")
    options = parser.parse_args(arguments)
    for name in ("model", "train", "eval"):
        path = getattr(options, name)
        if path is None or not path.exists():
            parser.error(f"--{name}: expected an existing path, got '{path}'")
    known = experiments_of(options, default_rank(load_config(str(options.model)).hidden_size))
    names = options.experiments or [name for name in known if name not in OPTIONAL]
    for name in names:
        if name not in known:
            parser.error(f"--experiments: expected {', '.join(known)}, got '{name}'")
    options.chosen = {name: known[name] for name in names}
    for name, experiment in options.chosen.items():
        size, length = experiment.training.block_size, experiment.test_length
        if _candidates(-(-length // size), options.keep, 1, 1)[1] < 1:
            parser.error(f"{name}: nothing to choose in {length} tokens of blocks of {size}")
    options.jobs = options.jobs or (8 if _device(options).type == "cuda" else 1)
    return options


# --- the experiments


@dataclass(frozen=True)
class Training:
    """What makes a set of predictors; experiments with equal ones share it.

    Attributes:
        block_size, rank: as in `PredictorSettings`.
        windows: pairs of a length and the number of training windows of that length.
        one_kind: only windows of the first kind of documents.
        settings: pairs of a name and a value of `PredictorSettings`.
    """

    block_size: int
    rank: int
    windows: tuple[tuple[int, int], ...]
    one_kind: bool
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Experiment:
    """A training and the length of the windows that it is tested on."""

    training: Training
    test_length: int


def experiments_of(options: argparse.Namespace, rank: int) -> dict[str, Experiment]:
    """All experiments by name; `rank` is what --rank is by default."""
    rank = options.rank or rank
    short, long = options.length, options.long_length
    base = Training(
        block_size=options.blocks[-1],
        rank=rank,
        windows=((short, options.windows),),
        one_kind=False,
        settings=(("keep", options.keep), ("steps", options.steps)),
    )

    def changed(test_length: int = short, settings: dict | None = None, **changes: Any):
        if settings:
            changes["settings"] = tuple((dict(base.settings) | settings).items())
        return Experiment(dataclasses.replace(base, **changes), test_length)

    many, long_windows = ((short, options.many_windows),), ((long, options.long_windows),)
    more_steps = {"steps": 3 * options.steps}
    return {
        **{f"block{size}": changed(block_size=size) for size in options.blocks[:-1]},
        "base": changed(),
        "windows": changed(windows=many),
        "half-rank": changed(rank=max(rank // 2, 1)),
        "double-rank": changed(rank=2 * rank),
        "elastic": changed(settings={"prune_to": options.prune_to}),
        "elastic-attention": changed(settings={"prune_to": 0.4, "prune_mlp_to": 1.0}),
        "one-kind": changed(one_kind=True),
        "longer": changed(long),
        "long": changed(long, windows=long_windows),
        f"long-block{options.long_block}": changed(
            long, windows=long_windows, block_size=options.long_block
        ),
        "mixed": changed(long, windows=base.windows + long_windows),
        "more-steps": changed(settings=more_steps),
        "batch16": changed(settings={"windows_per_step": 16}),
        "rank-loss0": changed(settings={"rank_weight": 0.0}),
        "rank-loss1": changed(settings={"rank_weight": 1.0}),
        "all-in": changed(windows=many, settings=more_steps | {"windows_per_step": 8}),
    }


# --- windows, their inputs and labels


@dataclass(frozen=True)
class Sample:
    """What a window is for."""

    held_out: bool
    kind: str
    length: int


def cut_windows(
    options: argparse.Namespace, tokenizer: Any
) -> tuple[list[Sample], list[Tensor], list[str]]:
    """(what each window is for, its ids, kinds): what the chosen experiments need."""
    documents = [list(read_documents(path)) for path in (options.train, options.eval)]
    kinds = sorted({document.kind for document in documents[0]})
    needed: dict[tuple[bool, str, int], int] = {}
    for experiment in options.chosen.values():
        training, length = experiment.training, experiment.test_length
        held_out = options.long_held_out if length == options.long_length else options.held_out
        of = [(False, count, size) for size, count in training.windows]
        for is_held_out, count, size in [*of, (True, held_out, length)]:
            one = training.one_kind and not is_held_out
            for kind in kinds[:1] if one else kinds:
                key = (is_held_out, kind, size)
                share = count if one else math.ceil(count / len(kinds))
                needed[key] = max(needed.get(key, 0), share)
    windows = []
    for (held_out, kind, length), count in needed.items():
        of_kind = [document for document in documents[held_out] if document.kind == kind]
        some = _long_ones(of_kind, length)
        ids = token_windows(some, tokenizer, length, options.seed).batch(0, count)
        windows += [(place, Sample(held_out, kind, length), ids[place]) for place in range(count)]
    # Kinds in turn, so that the first ones are a fair sample of any size.
    windows.sort(key=lambda window: (window[1].held_out, window[1].length, window[0]))
    return [sample for _, sample, _ in windows], [ids for _, _, ids in windows], kinds


def _long_ones(documents: list[Document], length: int) -> list[Document]:
    characters, most = length * _CHARACTERS_PER_TOKEN, max(_TOKENS_OF_ALL // length, 1)
    return [d for d in documents if len(d.text) >= characters][:most] or documents


@dataclass
class Features:
    """Inputs of all sub-blocks for all windows, and labels for several sizes of blocks.

    Attributes:
        samples: what each window is for.
        kinds: of documents.
        stores: by block size; they share one folder and its rows.
    """

    samples: list[Sample]
    kinds: list[str]
    stores: dict[int, FeatureStore]

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        windows: Sequence[Tensor],
        samples: list[Sample],
        kinds: list[str],
        block_sizes: Iterable[int],
        folder: Path,
    ) -> Features:
        """Runs the dense model over the windows."""
        identity = fingerprint(architecture_of(model).config)
        device = next(model.parameters()).device
        stores = {
            size: FeatureStore(folder, identity["num_layers"], identity["hidden_size"], size)
            for size in sorted(set(block_sizes))
        }
        for ids in windows:
            cuts = [BlockLayout.from_seqlens([ids.numel()], size, device) for size in stores]
            visits = [store.visitor() for store in stores.values()]

            def visit(layer: int, kind: str, x: Tensor, tensors: Any, layout: BlockLayout) -> None:
                # The first store writes the rows; the others read the same files.
                for i, (one, cut) in enumerate(zip(visits, cuts)):  # noqa: B023
                    one(layer, kind, x[:0] if i else x, tensors, cut)

            capture_sub_blocks(model, {"input_ids": ids[None].to(device)}, visit)
            for store in stores.values():
                store.end_window(ids.numel())
        return cls(samples, kinds, stores)

    def training(self, training: Training) -> list[int]:
        """Places of the windows to train on."""
        kinds = self.kinds[:1] if training.one_kind else self.kinds
        return [
            place
            for length, count in training.windows
            for place in itertools.islice(self._places(False, length, kinds), count)
        ]

    def held_out(self, length: int) -> dict[int, str]:
        """Places of the windows to test on, and the kinds of their documents."""
        return {p: self.samples[p].kind for p in self._places(True, length, self.kinds)}

    def _places(self, held_out: bool, length: int, kinds: list[str]) -> Iterator[int]:
        for place, sample in enumerate(self.samples):
            if (sample.held_out, sample.length) == (held_out, length) and sample.kind in kinds:
                yield place


# --- one layer of one training: the unit of work


def train_layer(
    file: Path, training: Training, layer: int, test_lengths: Sequence[int], device: str, seed: int
) -> dict[str, Any]:
    """Trains the two predictors of a layer and tests them on windows of each length.

    Returns:
        seconds, parameters of both, initial ones, and tests[length][kind] as `measure` gives them.
    """
    start = time.perf_counter()
    features = _features(file)
    store = features.stores[training.block_size]
    settings = PredictorSettings(
        block_size=training.block_size,
        rank=training.rank,
        **dict(training.settings),
        search_rounds=0,
        dense_layers=(),
        seed=seed,
    )
    # Of the model the training of predictors needs the device only.
    preparation = _Preparation(
        nn.Linear(1, 1, device=device),
        {"num_layers": store.num_layers, "hidden_size": store.hidden_size},
        settings,
        file.parent,
        lambda *progress: None,
    )
    chosen = features.training(training)
    held_out = {length: features.held_out(length) for length in test_lengths}
    tensors, profiles, parameters, data = {}, {}, 0, {}
    for index, kind in enumerate(KINDS):
        data[kind] = store.read(layer, kind)
        stored, row, _ = preparation._train(
            0,
            kind,
            data[kind].subset([*chosen, *held_out[test_lengths[0]]]),
            len(chosen),
            ["all"] * len(held_out[test_lengths[0]]),
            layer * len(KINDS) + index,
        )
        tensors |= stored
        profiles[kind] = PositionProfile(
            *(stored[f"layers.0.{kind}.profile.{name}"] for name in ("knots", "mean", "deviation"))
        )
        parameters += row["parameters"]
    description = {
        "block_size": training.block_size,
        "num_layers": 1,
        "hidden_size": store.hidden_size,
        "thresholds": {kind: [0.0] for kind in KINDS},
    }
    predictors = PredictorSet(tensors, description)
    tests = {
        length: {
            kind: measure(preparation, predictors, profiles[kind], kind, data[kind], places)
            for kind in KINDS
        }
        for length, places in held_out.items()
    }
    shape = store.hidden_size, training.rank, torch.Generator("cpu")
    nets = [make_predictor(kind, *shape) for kind in KINDS]
    return {
        "seconds": time.perf_counter() - start,
        "parameters": parameters,
        "initial": sum(p.numel() for net in nets for p in net.parameters()),
        "tests": tests,
    }


def measure(
    preparation: _Preparation,
    predictors: PredictorSet,
    profile: PositionProfile,
    kind: str,
    data: SubBlockData,
    places: dict[int, str],
) -> dict[str, dict[str, float]]:
    """Means over the windows at `places`, for each kind of document."""
    sums: dict[str, dict[str, list[float]]] = {"recall": {}, "place_alone": {}, "captured": {}}
    training, device = preparation.settings.training, preparation.device
    budget = training.keep, training.keep_first, training.keep_last
    for place, group in places.items():
        layout, labels = data.layouts[place], data.labels[place]
        there = BlockLayout.from_seqlens(layout.seqlens, layout.block_size, device)
        scores = predictors.scores(0, kind, data.x[place].to(device), there).cpu()
        alone = profile.restore(torch.zeros_like(labels), layout)
        found = {
            "recall": kept_set_recall(scores, labels, layout, *budget),
            "place_alone": kept_set_recall(alone, labels, layout, *budget),
            "captured": [captured(scores, labels, *budget)],
        }
        for name, values in found.items():
            sums[name].setdefault(group, []).extend(values)
    return {
        name: {group: statistics.mean(values or [1.0]) for group, values in groups.items()}
        for name, groups in sums.items()
    }


def captured(scores: Tensor, labels: Tensor, keep: float, keep_first: int, keep_last: int) -> float:
    """Share of the most that the kept ones of a sequence's free blocks can add up to."""
    free, count = _candidates(labels.numel(), keep, keep_first, keep_last)
    if count == 0:
        return 1.0
    kept = labels[free][scores[free].topk(count).indices]
    return (kept.sum() / labels[free].topk(count).values.sum()).item()


@functools.lru_cache(maxsize=1)
def _features(file: Path) -> Features:
    return pickle.loads(file.read_bytes())


# --- the run


def run_units(
    options: argparse.Namespace, pool: ProcessPoolExecutor | None, file: Path, layers: int
) -> dict[Training, list[dict[str, Any]]]:
    """Results of every layer of every training, as many at a time as there are processes."""
    lengths: dict[Training, dict[int, None]] = {}
    for experiment in options.chosen.values():
        lengths.setdefault(experiment.training, {})[experiment.test_length] = None
    device = str(_device(options))

    def submit(training: Training, layer: int) -> Any:
        arguments = (file, training, layer, [*lengths[training]], device, options.seed)
        if pool is None:
            return functools.partial(train_layer, *arguments)
        return pool.submit(train_layer, *arguments).result

    waiting = {
        training: [submit(training, layer) for layer in range(layers)] for training in lengths
    }
    return {training: [result() for result in results] for training, results in waiting.items()}


def row_of(
    name: str,
    experiment: Experiment,
    layers: list[dict[str, Any]],
    model_bytes: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    training, length = experiment.training, experiment.test_length

    def by_kind(kind: str, figure: str) -> dict[str, float]:
        tests = [layer["tests"][length][kind][figure] for layer in layers]
        return {
            group: round(statistics.mean(of_layer[group] for of_layer in tests), 4)
            for group in tests[0]
        }

    def of_all(kind: str, figure: str) -> float:
        return round(statistics.mean(by_kind(kind, figure).values()), 4)

    columns = {
        "attention": ("attention", "recall"),
        "mlp": ("mlp", "recall"),
        "place_alone": ("attention", "place_alone"),
    }
    parameters = sum(layer["parameters"] for layer in layers)
    initial = sum(layer["initial"] for layer in layers)
    size = parameters * torch.bfloat16.itemsize
    return {
        "bench": "predictors",
        "experiment": name,
        "settings": {
            "model": options.model.name,
            "context": options.long_length,
            "block_size": training.block_size,
            "windows": {str(tokens): count for tokens, count in training.windows},
            "one_kind": training.one_kind,
            "test_length": length,
            "rank": training.rank,
            **dict(training.settings),
            "seed": options.seed,
        },
        "recall": {column: of_all(*of) for column, of in columns.items()}
        | {
            "by_kind": {
                group: {column: by_kind(*of)[group] for column, of in columns.items()}
                for group in by_kind("mlp", "recall")
            }
        },
        "captured": {kind: of_all(kind, "captured") for kind in KINDS},
        "parameters": parameters,
        "parameters_before_pruning": initial,
        "pruned_share": round(1 - parameters / initial, 4),
        "bytes": size,
        "share_of_model": round(size / model_bytes, 5),
        "seconds": round(sum(layer["seconds"] for layer in layers), 1),
        "jobs": options.jobs,
        "gpu": torch.cuda.get_device_name() if _device(options).type == "cuda" else None,
        "torch": torch.__version__,
        "commit": options.commit,
        "date": datetime.date.today().isoformat(),
    }


def _device(options: argparse.Namespace) -> torch.device:
    return pick_device(options.device, elimination=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    groups = list(rows[0]["recall"]["by_kind"])
    columns = ["attention", "place alone", "MLP"]
    columns += [f"{group}: attention, MLP" for group in groups]
    head = ["", "blocks", "windows", "tested on", "rank", *columns, "captured", "pruned", "size"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        settings, recall = row["settings"], row["recall"]
        cells = [
            row["experiment"],
            f"{settings['block_size']}",
            ", ".join(f"{count} x {tokens}" for tokens, count in settings["windows"].items()),
            f"{settings['test_length']}",
            f"{settings['rank']}",
            *(f"{recall[column]:.3f}" for column in ("attention", "place_alone", "mlp")),
        ]
        for group in groups:
            of_kind = recall["by_kind"][group]
            cells.append(f"{of_kind['attention']:.3f}, {of_kind['mlp']:.3f}")
        cells += [
            ", ".join(f"{row['captured'][kind]:.3f}" for kind in KINDS),
            f"{row['pruned_share']:.0%}",
            f"{row['bytes']:,} B, {row['share_of_model']:.2%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _say(start: float, message: str) -> None:
    print(f"{time.perf_counter() - start:6.1f} s  {message}", file=sys.stderr, flush=True)


def main() -> None:
    start = time.perf_counter()
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    device = _device(options)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.work)))
        pool = None
        if options.jobs > 1:
            setup = get_context("spawn"), torch.set_num_threads, (options.threads,)
            pool = stack.enter_context(ProcessPoolExecutor(options.jobs, *setup))
            # The processes import what they need while the windows are cut.
            for _ in range(options.jobs):
                pool.submit(time.sleep, 0.1)
        samples, windows, kinds = cut_windows(options, load_tokenizer(str(options.model)))
        _say(start, f"cut {len(windows)} windows")
        config = load_config(str(options.model))
        extend_context(config, options.long_length, "linear")
        dtype = pick_dtype("auto", device, elimination=True)
        model = load_model(str(options.model), config, dtype).to(device).eval()
        model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        sizes = [experiment.training.block_size for experiment in options.chosen.values()]
        features = Features.capture(model, windows, samples, kinds, sizes, folder)
        del model
        file = folder / "features.pickle"
        file.write_bytes(pickle.dumps(features))
        gib = sum(entry.stat().st_size for entry in folder.iterdir()) / 2**30
        _say(start, f"made their inputs and labels, {gib:.1f} GiB")
        layers = next(iter(features.stores.values())).num_layers
        results = run_units(options, pool, file, layers)
    _say(start, "trained and tested")
    rows = [
        row_of(name, experiment, results[experiment.training], model_bytes, options)
        for name, experiment in options.chosen.items()
    ]
    for row in rows:
        if row["experiment"] != "base" and "base" in options.chosen:
            [row["recall_of_base"]] = [r["recall"] for r in rows if r["experiment"] == "base"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a", encoding="utf-8") as output:
        output.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


if __name__ == "__main__":
    main()
