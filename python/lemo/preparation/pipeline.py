"""The pipeline of `lemo prepare`: labels, predictors, recall, thresholds, one folder."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lemo.models.architectures import architecture_of
from lemo.models.capture import capture_sub_blocks
from lemo.models.enable import enable
from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import default_rank, make_predictor
from lemo.predictors.position import PositionProfile, free_blocks, query_blocks
from lemo.predictors.storage import check_output, fingerprint, tensors_of, write_folder
from lemo.preparation.exact_scores import KINDS, FeatureStore, SubBlockData
from lemo.preparation.thresholds import (
    LayerScores,
    SearchResult,
    mean_thresholds,
    search,
    thresholds_for_budget,
)
from lemo.preparation.training import fit, kept_set_recall
from lemo.settings.elimination import LayerwiseConfig, LemoConfig
from lemo.settings.preparation import PredictorSettings

__all__ = ["Window", "prepare"]

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Window:
    """Tokens to learn from or to test on.

    Attributes:
        kind: group by which recall is reported.
        ids: [T] int64 token ids.
    """

    kind: str
    ids: Tensor


def prepare(
    model: nn.Module,
    training: Sequence[Window],
    held_out: Sequence[Window],
    output: str | Path,
    settings: PredictorSettings | None = None,
    overwrite: bool = False,
    report: Report = lambda stage, done, total, message: None,
) -> dict[str, Any]:
    """Trains the predictors of all layers and writes them with their thresholds to one folder.

    Memory holds the model, its activations for one window, and the inputs of one sub-block for all
    windows, which the system may page out (they are mapped from disk). The disk holds, next to
    `output` and gone at the end, tokens x layers x 2 x hidden size x 2 bytes, at most
    `settings.disk_gib`. Equal arguments give equal files on the same machine.

    Args:
        model: a frozen causal LM in its dtype and on its device; left as it was.
        training: windows to train on.
        held_out: windows of other documents, for recall and thresholds.
        output: the folder to write; appears complete or not at all.
        settings: None: the defaults.
        overwrite: replace the folder of an earlier preparation, or an empty one, at `output`.
        report: called as report(stage, done, total, message) for every unit of work.

    Returns:
        The description that was written to predictor.json.

    Raises:
        FileExistsError: `output` exists and `overwrite` is not set, or holds anything else.
        ValueError: a setting or the windows do not fit the model; the labels are not finite.
        OSError: the disk is full or cannot be written.
    """
    settings = PredictorSettings() if settings is None else settings
    output = Path(output)
    check_output(output, overwrite)
    architecture = architecture_of(model)
    identity = fingerprint(architecture.config)
    _eliminating(identity["num_layers"], settings.dense_layers)
    _check_windows(training, held_out, identity, settings)
    # A fixed name: what a killed run left behind, maybe gigabytes, goes with the next run.
    work = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with _evaluating(model):
            description = _Preparation(model, identity, settings, work, report).run(
                training, held_out
            )
        _publish(work / "result", output, overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return description


class _Preparation:
    """The steps of one call; what they share."""

    def __init__(
        self,
        model: nn.Module,
        identity: dict[str, Any],
        settings: PredictorSettings,
        work: Path,
        report: Report,
    ):
        self.model = model
        self.device = next(model.parameters()).device
        self.identity = identity
        self.settings = settings
        self.result = work / "result"
        self.features = work / "features"
        self.report = report
        self.num_layers: int = identity["num_layers"]
        self.hidden_size: int = identity["hidden_size"]
        self.sub_blocks = [(layer, kind) for layer in range(self.num_layers) for kind in KINDS]

    def run(self, training: Sequence[Window], held_out: Sequence[Window]) -> dict[str, Any]:
        self.result.mkdir()
        self.features.mkdir()
        store = self._capture([*training, *held_out])
        tensors: dict[str, Tensor] = {}
        layers: list[dict[str, Any]] = [{} for _ in range(self.num_layers)]
        scores: dict[str, list[LayerScores]] = {kind: [] for kind in KINDS}
        for done, (layer, kind) in enumerate(self.sub_blocks):
            data = store.read(layer, kind)
            stored, row, layer_scores = self._train(
                layer, kind, data, len(training), [window.kind for window in held_out], done
            )
            tensors |= stored
            layers[layer][kind] = row
            scores[kind].append(layer_scores)
        description = self._describe(layers, training, held_out)
        shutil.rmtree(self.features)
        self._add_thresholds(description, tensors, scores, held_out)
        write_folder(self.result, tensors, description)
        return description

    def _capture(self, windows: Sequence[Window]) -> FeatureStore:
        store = FeatureStore(
            self.features, self.num_layers, self.hidden_size, self.settings.block_size
        )
        for done, window in enumerate(windows):
            self.report("labels", done, len(windows), f"{window.ids.numel()} tokens")
            capture_sub_blocks(
                self.model,
                {"input_ids": window.ids[None].to(self.device)},
                store.visitor(),
                block_size=self.settings.block_size,
            )
            store.end_window(window.ids.numel())
        self.report("labels", len(windows), len(windows), "done")
        return store

    def _train(
        self,
        layer: int,
        kind: str,
        data: SubBlockData,
        num_training: int,
        held_out_kinds: list[str],
        done: int,
    ) -> tuple[dict[str, Tensor], dict[str, Any], LayerScores]:
        """One predictor: (its stored tensors, its row of the description, its held-out scores)."""
        settings = self.settings
        generator = torch.Generator("cpu").manual_seed(settings.seed * 1_000_003 + done)
        profile = _profile(data.subset(range(num_training)), settings, flat=kind == "mlp")
        if settings.target == "content":
            data = _standardised(data, profile)
            profile = _profile(data.subset(range(num_training)), settings, flat=True)
        rank = settings.rank or default_rank(self.hidden_size)
        module = make_predictor(kind, self.hidden_size, rank, generator).to(self.device)
        name = f"layer {layer} {kind}"
        total = len(self.sub_blocks) * settings.steps
        base, steps = done * settings.steps, iter(range(1, settings.steps + 1))
        result = fit(
            module,
            data.subset(range(num_training)),
            profile,
            settings,
            generator,
            lambda loss: self.report("predictors", base + next(steps), total, f"{name} {loss:.3f}"),
        )
        tensors = tensors_of(layer, kind, module, profile)
        with torch.no_grad():
            # What is measured is what is stored: weights rounded to bf16.
            for parameter in module.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
            held_out = data.subset(range(num_training, len(data.x)))
            predicted = [
                self._scores(module, profile, x, layout)
                for x, layout in zip(held_out.x, held_out.layouts)
            ]
        row = {
            "parameters": sum(p.numel() for p in module.parameters()),
            "hidden_units": {
                name: [net.down.shape[0], net.mid.shape[0]] for name, net in module.nets()
            },
            "hidden_units_before_pruning": result.hidden_units[0],
            "recall": _mean_recall(predicted, held_out, settings),
            "recall_by_kind": {
                group: _mean_recall(
                    [p for p, k in zip(predicted, held_out_kinds) if k == group],
                    held_out.subset(i for i, k in enumerate(held_out_kinds) if k == group),
                    settings,
                )
                for group in sorted(set(held_out_kinds))
            },
            "recall_of_place_alone": _mean_recall(
                [
                    profile.restore(torch.zeros(layout.num_blocks, device="cpu"), layout)
                    for layout in held_out.layouts
                ],
                held_out,
                settings,
            ),
        }
        free = [
            p[free_blocks(lay, settings.keep_first, settings.keep_last)]
            for p, lay in zip(predicted, held_out.layouts)
        ]
        forced = sum(p.numel() for p in predicted) - sum(f.numel() for f in free)
        return tensors, row, LayerScores(torch.cat(free), forced)

    def _scores(
        self, module: nn.Module, profile: PositionProfile, x: Tensor, layout: BlockLayout
    ) -> Tensor:
        there = BlockLayout.from_seqlens(layout.seqlens, layout.block_size, self.device)
        content = module(x.to(self.device, torch.float32), there)
        return profile.restore(content.cpu(), layout)

    def _describe(
        self,
        layers: list[dict[str, Any]],
        training: Sequence[Window],
        held_out: Sequence[Window],
    ) -> dict[str, Any]:
        parameters = sum(layers[layer][kind]["parameters"] for layer, kind in self.sub_blocks)
        weights = list(self.model.parameters())
        model_bytes = sum(p.numel() * p.element_size() for p in weights)
        size = torch.bfloat16.itemsize * parameters
        return {
            "model": self.identity,
            "block_size": self.settings.block_size,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "target": self.settings.target,
            "lengths": sorted({window.ids.numel() for window in training}),
            "windows": {"training": len(training), "held_out": len(held_out)},
            "recall": {
                kind: sum(layer[kind]["recall"] for layer in layers) / self.num_layers
                for kind in KINDS
            },
            "parameters": parameters,
            "bytes": size,
            "model_bytes": model_bytes,
            "share_of_model": size / model_bytes,
            "layers": layers,
            "settings": {
                name: value
                for name, value in self.settings.to_dict().items()
                if name in PredictorSettings.model_fields
            },
        }

    def _add_thresholds(
        self,
        description: dict[str, Any],
        tensors: dict[str, Tensor],
        scores: dict[str, list[LayerScores]],
        held_out: Sequence[Window],
    ) -> None:
        keep = self.settings.keep
        counted = _eliminating(self.num_layers, self.settings.dense_layers)

        def thresholds(offsets: list[float]) -> dict[str, list[float]]:
            """Thresholds within the budget; offsets are for attention, then the MLP."""
            full = {}
            for index, kind in enumerate(KINDS):
                of_layer = [0.0] * self.num_layers
                for place, layer in enumerate(counted):
                    of_layer[layer] = offsets[index * len(counted) + place]
                full[kind] = thresholds_for_budget(scores[kind], keep, of_layer, counted or None)
            return full

        start = [0.0] * (len(KINDS) * len(counted))
        description["thresholds"] = thresholds(start)
        result = SearchResult(start, [], 0)
        if self.settings.search_rounds and counted:
            write_folder(self.result, tensors, description)
            result = self._search(thresholds, start, held_out)
            description["thresholds"] = thresholds(result.offsets)
        description["threshold_search"] = {
            "mean_scores": {kind: mean_thresholds(scores[kind]) for kind in KINDS},
            "kept_share": {
                kind: [
                    s.kept_share(t) for s, t in zip(scores[kind], description["thresholds"][kind])
                ]
                for kind in KINDS
            },
            "losses": result.losses,
            "evaluations": result.evaluations,
        }

    def _search(
        self,
        thresholds: Callable[[list[float]], dict[str, list[float]]],
        start: list[float],
        held_out: Sequence[Window],
    ) -> SearchResult:
        windows = held_out[: self.settings.search_windows]
        # Two differences a threshold and at most four moves each round, and the start.
        total = 1 + self.settings.search_rounds * (2 * len(start) + 4)
        done = 0

        def evaluate(offsets: list[float]) -> float:
            nonlocal done
            at = thresholds(offsets)
            config = LemoConfig(
                block_size=self.settings.block_size,
                scorer="predictor",
                predictor=str(self.result),
                keep_first=self.settings.keep_first,
                keep_last=self.settings.keep_last,
                # Every threshold is judged by the same tokens.
                mask_loss=False,
                layerwise=LayerwiseConfig(
                    policy="threshold",
                    thresholds=at["attention"],
                    mlp_thresholds=at["mlp"],
                    dense_layers=self.settings.dense_layers,
                    select_at="all",
                ),
            )
            loss = elimination_loss(self.model, windows, config)
            done += 1
            self.report("thresholds", done, total, f"loss {loss:.4f}")
            return loss

        result = search(evaluate, start, self.settings.search_rounds)
        self.report("thresholds", total, total, "done")
        return result


@torch.no_grad()
def elimination_loss(model: nn.Module, windows: Sequence[Window], config: LemoConfig) -> float:
    """Mean loss a token while the model eliminates as `config` says; no dropout, no gradient."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with _evaluating(model):
        handle = enable(model, config)
        try:
            for window in windows:
                ids = window.ids[None].to(device)
                total += handle.loss(input_ids=ids, labels=ids).item() * (ids.numel() - 1)
                tokens += ids.numel() - 1
        finally:
            handle.remove()
    return total / tokens


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_windows(
    training: Sequence[Window],
    held_out: Sequence[Window],
    identity: dict[str, Any],
    settings: PredictorSettings,
) -> None:
    tokens = 0
    for name, windows in (("training", training), ("held_out", held_out)):
        if not windows:
            raise ValueError(f"{name}: expected at least one window, got none")
        for window in windows:
            tokens += window.ids.numel()
            if not 0 <= window.ids.min() <= window.ids.max() < identity["vocab_size"]:
                raise ValueError(
                    f"{name}: expected ids from 0 to {identity['vocab_size'] - 1}, for which the "
                    f"model has an embedding, got {window.ids.min()} to {window.ids.max()}"
                )
            blocks = -(-window.ids.numel() // settings.block_size)
            forced = settings.keep_first + settings.keep_last
            if blocks < forced + 2:
                raise ValueError(
                    f"{name}: expected windows of at least {forced + 2} blocks of "
                    f"{settings.block_size} tokens, so that there is a choice, got "
                    f"{window.ids.numel()} tokens"
                )
    needed = tokens * FeatureStore.bytes_of_token(identity["num_layers"], identity["hidden_size"])
    if needed > settings.disk_gib * 2**30:
        raise ValueError(
            f"disk_gib: {tokens} tokens of this model take {needed / 2**30:.1f} GiB on disk while "
            f"lemo prepares, the limit is {settings.disk_gib:g}; give fewer or shorter windows, or "
            "a higher limit"
        )


def _eliminating(num_layers: int, dense_layers: Sequence[int]) -> list[int]:
    """The layers that are not dense, ascending; ValueError for one that the model does not have."""
    for layer in dense_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"dense_layers: expected layers of a model with {num_layers}, got {layer}"
            )
    dense = {layer % num_layers for layer in dense_layers}
    return [layer for layer in range(num_layers) if layer not in dense]


