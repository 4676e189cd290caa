"""Reading a run folder: configuration, step log, kept map and evaluation of one run."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from pathlib import Path

from lemo.files import read_json
from lemo.planner.text import ACTIONS
from lemo.settings.base import read_yaml
from lemo.training.metrics import read_metrics
from lemo.training.run_folder import (
    CONFIG_NAME,
    ELIMINATION_NAME,
    KEPT_MAP_NAME,
    METRICS_NAME,
    PLAN_NAME,
    RELEVANCE_NAME,
)
from lemo.training.run_log import LOG_NAME, describe_broken, parse_log

SUB_BLOCKS = ("attention", "mlp")
# What values of other kinds than are expected raise.
_MISFITS = (KeyError, TypeError, ValueError, ArithmeticError)

_log = logging.getLogger("lemo")


@dataclasses.dataclass(frozen=True)
class KeptMap:
    """Which blocks of one sequence each layer kept in its attention and in its MLP.

    Attributes:
        block_size: tokens of a block.
        tokens: tokens of the sequence.
        layers: for each layer ``{"attention": [block indices], "mlp": [block indices]}``; null in
            the file stands for every block.
    """

    block_size: int
    tokens: int
    layers: list[dict[str, list[int]]]

    @property
    def blocks(self) -> int:
        return math.ceil(self.tokens / self.block_size)


@dataclasses.dataclass(frozen=True)
class Fact:
    """A line planted in a prompt: where it begins, in tokens, what it says, whether it is asked."""

    token: int
    text: str
    asked: bool


@dataclasses.dataclass(frozen=True)
class BestBlock:
    """A block that an answer needs: its index, its share of the answer's relevance, and words that
    it shares with question and answer."""

    block: int
    score: float
    words: list[str]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question at the end of a prompt, its answer, and the blocks that scored best for it."""

    question: str
    answer: str
    blocks: list[BestBlock]


@dataclasses.dataclass(frozen=True)
class RelevanceMap:
    """Why a training step kept the blocks of one prompt.

    Attributes:
        block_size: tokens of a block.
        tokens: tokens of the prompt with its answers.
        scores: for each block its relevance, the largest share over the answers.
        kept: indices of the blocks that were kept.
        facts: what was planted.
        questions: what was asked.
    """

    block_size: int
    tokens: int
    scores: list[float]
    kept: list[int]
    facts: list[Fact]
    questions: list[Question]


