"""Steps that were measured on GPUs before, with all that predictions of them need to know."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lemo.planner.memory import StepMemory
from lemo.planner.rows import kept_rows
from lemo.planner.shape import Adapters, LayerRows, ModelShape, Step, step_of
from lemo.planner.timing import Operations, Rates, StepTime

__all__ = [
    "RecordedStep",
    "is_fitted",
    "predicted_bytes",
    "predicted_seconds",
    "rates_of",
    "recorded_steps",
    "timed_steps",
]

RESULTS = Path(__file__).parents[1] / "results"
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_28M = ModelShape(14, 384, 1024, 6, 2, 64, 16384, tied=True)
SMOLLM2_135M = ModelShape(30, 576, 1536, 9, 3, 64, 49152, tied=True)
# What quality.py calls models.
MODELS = {"model": ("28M", LLAMA_28M), "smollm2": ("135M", SMOLLM2_135M)}
# All recorded steps were measured when an adapter took more of the host's operations, and every
# linear layer was a node of its own.
EARLIER = Operations(base=34, adapter=(8, 0, 0), cast=(6, 0, 0), apart=(18, 0, 0), norms=60)
# Commits since which rows that no layer keeps are dropped before the layers.
DROPPING = ("ad81fac", "df7a020")
# Of answers.py, before adapters of another dtype stored what they store now.
APART = ("fdcd23c", "fc63f2f", "ad81fac")
# Since which steps store what they store now.
NOW = ("ca098e7",)
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


class EarlierAdapters(Adapters):
    """Adapters whose products in fp32 were just that."""

    def are_split(self, step: Step) -> bool:
        return False


class RecordedMemory(StepMemory):
    """The bytes of a recorded step: linear layers stored more than they do now.

    Adapters were cast in either pass, and not stored. All tokens had tables of rotations. Where
    norms are trained, every adapted layer stored a narrow copy of their result. Adapters of another
    dtype than the layers were PEFT's own, each with a wide copy of its input.
    """

    @property
    def fixed(self) -> int:
        step = self._step
        rows = step.tokens - (step.tokens if step.embeds_all else step.residual_rows)
        return super().fixed + 2 * rows * self._shape.head_size * step.size

    def _linears(
        self, names: tuple[str, ...], width: int, normalised: bool = False, held: bool = False
    ) -> int:
        adapters, size = self._adapters, self._step.size
        count = sum(name in adapters.targets for name in names)
        if adapters.apart:
            return count * (width + adapters.rank) * adapters.size
        if normalised and self._norms_apart:
            return count * (width + adapters.rank) * size
        return super()._linears(names, width, normalised, held)

    def _casts(self) -> int:
        return 0

    def _copies(self, names: tuple[str, ...], rows: int, backward: bool = True) -> int:
        adapters = self._adapters
        if not (adapters.apart and backward and names == ("down_proj",)):
            return 0
        if not adapters.targets.issuperset(names):
            return 0
        return rows * self._shape.width * (adapters.size + self._step.size)


class RecordedTime(StepTime):
    """The seconds of a recorded step, in which adapters of another dtype were PEFT's own: results
    were scaled and narrowed before they were added."""

    def _widened(self, inputs: int, outputs: int) -> tuple[int, int]:
        size, wide = self._step.size, self._adapters.size
        forward = inputs * (size + 2 * wide) + outputs * (6 * wide + 2 * size)
        return forward, outputs * (2 * size + 6 * wide) + inputs * (3 * wide + 4 * size)


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
        special = (
            shape.get("loss")
            or shape.get("products", "dtype") != "dtype"
            or shape["scorer"] in ("attention", "predictor")
        )
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
    """Steps of `lemo finetune`: LoRA everywhere in fp32, norms too, autocast."""
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
        name, model = MODELS[shape["model"]]
        dense = {layer % model.layers for layer in settings.get("dense_layers", ())}
        kept = kept_rows(lengths, settings["keep"], block, ends)
        rows = [
            LayerRows(sum(lengths), sum(lengths)) if index in dense else LayerRows(kept, kept)
            for index in range(model.layers)
        ]
        alone = row["runs_at_a_time"] == 1
        key = (
            row["commit"],
            name,
            tokens,
            batch,
            passes,
            tuple(rows),
            settings.get("group_size"),
            alone,
        )
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
            name,
            tokens,
            settings["keep"],
            model,
            Adapters(16, norms=True),
            step_of(model, lengths, rows, labelled, drops=False, autocast=True, passes=passes),
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
        if row["commit"] not in APART:
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
            EarlierAdapters(16, apart=True),
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


# --- memory


def predicted_bytes(step: RecordedStep) -> int:
    """The peak memory of a recorded step."""
    kind = StepMemory if step.commit in NOW else RecordedMemory
    memory = kind(step.shape, step.adapters, step.step, step.quantize)
    return memory.peak([step.recompute] * step.shape.layers)


# --- time

# Before 47cc4f2 attention ran in kernels that are slower on these cards.
SLOWER = ("d90a16b", "f639879")
# The rows that rates are fitted to: (commit, name). Short ones: each takes half a second at most.
# Products and, by the first two of a card, bandwidth and the host's time for an operation.
FITTED = {
    "NVIDIA H200": {
        "products": ("e562c88", "8B 16384 keep 0.5 none"),
        "bytes": ("990b344", "28M 8x16384 keep 0.5 none"),
        "launch": ("990b344", "28M 8x16384 keep 0.3 none"),
    },
    "NVIDIA H100 80GB HBM3": {
        "bytes": ("8a567fb", "28M 8x16384 keep 0.5 none"),
        "launch": ("8a567fb", "28M 8x16384 keep 0.3 none"),
    },
}
# The rows of h200_attention.jsonl that give attention's rates: of 8192 tokens, at this commit. The
# H100 has none; its multiprocessors are those of the H200, so it gets the same rates of products
# and of attention.
ATTENTION_COMMIT, ATTENTION_TOKENS = "990b344", 8192


def predicted_seconds(step: RecordedStep, rates: Rates) -> float:
    """The time of a recorded step by some rates."""
    shape, adapters = step.shape, step.adapters
    group = step.group_size
    time = RecordedTime(shape, adapters, step.step, rates, group_size=group, started=EARLIER)
    return time.seconds([step.recompute] * step.shape.layers)


def rates_of(step: RecordedStep) -> Rates:
    """Those of its card, fitted to the rows of `FITTED`, and of its size of heads."""
    return replace(_fitted_rates()[step.gpu], **_attention_rates()[step.shape.head_size])


def is_fitted(step: RecordedStep) -> bool:
    """Whether rates were fitted to it."""
    return (step.commit, step.name) in FITTED[step.gpu].values() and step.seconds is not None


def timed_steps() -> list[RecordedStep]:
    """Recorded steps whose time can be predicted: alone on the card, with the kernels of today."""
    return [
        step for step in recorded_steps() if step.seconds is not None and step.commit not in SLOWER
    ]


@cache
def _attention_rates() -> dict[int, dict[str, float]]:
    """Rates of attention by the size of heads."""
    names = {"segment_attention": "attention", "segment_attention_backward": "attention_backward"}
    found: dict[int, dict[str, float]] = {}
    for row in _rows("h200_attention"):
        shape = row["shape"]
        wanted = row["commit"] == ATTENTION_COMMIT and shape["tokens"] == ATTENTION_TOKENS
        if wanted and row["bench"] in names and "lengths" not in shape:
            rate = 1e12 * row["tflops"]
            found.setdefault(shape["head_size"], {})[names[row["bench"]]] = rate
    return found


@cache
def _fitted_rates() -> dict[str, Rates]:
    steps = {(each.gpu, each.commit, each.name): each for each in timed_steps()}
    rates, found = Rates(7e14, 6e14, 6e14, 3e12, 4e-5), {}
    for gpu, rows in FITTED.items():
        # Each of them to its own row, in turn, until nothing changes.
        for _ in range(8):
            for name, (commit, row) in rows.items():
                rates = _fit(rates, name, steps[gpu, commit, row])
        found[gpu] = rates
    return found


def _fit(rates: Rates, name: str, step: RecordedStep) -> Rates:
    """The rates with one of them changed so that they give the time of a step."""
    attention = _attention_rates()[step.shape.head_size]
    low, high = getattr(rates, name) / 10, getattr(rates, name) * 10
    for _ in range(40):
        middle = math.sqrt(low * high)
        changed = replace(rates, **attention, **{name: middle})
        # Seconds of an operation are no rate: more of them take longer.
        slow = (predicted_seconds(step, changed) > step.seconds) != (name == "launch")
        low, high = (middle, high) if slow else (low, middle)
    return replace(rates, **{name: middle})