def _profile(data: SubBlockData, settings: PredictorSettings, flat: bool) -> PositionProfile:
    free = [free_blocks(layout, settings.keep_first, settings.keep_last) for layout in data.layouts]
    return PositionProfile.fit(
        torch.cat([labels[chosen] for labels, chosen in zip(data.labels, free)]),
        torch.cat([query_blocks(layout)[chosen] for layout, chosen in zip(data.layouts, free)]),
        flat,
    )


def _standardised(data: SubBlockData, profile: PositionProfile) -> SubBlockData:
    def all_of(labels: list[Tensor], layouts: list[BlockLayout]) -> list[Tensor]:
        return [profile.standardise(values, layout) for values, layout in zip(labels, layouts)]

    # Of an MLP the profile is the same in all places.
    tokens = [BlockLayout.from_seqlens(layout.seqlens, 1, "cpu") for layout in data.layouts]
    return SubBlockData(
        data.x,
        all_of(data.labels, data.layouts),
        data.layouts,
        all_of(data.token_labels, tokens),
    )


def _mean_recall(
    predicted: Sequence[Tensor], data: SubBlockData, settings: PredictorSettings
) -> float:
    recalls = [
        value
        for guess, labels, layout in zip(predicted, data.labels, data.layouts)
        for value in kept_set_recall(
            guess, labels, layout, settings.keep, settings.keep_first, settings.keep_last
        )
    ]
    # Without a choice (everything or nothing beyond the forced blocks is kept) the sets agree.
    return sum(recalls) / len(recalls) if recalls else 1.0


def _publish(result: Path, output: Path, overwrite: bool) -> None:
    """Moves the finished folder into place; an old one steps aside first, and back on failure."""
    # Once more: something may have appeared there since lemo began.
    check_output(output, overwrite)
    if not output.exists():
        result.rename(output)
        return
    old = result.parent / "old"
    output.rename(old)
    try:
        result.rename(output)
    except OSError:
        old.rename(output)
        raise
