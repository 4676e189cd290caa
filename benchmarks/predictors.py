"""Recall, size and transfer of the predictors of `lemo prepare`, on a real model and real text.

    python benchmarks/predictors.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz

Measured: for the predictors of each experiment, what share of the kept set of held-out documents
they find ("recall"), mean over layers, attention and MLP, each kind of document separately; what
the place of a block finds alone; what share of the greatest possible sum of exact scores the kept
blocks have ("captured"); parameters and bytes. Against: the experiment "base" of `predictors.yaml`,
from which the others differ in one thing each. Takes about three minutes an experiment for a model
of 28M parameters on an H200.

Every experiment is one call of `lemo.preparation.pipeline.prepare` in a process of its own, --jobs
at a time. The model's context is extended to --context for all of them. The inputs of all
sub-blocks go to the disk below --work (tokens x layers x 2 x hidden size x 2 bytes for an
experiment; gone at its end). One JSON line is appended for each experiment.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import records
from common.methods import read_methods
from common.processes import measure_all, run_script

KINDS = ("attention", "mlp")
# To judge whether a document is long enough takes as long as to cut a window from it: those with
# fewer characters a token are left out, and windows of n tokens come from 2^19 / n documents.
CHARACTERS_PER_TOKEN, TOKENS_OF_ALL = 6, 2**19


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    from lemo.predictors.modules import default_rank
    from lemo.training.model import load_config

    parser = records.parser(__doc__, records.RESULTS / "predictors.jsonl")
    records.add_documents(parser)
    parser.add_argument("--experiments", nargs="+", help="names in --file (default: all)")
    parser.add_argument(
        "--file", type=records.existing, default=Path(__file__).with_suffix(".yaml")
    )
    parser.add_argument("--context", type=int, default=32768, help="tokens of a long window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="experiments at a time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each of them")
    parser.add_argument("--work", type=Path, default=Path("runs/predictors"))
    options = parser.parse_args(arguments)
    rank = default_rank(load_config(str(options.model)).hidden_size)
    sizes = {"context": options.context, "rank": rank}
    try:
        (base,) = read_methods(options.file, ["base"], sizes, "--file").values()
        found = read_methods(options.file, options.experiments, sizes, "--experiments")
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    base["settings"]["seed"] = options.seed
    options.chosen = {
        name: base | each | {"settings": base["settings"] | each.get("settings", {})}
        for name, each in found.items()
    }
    return options


# --- one experiment: a process of its own


def cut_windows(path: str, kinds: list[str], tokenizer: Any, length: int, count: int, seed: int):
    """Windows of the kinds in turn, so that the first ones are a fair sample of any size."""
    from lemo.data import read_documents, token_windows
    from lemo.preparation.windows import Window

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
        from lemo.preparation.pipeline import prepare
        from lemo.settings.preparation import PredictorSettings
        from lemo.training.model import load_tokenizer

        start = time.perf_counter()
        torch.set_num_threads(job["threads"])
        tokenizer = load_tokenizer(job["model"])
        kinds = sorted({document.kind for document in read_documents(job["train"])})
        seed = job["settings"]["seed"]

        def cut(path: str, of: list[str], count: int, length: int) -> list:
            return cut_windows(path, of, tokenizer, length, count, seed)

        learned = kinds[:1] if job["one_kind"] else kinds
        training = [w for windows in job["windows"] for w in cut(job["train"], learned, *windows)]
        held_out = cut(job["eval"], kinds, *job["held_out"])
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

    from lemo.models.layers.capture import capture_sub_blocks
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
    from lemo.predictors.position import contested_blocks

    keep, ends = settings.keep, (settings.keep_first, settings.keep_last)
    forced = exact[~contested_blocks(layout, *ends)].sum()
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
            "windows": {str(tokens): count for count, tokens in job["windows"]},
            "one_kind": job["one_kind"],
            "test_length": job["held_out"][1],
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
    common = {name: str(getattr(options, name)) for name in ("model", "train", "eval", "work")}
    common |= {name: getattr(options, name) for name in ("context", "device", "threads")}
    jobs = [(common | each | {"name": name}, None) for name, each in options.chosen.items()]
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
    return 0 if len(rows) == len(jobs) else 1


if __name__ == "__main__":
    run_script(main, worker)
