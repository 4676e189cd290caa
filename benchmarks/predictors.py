"""Recall, size and transfer of the predictors of `lemo prepare`, on a real model and real text.

    python benchmarks/predictors.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz

Measured: for the predictors of each experiment how much of the kept set of held-out documents
(--keep) they find, mean over layers, attention and MLP, each kind of document separately; what the
place of a block finds alone; the share of the greatest possible sum of exact scores that the kept
blocks have ("captured"); parameters and bytes. Against: the experiment "base", from which the
others differ in one thing each. Takes about three minutes an experiment for a model of 28M
parameters on an H200.

    base              the last size of --blocks
    block64, ...      the other sizes of --blocks
    windows           --many-windows instead of --windows
    half-rank, double-rank
    elastic           pruned to --prune-to of the hidden units while it trains
    elastic-attention attention's pruned to .4 of them, the MLP's not
    one-kind          trained on the first kind of documents only, tested on all
    longer            the predictors of base, tested on windows of --long-length
    long              trained and tested on windows of --long-length
    long-block2048    the same with blocks of --long-block tokens

and, where --experiments names them,

    mixed             trained on windows of both lengths, tested on long ones
    more-steps        three times the steps
    batch16           16 windows a step instead of 4
    rank-loss0, rank-loss1    weight of the ranking loss
    all-in            many windows, three times the steps, 8 windows a step

Every experiment is one call of `lemo.preparation.pipeline.prepare` in a process of its own, --jobs
at a time. The model's context is extended to --long-length for all of them. The inputs of all
sub-blocks go to the disk below --work (tokens x layers x 2 x hidden size x 2 bytes for an
experiment; gone at its end). One JSON line is appended for each experiment.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import records
from common.processes import measure_all, run_script

KINDS = ("attention", "mlp")
OPTIONAL = ("mixed", "more-steps", "batch16", "rank-loss0", "rank-loss1", "all-in")
# To judge whether a document is long enough takes as long as to cut a window from it: those with
# fewer characters a token are left out, and windows of n tokens come from 2^19 / n documents.
CHARACTERS_PER_TOKEN, TOKENS_OF_ALL = 6, 2**19


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "predictors.jsonl")
    documents = {"type": records.existing, "required": True}
    parser.add_argument("--model", **documents, help="folder of a causal LM")
    parser.add_argument("--train", **documents, help="documents to train on")
    parser.add_argument("--eval", **documents, help="held-out documents")
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
    parser.add_argument("--jobs", type=int, default=1, help="experiments at a time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each of them")
    parser.add_argument("--work", type=Path, default=Path("runs/predictors"))
    options = parser.parse_args(arguments)
    known = experiments_of(options, options.rank or rank_of(options.model))
    names = options.experiments or [name for name in known if name not in OPTIONAL]
    for name in names:
        if name not in known:
            parser.error(f"--experiments: expected {', '.join(known)}, got '{name}'")
    options.chosen = {name: known[name] for name in names}
    return options


def rank_of(model: Path) -> int:
    """Hidden units of the model's predictors by default."""
    from lemo.predictors.modules import default_rank
    from lemo.training.model import load_config

    return default_rank(load_config(str(model)).hidden_size)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """How predictors are trained, and the length of the windows that they are tested on.

    Attributes:
        windows: number of training windows of each length.
        test_length, held_out: tokens and number of the held-out windows.
        one_kind: train on windows of the first kind of documents only.
        settings: of `PredictorSettings`.
    """

    windows: dict[int, int]
    test_length: int
    held_out: int
    settings: dict[str, Any]
    one_kind: bool = False