@dataclasses.dataclass(frozen=True)
class RecordedPlan:
    """What a run has written of its plan: what was planned and predicted of a step.

    Attributes:
        modes: for each layer "none", "selective" or "layer".
        kept_bytes: for each layer, stored between its forward and its backward pass.
        peak_bytes, seconds: predicted of a step.
        limit_bytes: that it was to fit into.
        host_bytes: for each layer, on the host in between; empty: nothing was to go there.
    """

    modes: list[str]
    kept_bytes: list[int]
    peak_bytes: float
    seconds: float
    limit_bytes: float
    host_bytes: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        name: how plots and tables call the run.
        folder: where it lies.
        config: ``config.yaml`` as a dict, empty when there is none.
        elimination: its settings of elimination, what was left open filled in as far as the run
            wrote it; empty without elimination.
        records: one dict a step, ascending by step (see :mod:`lemo.training.run_log`).
        broken: lines of the log that are no records.
        kept_map: the kept blocks of one document, None when nothing was ever eliminated.
        metrics: rows of evaluations, dicts with ``source`` (the documents), ``kind``, ``length``,
            ``perplexity`` and ``tail_perplexity``, or of answers ``exact`` and ``right_tokens``.
        relevance: why the blocks of one prompt were kept, None where nobody wrote it.
        plan: what was planned, None where memory was not limited.
    """

    name: str
    folder: Path
    config: dict
    records: list[dict]
    broken: int
    kept_map: KeptMap | None
    metrics: list[dict]
    relevance: RelevanceMap | None
    plan: RecordedPlan | None = None
    elimination: dict = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.records]

    def series(self, field: str) -> list[float]:
        """The values of ``field`` over the steps; NaN where a record lacks it."""
        return [_number(record.get(field)) for record in self.records]

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps (at least one): a single step is noise."""
        losses = self.series("loss")
        return statistics.fmean(losses[-max(1, len(losses) // 10) :])

    @property
    def tokens(self) -> int:
        return int(sum(_number(record.get("tokens"), 0.0) for record in self.records))

    @property
    def peak_memory_bytes(self) -> float:
        return max(
            (v for v in self.series("peak_memory_bytes") if not math.isnan(v)), default=math.nan
        )

    @property
    def kept_share(self) -> float:
        """Mean share of token rows that the layers kept, over all steps; 1 for a dense run."""
        shares = [v for v in self.series("kept_share") if not math.isnan(v)]
        return statistics.fmean(shares) if shares else 1.0

    @property
    def eliminated(self) -> bool:
        """Whether any layer ever left out a token, as far as the log says."""
        return any(share < 1 for s in SUB_BLOCKS for row in self.kept_by_layer(s) for share in row)

    def median(self, field: str) -> float:
        values = [v for v in self.series(field) if not math.isnan(v)]
        return statistics.median(values) if values else math.nan

    def kept_by_layer(self, sub_block: str) -> list[list[float]]:
        """Kept share as rows of layers over columns of steps, empty when the run logged none.

        Args:
            sub_block: "attention" or "mlp".
        """
        columns = [
            [_number(layer.get(sub_block)) for layer in r.get("kept") or []] for r in self.records
        ]
        layers = max((len(column) for column in columns), default=0)
        # A step that eliminated nothing may log no layers: it kept everything.
        columns = [column if column else [1.0] * layers for column in columns]
        return [list(row) for row in zip(*columns, strict=True)] if layers else []


def load_run(folder: str | Path, name: str | None = None) -> Run:
    """Read a run folder written by ``lemo finetune``.

    Args:
        folder: the run folder; it must hold ``log.jsonl``, the other files are optional.
        name: what to call the run; the folder's name by default.

    Raises:
        FileNotFoundError: the folder or its log does not exist.
        ValueError: a file in it is empty or cannot be read; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"run: expected the folder of a run, but '{folder}' {fault}")
    records, broken = _read_records(folder / LOG_NAME)
    config = read_yaml(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        config=config,
        records=records,
        broken=broken,
        kept_map=_read_kept_map(folder / KEPT_MAP_NAME),
        metrics=read_metrics(folder / METRICS_NAME),
        relevance=_read_relevance(folder / RELEVANCE_NAME),
        plan=_read_plan(folder / PLAN_NAME),
        elimination=_read_elimination(folder, config),
    )


def _read_records(path: Path) -> tuple[list[dict], int]:
    """The records of a step log, and how many of its lines are none, which a warning names."""
    if not path.is_file():
        raise FileNotFoundError(f"run: expected the step log '{path}', which does not exist")
    records, broken = parse_log(path)
    message = describe_broken(path, broken)
    if not records:
        raise ValueError(
            f"{path}: expected at least one step, got an empty log"
            if not broken
            else f"{message}; expected at least one step"
        )
    if broken:
        _log.warning("%s", message)
    return records, len(broken)


def _read_kept_map(path: Path) -> KeptMap | None:
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        kept = KeptMap(int(data["block_size"]), int(data["tokens"]), list(data["layers"]))
        every = list(range(kept.blocks))
        layers = [
            {s: every if layer[s] is None else layer[s] for s in SUB_BLOCKS}
            for layer in kept.layers
        ]
        indices = {index for layer in layers for s in SUB_BLOCKS for index in layer[s]}
    except _MISFITS as error:
        raise ValueError(
            f"{path}: expected block_size, tokens and layers, got {error!r}"
        ) from error
    if not layers or not indices <= set(every):
        raise ValueError(
            f"{path}: expected kept blocks of layers in [0, {kept.blocks}), "
            f"got {sorted(indices, key=str)}"
        )
    return dataclasses.replace(kept, layers=layers)


def _read_relevance(path: Path) -> RelevanceMap | None:
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        questions = [
            Question(
                str(entry["question"]),
                str(entry["answer"]),
                [
                    BestBlock(int(b["block"]), float(b["score"]), [str(w) for w in b["words"]])
                    for b in entry["blocks"]
                ],
            )
            for entry in data["questions"]
        ]
        relevance = RelevanceMap(
            int(data["block_size"]),
            int(data["tokens"]),
            [float(score) for score in data["scores"]],
            [int(block) for block in data["kept"]],
            [Fact(int(f["token"]), str(f["text"]), bool(f["asked"])) for f in data["facts"]],
            questions,
        )
        blocks = math.ceil(relevance.tokens / relevance.block_size)
    except _MISFITS as error:
        raise ValueError(
            f"{path}: expected block_size, tokens, scores, kept, facts and questions, got {error!r}"
        ) from error
    indices = [*relevance.kept, *(best.block for q in questions for best in q.blocks)]
    if len(relevance.scores) != blocks or not set(indices) <= set(range(blocks)):
        raise ValueError(
            f"{path}: expected {blocks} scores and blocks in [0, {blocks}), got "
            f"{len(relevance.scores)} scores and {sorted(set(indices))}"
        )
    return relevance


def _read_plan(path: Path) -> RecordedPlan | None:
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        plan = RecordedPlan(
            [str(mode) for mode in data["modes"]],
            [int(size) for size in data["kept_bytes"]],
            float(data["peak_bytes"]),
            float(data["seconds"]),
            float(data["limit_bytes"]),
            [int(size) for size in data.get("host_bytes", [])],
        )
        complete = len(plan.host_bytes) in (0, len(plan.modes))
        complete &= len(plan.modes) == len(plan.kept_bytes) and set(plan.modes) <= set(ACTIONS)
    except _MISFITS as error:
        raise ValueError(
            f"{path}: expected modes, kept_bytes, peak_bytes, seconds and limit_bytes, got "
            f"{error!r}"
        ) from error
    if not complete:
        raise ValueError(
            f"{path}: expected a mode and bytes of each layer, got {plan.modes} and "
            f"{len(plan.kept_bytes)} numbers"
        )
    return plan


def _read_elimination(folder: Path, config: dict) -> dict:
    """The settings of elimination as the run resolved them, or as they were asked for."""
    path, found = folder / CONFIG_NAME, config.get("elimination") or {}
    if found and (folder / ELIMINATION_NAME).is_file():
        path = folder / ELIMINATION_NAME
        found = read_json(path)
    _check_group(path, "elimination", found)
    _check_group(path, "layerwise", found.get("layerwise", {}))
    return found


def _check_group(path: Path, name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name}: expected settings, got {type(value).__name__}")


def _number(value, missing: float = math.nan) -> float:
    return float(value) if isinstance(value, (int, float)) else missing
