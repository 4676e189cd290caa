"""Trains the predictor of relevance: what the answers of a prompt need, said by its tokens alone.

It learns from retrieval heads of the dense model, which look from the rows that predict an answer
at what the answer needs, or from what is known to be needed. It reads embeddings, so no layer runs
before blocks are chosen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lemo import ops
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.eval_mode import evaluating
from lemo.models.layers.architectures import Architecture, architecture_of
from lemo.models.layers.scout import Scout
from lemo.packing.blocks import BlockLayout, kept_blocks
from lemo.predictors.model import check_embedding, model_description
from lemo.predictors.relevance import SHARPNESS, RelevancePredictor, query_rows
from lemo.predictors.storage import RELEVANCE, tensors_of_relevance, write_folder
from lemo.preparation.elastic import ElasticSize
from lemo.preparation.output import check_output, description_of, publish, work_folder
from lemo.preparation.reports import Report
from lemo.preparation.training import schedule, windows_of_steps
from lemo.relevance.answers import Answers
from lemo.relevance.attention import head_relevance, with_keys
from lemo.relevance.heads import RetrievalHeads
from lemo.selection.scorers.relevance import predicted_relevance
from lemo.settings.preparation import PredictorSettings

__all__ = ["RelevanceWindow", "prepare_relevance"]

Span = tuple[int, int]

# Windows whose embeddings say how large features are.
_SAMPLE = 32
_TINY = 1e-6


@dataclass(frozen=True)
class RelevanceWindow:
    """A prompt with answers, to learn from or to test on.

    Attributes:
        kind: group by which recall is reported.
        ids: [S] int64.
        labelled: [S] bool, rows that predict a token of an answer.
        needed: for each answer, a run of labelled rows, the (first, end) tokens that it needs;
            None: nobody knows, retrieval heads say it.
    """

    kind: str
    ids: Tensor
    labelled: Tensor
    needed: tuple[tuple[Span, ...], ...] | None = None


@dataclass(frozen=True)
class _Lesson:
    """A window with answers, and what they need.

    Attributes:
        window, answers: both.
        shares: [A, B] fp32, how much each answer needs each block; 0 everywhere where an answer
            needs nothing.
    """

    window: RelevanceWindow
    answers: Answers
    shares: Tensor


def prepare_relevance(
    model: nn.Module,
    training: Sequence[RelevanceWindow],
    held_out: Sequence[RelevanceWindow],
    output: str | Path,
    settings: PredictorSettings | None = None,
    heads: RetrievalHeads | None = None,
    overwrite: bool = False,
    report: Report = lambda stage, done, total, message: None,
) -> dict[str, Any]:
    """Trains a predictor of relevance and writes it to a folder.

    Args:
        model: a supported causal LM, frozen, in its dtype and on its device; left as it was.
        training: windows to learn from.
        held_out: windows of other examples, for recall.
        output: the folder to write; appears complete or not at all.
        settings: with target "relevance"; None: its defaults.
        heads: retrieval heads of the model, for windows of which nobody knows what they need.
        overwrite: replace the folder of an earlier preparation, or an empty one, at `output`.
        report: called as report(stage, done, total, message) for every unit of work.

    Returns:
        The description that was written to predictor.json.

    Raises:
        FileExistsError: `output` exists and `overwrite` is not set, or holds anything else.
        TypeError: an unsupported model.
        ValueError: settings of another target; windows without answers that need something; no
            heads where windows need them; activations that are not finite.
        OSError: the disk is full or cannot be written.
    """
    settings = PredictorSettings(target=RELEVANCE) if settings is None else settings
    if settings.target != RELEVANCE:
        raise ValueError(f"settings: expected target '{RELEVANCE}', got '{settings.target}'")
    output = Path(os.path.realpath(output))
    check_output(output, overwrite)
    architecture = architecture_of(model)
    architecture.check_parts()
    if heads is not None:
        description = model_description(architecture.config, architecture.embedding)
        check_embedding("heads", heads.model, description, "lemo relevance heads")
    with work_folder(output) as work, evaluating(model):
        lessons = _Lessons(architecture, settings.block_size, heads)
        taught = lessons.of("training", training, report)
        tested = lessons.of("held_out", held_out, report)
        predictor, losses = _train(architecture, taught, settings, report)
        # What is measured is what is stored.
        tensors = tensors_of_relevance(predictor)
        for parameter in predictor.parameters():
            parameter.data.copy_(parameter.to(torch.bfloat16))
        description = _describe(architecture, predictor, settings, (taught, tested), losses)
        result = work / "result"
        result.mkdir()
        write_folder(result, tensors, description)
        publish(result, output, overwrite)
    return description


# --- what is learned


class _Lessons:
    """Finds what the answers of windows need.

    Args:
        architecture: access to the model.
        block_size: tokens of a block.
        heads: of the model; None: windows have to say it.
    """

    def __init__(
        self, architecture: Architecture, block_size: int, heads: RetrievalHeads | None
    ) -> None:
        self._architecture = architecture
        self._size = block_size
        self._heads = None if heads is None else heads.by_layer()

    def of(self, name: str, windows: Sequence[RelevanceWindow], report: Report) -> list[_Lesson]:
        """The windows that teach something; `name` is for errors."""
        lessons = []
        for done, window in enumerate(windows):
            answers = Answers.of(window.labelled)
            if answers is not None:
                lesson = _Lesson(window, answers, self._shares(name, window, answers))
                if bool((lesson.shares > 0).any()):
                    lessons.append(lesson)
            report("relevance", done + 1, len(windows), f"{name}, {window.ids.numel()} tokens")
        if not lessons:
            raise ValueError(
                f"{name}: expected windows with answers that need something of what stands before "
                f"them, got none in {len(windows)}"
            )
        return lessons

    def _shares(self, name: str, window: RelevanceWindow, answers: Answers) -> Tensor:
        if window.needed is not None:
            shares = self._known(name, window, answers)
        elif self._heads is None:
            raise ValueError(
                f"heads: expected retrieval heads, because windows of '{name}' do not say what "
                "their answers need, got None"
            )
        else:
            shares = self._looked_at(window, answers)
        shares = shares * answers.open_blocks(self._size, shares)
        total = shares.sum(-1, keepdim=True)
        return torch.where(total > _TINY, shares / total.clamp(min=_TINY), 0.0)

    def _known(self, name: str, window: RelevanceWindow, answers: Answers) -> Tensor:
        assert window.needed is not None
        starts = [row for row in answers.firsts if row == 0 or not window.labelled[row - 1]]
        if len(starts) != len(window.needed):
            raise ValueError(
                f"{name}: expected what each of {len(starts)} answers needs, got "
                f"{len(window.needed)} entries"
            )
        shares = torch.zeros(len(answers), -(-window.ids.numel() // self._size))
        for answer, first in enumerate(answers.firsts):
            # Parts of a long answer need what the whole needs.
            spans = window.needed[sum(start <= first for start in starts) - 1]
            for begin, end in spans:
                shares[answer, begin // self._size : (end - 1) // self._size + 1] = 1.0
        return shares

    @torch.no_grad()
    def _looked_at(self, window: RelevanceWindow, answers: Answers) -> Tensor:
        assert self._heads is not None
        architecture = self._architecture
        batch, residual = _embedded(architecture, window, self._size)
        parts = []
        for index, q, k in Scout(architecture)(batch, residual, 0, self._heads):
            mine, scale = with_keys(q, k, self._heads[index]), architecture.scale(index)
            [found] = head_relevance(*mine, batch.layout, [answers], scale)
            assert found is not None
            parts.append(found)
        looks = torch.cat(parts, 1).mean(1).float().cpu()
        if not bool(looks.isfinite().all()):
            raise ValueError(
                f"model: what its retrieval heads look at in {window.ids.numel()} tokens is not "
                "finite; expected activations that are finite in the dtype"
            )
        return looks


def _embedded(
    architecture: Architecture, window: RelevanceWindow, block_size: int
) -> tuple[Any, Tensor]:
    device = next(architecture.causal_lm.parameters()).device
    return architecture.embed(ForwardArguments(input_ids=window.ids[None].to(device)), block_size)


# --- training


def _train(
    architecture: Architecture,
    lessons: list[_Lesson],
    settings: PredictorSettings,
    report: Report,
) -> tuple[RelevancePredictor, list[float]]:
    """The trained predictor, and the loss of every step."""
    device = next(architecture.causal_lm.parameters()).device
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    tokens = _tokens(architecture, lessons, settings.block_size)
    scale = 1.0 / tokens.std(0).clamp(min=_TINY)
    rank = settings.rank or scale.numel() // 16
    predictor = RelevancePredictor(scale.numel(), rank, scale.cpu(), generator).to(device)
    predictor.centre(tokens)
    optimizer = torch.optim.AdamW(
        predictor.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    elastic = ElasticSize(predictor, optimizer, settings.prune_zero_share, settings.prune_to)
    losses: list[float] = []
    prunings = settings.prunings
    steps = windows_of_steps(len(lessons), settings.windows_per_step, generator)
    for step, chosen in zip(range(settings.steps), steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings.steps)
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for index in chosen:
            lesson = lessons[index]
            with torch.no_grad():
                _, x = _embedded(architecture, lesson.window, settings.block_size)
            x = x.float()
            loss = _loss(predictor, x, lesson, settings.block_size) / len(chosen)
            loss.backward()
            total += loss.detach()
            elastic.count(x * predictor.scale)
        nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item())
        report("predictor", step + 1, settings.steps, f"loss {losses[-1]:.3f}")
        if step + 1 in prunings:
            elastic.prune((prunings.index(step + 1) + 1) / len(prunings))
    return predictor, losses


def _loss(predictor: RelevancePredictor, x: Tensor, lesson: _Lesson, block_size: int) -> Tensor:
    """Cross-entropy of the shares that are predicted for the answers that need something."""
    shares = lesson.shares.to(x.device)
    scores = _scores(predictor, x, lesson.answers, block_size)
    free = lesson.answers.open_blocks(block_size, shares)
    predicted = scores.masked_fill(~free, -torch.inf).log_softmax(-1).masked_fill(~free, 0.0)
    needing = shares.sum(-1) > 0
    return -(shares * predicted).sum(-1)[needing].mean()


def _scores(predictor: RelevancePredictor, x: Tensor, answers: Answers, block_size: int) -> Tensor:
    """[A, B]: sums over an answer's tokens of the largest product in each block, differentiable;
    `lemo.selection.scorers.relevance` computes the same without a matrix of all tokens."""
    tokens, blocks = x.shape[0], -(-x.shape[0] // block_size)
    rows, of_rows = query_rows(answers, tokens)
    layout = BlockLayout.from_seqlens([tokens], block_size, x.device)
    queries = predictor.queries(x, rows, len(rows) * [(0, tokens)])
    keys = predictor.keys(x, layout)
    products = SHARPNESS * queries @ keys.T
    products = pad(products, (0, blocks * block_size - tokens), value=-math.inf)
    largest = products.reshape(len(rows), blocks, block_size).amax(-1)
    index = torch.tensor(of_rows).to(x.device)
    return largest.new_zeros(len(answers), blocks).index_add(0, index, largest)


@torch.no_grad()
def _tokens(architecture: Architecture, lessons: list[_Lesson], block_size: int) -> Tensor:
    """[T, H] fp32: embeddings of the different tokens of some windows."""
    rows = []
    for lesson in lessons[:_SAMPLE]:
        _, x = _embedded(architecture, lesson.window, block_size)
        places = {token: place for place, token in enumerate(lesson.window.ids.tolist())}
        rows.append(x[list(places.values())].float())
    return torch.cat(rows)


# --- what came out


def _describe(
    architecture: Architecture,
    predictor: RelevancePredictor,
    settings: PredictorSettings,
    lessons: tuple[list[_Lesson], list[_Lesson]],
    losses: list[float],
) -> dict[str, Any]:
    """predictor.json."""
    taught, tested = lessons
    parameters = sum(parameter.numel() for parameter in predictor.parameters())
    lengths = [lesson.window.ids.numel() for lesson in taught]
    shape = model_description(architecture.config, architecture.embedding)
    return {
        **description_of(architecture.causal_lm, shape, settings, parameters, lengths, len(tested)),
        "thresholds": {},
        "recall": dict(_recalls(architecture, predictor, tested, settings)),
        "loss": sum(losses[-20:]) / len(losses[-20:]),
        "hidden_units": {
            name: [net.down.shape[0], net.mid.shape[0]] for name, net in predictor.nets()
        },
    }


@torch.no_grad()
def _recalls(
    architecture: Architecture,
    predictor: RelevancePredictor,
    lessons: list[_Lesson],
    settings: PredictorSettings,
) -> Iterator[tuple[str, dict[str, float]]]:
    """By kind of window, and "mean": how much of what answers need the share `keep` of the blocks
    holds, {"predicted", "words" (scorer lexical), "most" (what could be held)}."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    size = settings.block_size
    for lesson in lessons:
        batch, x = _embedded(architecture, lesson.window, size)
        answers = lesson.answers
        words = ops.word_relevance(lesson.window.ids, answers.firsts, answers.ends, size)
        [predicted] = predicted_relevance(predictor, x, batch.layout, [answers])
        assert predicted is not None
        ranked = predicted.cpu(), words, lesson.shares
        held = [_held(each.amax(0), lesson, settings) for each in ranked]
        found.setdefault(lesson.window.kind, []).append((held[0], held[1], held[2]))
    names = ("predicted", "words", "most")
    for kind in sorted(found):
        columns = zip(*found[kind])
        yield kind, {name: sum(each) / len(each) for name, each in zip(names, columns)}
    columns = zip(*(row for rows in found.values() for row in rows))
    yield "mean", {name: sum(each) / len(each) for name, each in zip(names, columns)}


def _held(scores: Tensor, lesson: _Lesson, settings: PredictorSettings) -> float:
    """The mean share of what answers need that the blocks with labels and the best others hold."""
    free = lesson.answers.free_blocks(settings.block_size, scores) > 0
    budget = kept_blocks(settings.keep, scores.numel())
    # As `lemo.selection.budget`: at least half is for the prompt.
    count = max(budget - int((~free).sum()), -(-budget // 2))
    kept = scores.masked_fill(~free, -math.inf).topk(count).indices
    shares = lesson.shares[lesson.shares.sum(-1) > 0]
    return shares[:, kept].sum(-1).mean().item()
