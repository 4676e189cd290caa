"""From a model and windows of tokens to the folder of predictors.

Exact scores of the dense model, one predictor for each sub-block, thresholds for all of them.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lemo.models.calls.eval_mode import evaluating
from lemo.models.layers.architectures import architecture_of
from lemo.predictors.model import model_description
from lemo.predictors.modules import KINDS
from lemo.predictors.storage import write_folder
from lemo.preparation.exact_scores import FeatureStore
from lemo.preparation.output import check_output, description_of, publish, work_folder
from lemo.preparation.predictor import TrainedPredictor, train_predictor
from lemo.preparation.reports import Report
from lemo.preparation.threshold_search import add_thresholds, eliminating_layers
from lemo.preparation.windows import Window, check_windows
from lemo.settings.preparation import PredictorSettings

__all__ = ["Report", "prepare"]


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
        ValueError: a setting or the windows do not fit the model; exact scores are not finite.
        OSError: the disk is full or cannot be written.
    """
    settings = PredictorSettings() if settings is None else settings
    output = Path(os.path.realpath(output))
    check_output(output, overwrite)
    architecture = architecture_of(model)
    shape = model_description(architecture.config, architecture.embedding)
    eliminating_layers(shape["num_layers"], settings.dense_layers)
    check_windows(training, held_out, shape, settings)
    with work_folder(output) as work, evaluating(model):
        features, result = work / "features", work / "result"
        features.mkdir()
        result.mkdir()
        store = FeatureStore(
            features, shape["num_layers"], shape["hidden_size"], settings.block_size
        )
        _compute_exact_scores(store, model, [*training, *held_out], report)
        device = next(model.parameters()).device
        trained = dict(_train(store, len(training), held_out, settings, device, report))
        shutil.rmtree(features)
        tensors = {name: t for each in trained.values() for name, t in each.tensors.items()}
        description = _describe(trained, model, shape, training, held_out, settings)

        def on_evaluation(done: int, total: int, loss: float | None) -> None:
            report("thresholds", done, total, "done" if loss is None else f"loss {loss:.4f}")

        add_thresholds(
            description,
            tensors,
            {
                kind: [trained[layer, kind].held_out_scores for layer in range(store.num_layers)]
                for kind in KINDS
            },
            model,
            held_out,
            settings,
            result,
            on_evaluation,
        )
        write_folder(result, tensors, description)
        publish(result, output, overwrite)
    return description


def _compute_exact_scores(
    store: FeatureStore, model: nn.Module, windows: Sequence[Window], report: Report
) -> None:
    device = next(model.parameters()).device
    for done, window in enumerate(windows):
        report("exact scores", done, len(windows), f"{window.ids.numel()} tokens")
        store.add_window(model, window.ids.to(device))
    report("exact scores", len(windows), len(windows), "done")


def _train(
    store: FeatureStore,
    num_training: int,
    held_out: Sequence[Window],
    settings: PredictorSettings,
    device: torch.device,
    report: Report,
) -> Iterator[tuple[tuple[int, str], TrainedPredictor]]:
    """((layer, kind), predictor) of all sub-blocks; the store begins with the training windows."""
    sub_blocks = [(layer, kind) for layer in range(store.num_layers) for kind in KINDS]
    total, done = len(sub_blocks) * settings.steps, 0

    def on_step(loss: float) -> None:
        nonlocal done
        done += 1
        report("predictors", done, total, f"layer {layer} {kind} {loss:.3f}")

    for number, (layer, kind) in enumerate(sub_blocks):
        data = store.read(layer, kind)
        yield (
            (layer, kind),
            train_predictor(
                layer,
                kind,
                data.subset(range(num_training)),
                data.subset(range(num_training, len(data.x))),
                [window.kind for window in held_out],
                settings,
                torch.Generator("cpu").manual_seed(settings.seed * 1_000_003 + number),
                device,
                on_step,
            ),
        )


def _describe(
    trained: dict[tuple[int, str], TrainedPredictor],
    model: nn.Module,
    shape: dict[str, Any],
    training: Sequence[Window],
    held_out: Sequence[Window],
    settings: PredictorSettings,
) -> dict[str, Any]:
    """predictor.json without the thresholds."""
    num_layers = shape["num_layers"]
    layers = [{kind: trained[layer, kind].figures for kind in KINDS} for layer in range(num_layers)]
    parameters = sum(each.figures["parameters"] for each in trained.values())
    lengths = [window.ids.numel() for window in training]
    return {
        **description_of(model, shape, settings, parameters, lengths, len(held_out)),
        "recall": {
            kind: sum(layer[kind]["recall"] for layer in layers) / num_layers for kind in KINDS
        },
        "layers": layers,
    }
