"""Steps that were measured on GPUs before, with all that predictions of them need to know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemo.planner.shape import Adapters, LayerRows, ModelShape, Step, kept_rows, step_of

__all__ = ["RecordedStep", "recorded_steps"]

RESULTS = Path(__file__).parents[1] / "results"
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_28M = ModelShape(14, 384, 1024, 6, 2, 64, 16384, tied=True)
SMOLLM2_135M = ModelShape(30, 576, 1536, 9, 3, 64, 49152, tied=True)
# Commits since which rows that no layer keeps are dropped before the layers.
DROPPING = ("ad81fac", "df7a020")
# Labels of a window of answers.py: six answers of a few tokens.
ANSWER_LABELS = 64


@dataclass(frozen=True)
class RecordedStep:
    """A measured step.

    Attributes:
        source, commit, gpu: where it is recorded, and what it was measured with.
        model: a short name of the shape.
        tokens, keep: of a window.
        shape, adapters, step: what predictions follow from.
        quantize: how the weights were stored.
        group_size: tokens of a shifted attention group; 0: none.
        recompute: the mode of every layer.
        peak_gib: measured memory.
        seconds: measured time; None where other runs shared the GPU.
    """

    source: str
    commit: str
    gpu: str
    model: str
    tokens: int
    keep: float
    shape: ModelShape
    adapters: Adapters
    step: Step
    quantize: str | None
    group_size: int
    recompute: str
    peak_gib: float
    seconds: float | None

    @property
    def name(self) -> str:
        windows = f"{len(self.step.lengths)}x" if len(self.step.lengths) > 1 else ""
        return f"{self.model} {windows}{self.tokens} keep {self.keep:g} {self.recompute}"


def recorded_steps() -> list[RecordedStep]:
    """All of them, each setting of a commit once."""
    found = [*_finetune("h200_finetune"), *_finetune("h200_loss_outside")]
    found += [*_finetune("h200_rework"), *_finetune("h200_answers"), *_finetune("h200_quantised")]
    found += [*_quality(), *_answers()]
    return found


def _rows(name: str) -> Iterator[dict[str, Any]]:
    with (RESULTS / f"{name}.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _finetune(name: str) -> Iterator[RecordedStep]:
    """Steps of gpu_finetune.py: one window, the 8B shape, bf16 adapters on q, k, v and o."""
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for row in _rows(name):
        if row["bench"] in ("finetune step", "finetune peak memory"):
            key = row["commit"] + json.dumps(row["shape"])
            pairs.setdefault(key, {}).setdefault(row["bench"], row)
    for pair in pairs.values():
        time, memory = pair["finetune step"], pair["finetune peak memory"]
        shape, tokens = memory["shape"], memory["shape"]["tokens"]
        special = shape.get("loss") or shape["scorer"] in ("attention", "predictor")
        if special or shape.get("visible_keys", "kept") != "kept":
            continue
        ends = shape.get("keep_first", 1), shape.get("keep_last", 1)
        rows = kept_rows([tokens], shape["keep"], shape.get("block_size", 64), ends)
        labelled = shape.get("labelled", 1.0) * tokens / rows if "labelled" in shape else 1.0
        yield RecordedStep(
            name,
            memory["commit"],
            memory["gpu"],
            "8B",
            tokens,
            shape["keep"],
            LLAMA_8B,
            Adapters(8, frozenset(("q_proj", "k_proj", "v_proj", "o_proj")), size=2),
            step_of(
                LLAMA_8B,
                [tokens],
                [LayerRows(rows, rows)] * LLAMA_8B.layers,
                labelled,
                drops=memory["commit"] in DROPPING,
            ),
            shape.get("quantize"),
            0,
            shape["recompute"],
            memory["ours"],
            time["ours"] / 1e3,
        )


def _quality() -> Iterator[RecordedStep]:
    """Steps of `lemo finetune` on the 28M model: LoRA everywhere in fp32, norms too, autocast."""
    known = {"keep", "block_size", "keep_first", "keep_last", "scorer", "seed", "group_size"}
    known |= {"mask_loss", "dense_layers"}
    seen = set()
    for row in _rows("quality"):
        settings = row["settings"].get("elimination")
        if settings is None or set(settings) - known or "step_seconds" not in row:
            continue
        if "note" in row or settings.get("scorer", "random") not in ("random", "label"):
            continue
        shape, changed = row["shape"], row["settings"].get("settings", {})
        batch, tokens = changed.get("batch_size", shape["batch"]), shape["context"]
        passes = changed.get("gradient_accumulation", 1)
        lengths = [tokens] * (batch // passes)
        ends = settings.get("keep_first", 0), settings.get("keep_last", 1)
        block = settings.get("block_size", 64)
        dense = {layer % LLAMA_28M.layers for layer in settings.get("dense_layers", ())}
        kept = kept_rows(lengths, settings["keep"], block, ends)
        rows = [
            LayerRows(sum(lengths), sum(lengths)) if index in dense else LayerRows(kept, kept)
            for index in range(LLAMA_28M.layers)
        ]
        alone = row["runs_at_a_time"] == 1
        key = (row["commit"], tokens, batch, passes, tuple(rows), settings.get("group_size"), alone)
        if key in seen:
            continue
        seen.add(key)
        labelled = 1.0
        if dense:  # half of the sub-blocks have to keep a row whose loss counts
            labelled = kept / sum(lengths)
        yield RecordedStep(
            "quality",
            row["commit"],
            row["gpu"],
            "28M",
            tokens,
            settings["keep"],
            LLAMA_28M,
            Adapters(16, norms=True),
            step_of(LLAMA_28M, lengths, rows, labelled, drops=False, autocast=True, passes=passes),
            None,
            settings.get("group_size", 0),
            "none",
            row["peak_memory_gib"],
            row["step_seconds"] if alone else None,
        )


def _answers() -> Iterator[RecordedStep]:
    """Steps of answers.py on SmolLM2-135M: LoRA everywhere in fp32, apart from bf16 layers."""
    seen = set()
    for row in _rows("answers"):
        if row["method"] not in ("dense", "lexical-0.25") or row["task"] != "mean":
            continue
        windows, tokens = row["shape"]["micro_batch"], row["tokens"]
        key = row["commit"], row["method"]
        if key in seen:
            continue
        seen.add(key)
        lengths = [tokens] * windows
        kept = kept_rows(lengths, row["keep"], tokens // 256, (0, 1))
        yield RecordedStep(
            "answers",
            row["commit"],
            row["gpu"],
            "135M",
            tokens,
            row["keep"],
            SMOLLM2_135M,
            Adapters(16, apart=True),
            step_of(
                SMOLLM2_135M,
                lengths,
                [LayerRows(kept, kept)] * SMOLLM2_135M.layers,
                ANSWER_LABELS * windows / kept,
                drops=row["commit"] in DROPPING,
            ),
            None,
            0,
            "none",
            row["peak_gib"],
            row["step_s"],
        )