def experiments_of(options: argparse.Namespace, rank: int) -> dict[str, Experiment]:
    """All experiments by name."""
    short, long = {options.length: options.windows}, {options.long_length: options.long_windows}
    base = Experiment(
        windows=short,
        test_length=options.length,
        held_out=options.held_out,
        settings={
            "block_size": options.blocks[-1],
            "rank": rank,
            "keep": options.keep,
            "steps": options.steps,
            "seed": options.seed,
        },
    )
    on_long = {"test_length": options.long_length, "held_out": options.long_held_out}

    def changed(settings: dict[str, Any] | None = None, **changes: Any) -> Experiment:
        settings = base.settings | (settings or {})
        return dataclasses.replace(base, settings=settings, **changes)

    many = {options.length: options.many_windows}
    more_steps = {"steps": 3 * options.steps}
    return {
        **{f"block{size}": changed({"block_size": size}) for size in options.blocks[:-1]},
        "base": base,
        "windows": changed(windows=many),
        "half-rank": changed({"rank": max(rank // 2, 1)}),
        "double-rank": changed({"rank": 2 * rank}),
        "elastic": changed({"prune_to": options.prune_to}),
        "elastic-attention": changed({"prune_to": 0.4, "prune_mlp_to": 1.0}),
        "one-kind": changed(one_kind=True),
        "longer": changed(**on_long),
        "long": changed(windows=long, **on_long),
        f"long-block{options.long_block}": changed(
            {"block_size": options.long_block}, windows=long, **on_long
        ),
        "mixed": changed(windows=short | long, **on_long),
        "more-steps": changed(more_steps),
        "batch16": changed({"windows_per_step": 16}),
        "rank-loss0": changed({"rank_weight": 0.0}),
        "rank-loss1": changed({"rank_weight": 1.0}),
        "all-in": changed(more_steps | {"windows_per_step": 8}, windows=many),
    }


# --- one experiment: a process of its own


def cut_windows(path: str, kinds: list[str], tokenizer: Any, length: int, count: int, seed: int):
    """Windows of the kinds in turn, so that the first ones are a fair sample of any size."""
    from lemo.data import read_documents, token_windows
    from lemo.preparation.pipeline import Window

    documents = list(read_documents(path))
    share = math.ceil(count / len(kinds))
    ids = []
    for kind in kinds:
        of_kind = [document for document in documents if document.kind == kind]
        enough = [d for d in of_kind if len(d.text) >= length * CHARACTERS_PER_TOKEN]
        some = enough[: max(TOKENS_OF_ALL // length, 1)] or of_kind
        ids.append(token_windows(some, tokenizer, length, seed).batch(0, share))
    return [Window(kind, ids[k][i]) for i in range(share) for k, kind in enumerate(kinds)][:count]


def load(model: str, context: int, device: str):
    """The frozen model, its context extended as `lemo prepare` does."""
    from lemo.training.model import extend_context, load_config, load_model, pick_device, pick_dtype

    config = load_config(model)
    extend_context(config, context, "linear")
    place = pick_device(device, elimination=True)
    return load_model(model, config, pick_dtype("auto", place, elimination=True)).to(place).eval()


def worker(job: dict[str, Any]) -> Callable[[str], dict]:
    """Trains and tests the predictors of one experiment; its row, without provenance."""

    def answer(_: str) -> dict:
        import torch

        from lemo import predictors
        from lemo.data import read_documents
        from lemo.preparation.pipeline import PredictorSettings, prepare
        from lemo.training.model import load_tokenizer

        start = time.perf_counter()
        torch.set_num_threads(job["threads"])
        tokenizer = load_tokenizer(job["model"])
        kinds = sorted({document.kind for document in read_documents(job["train"])})
        learned = kinds[:1] if job["one_kind"] else kinds
        # Lengths are names in JSON.
        windows = {int(length): count for length, count in job["windows"].items()}
        seed = job["settings"]["seed"]
        training = [
            window
            for length, count in windows.items()
            for window in cut_windows(job["train"], learned, tokenizer, length, count, seed)
        ]
        held_out = cut_windows(
            job["eval"], kinds, tokenizer, job["test_length"], job["held_out"], seed
        )
        model = load(job["model"], job["context"], job["device"])
        settings = PredictorSettings(**job["settings"], search_rounds=0, disk_gib=2.0**20)
        with tempfile.TemporaryDirectory(dir=job["work"]) as folder:
            place = Path(folder) / "predictors"
            description = prepare(model, training, held_out, place, settings)
            shares = captured(model, predictors.load(place), held_out, settings)
        seconds = round(time.perf_counter() - start, 1)
        return row_of(job, description) | {"captured": shares, "seconds": seconds}

    return answer


def captured(model: Any, found: Any, windows: Sequence[Any], settings: Any) -> dict[str, float]:
    """Of the greatest sum of exact scores that blocks with a choice can have: the kept ones' share.

    Mean over windows and layers, for attention and MLP.
    """
    import torch

    from lemo.models.capture import capture_sub_blocks
    from lemo.ops import block_scores

    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def visit(layer: int, kind: str, x: Any, tensors: Any, layout: Any) -> None:
        if kind == "attention":
            exact = block_scores(tensors["q"], tensors["k"], layout, tensors["scale"])
        else:
            of_tokens = tensors["activation"].abs().mean(-1, dtype=torch.float32)
            exact = torch.segment_reduce(
                of_tokens, "mean", lengths=layout.block_starts.diff().long()
            )
        scores = found.scores(layer, kind, x, layout)
        shares[kind].append(captured_share(scores, exact, layout, settings))

    for window in windows:
        ids = window.ids[None].to(model.device)
        capture_sub_blocks(model, {"input_ids": ids}, visit, settings.block_size)
    return {kind: round(statistics.mean(values), 4) for kind, values in shares.items()}


def captured_share(scores: Any, exact: Any, layout: Any, settings: Any) -> float:
    """`captured` of one sub-block and window; 1.0 where there is nothing to choose."""
    from lemo.ops import token_select
    from lemo.predictors.position import free_blocks

    keep, ends = settings.keep, (settings.keep_first, settings.keep_last)
    forced = exact[~free_blocks(layout, *ends)].sum()
    found, best = (
        exact[token_select(by, layout, "ratio", keep, *ends).kept_blocks.long()].sum() - forced
        for by in (scores, exact)
    )
    return (found / best).item() if best > 0 else 1.0


def row_of(job: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """What a record says of an experiment, from what `prepare` says of its predictors."""
    layers = description["layers"]

    def mean(kind: str, figure: str) -> float:
        return round(statistics.mean(layer[kind][figure] for layer in layers), 4)

    def of_group(kind: str, group: str) -> float:
        found = [layer[kind]["recall_by_kind"][group] for layer in layers]
        return round(statistics.mean(found), 4)

    groups = layers[0]["mlp"]["recall_by_kind"]
    parameters, before = description["parameters"], initial_parameters(job, description)
    return {
        "bench": "predictors",
        "experiment": job["name"],
        "settings": {
            "model": Path(job["model"]).name,
            "context": job["context"],
            "windows": job["windows"],
            "one_kind": job["one_kind"],
            "test_length": job["test_length"],
            **job["settings"],
        },
        "recall": {
            **{kind: mean(kind, "recall") for kind in KINDS},
            "place_alone": mean("attention", "recall_of_place_alone"),
            "by_kind": {group: {kind: of_group(kind, group) for kind in KINDS} for group in groups},
        },
        "parameters": parameters,
        "parameters_before_pruning": before,
        "pruned_share": round(1 - parameters / before, 4),
        "bytes": description["bytes"],
        "share_of_model": round(description["share_of_model"], 5),
    }


def initial_parameters(job: dict[str, Any], description: dict[str, Any]) -> int:
    """Parameters of the predictors of all layers before any was pruned."""
    import torch

    from lemo.predictors.modules import make_predictor

    hidden, rank = description["hidden_size"], job["settings"]["rank"]
    nets = [make_predictor(kind, hidden, rank, torch.Generator("cpu")) for kind in KINDS]
    return description["num_layers"] * sum(p.numel() for net in nets for p in net.parameters())


# --- all experiments


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    groups = list(rows[0]["recall"]["by_kind"])
    head = ["", "blocks", "windows", "tested on", "rank", "attention", "place alone", "MLP"]
    head += [*(f"{group}: attention, MLP" for group in groups), "captured", "pruned", "size"]

    def pair(values: dict[str, float]) -> str:
        return ", ".join(f"{values[kind]:.3f}" for kind in KINDS)

    lines = []
    for row in rows:
        settings, recall = row["settings"], row["recall"]
        lines.append(
            [
                row["experiment"],
                f"{settings['block_size']}",
                ", ".join(f"{count} x {tokens}" for tokens, count in settings["windows"].items()),
                f"{settings['test_length']}",
                f"{settings['rank']}",
                *(f"{recall[column]:.3f}" for column in ("attention", "place_alone", "mlp")),
                *(pair(recall["by_kind"][group]) for group in groups),
                pair(row["captured"]),
                f"{row['pruned_share']:.0%}",
                f"{row['bytes']:,} B, {row['share_of_model']:.2%}",
            ]
        )
    return records.markdown(head, ["---", *["---:"] * (len(head) - 1)], lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    common = {
        **{name: str(getattr(options, name)) for name in ("model", "train", "eval", "work")},
        "context": options.long_length,
        "device": options.device,
        "threads": options.threads,
    }
    jobs = [
        (common | {"name": name} | dataclasses.asdict(experiment), None)
        for name, experiment in options.chosen.items()
    ]
    rows: list[dict[str, Any]] = []
    for row in measure_all(__file__, jobs, [{}] * options.jobs):
        if row is None:
            continue
        base = [earlier["recall"] for earlier in rows if earlier["experiment"] == "base"]
        row |= {"recall_of_base": base[0]} if base else {}
        row |= {"jobs": options.jobs, **records.provenance(options.commit, options.device)}
        records.append(options.output, [row])
        rows.append(row)
    if rows:
        print(table(rows))
    if len(rows) < len(jobs):
        print("some experiments failed; see above", file=sys.stderr)
    return 0 if len(rows) == len(jobs) else 1


if __name__ == "__main__":
    run_script(main, worker)
