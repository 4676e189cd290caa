"""A window: text with facts planted in it, then questions with their answers.

Every answer begins with a space and ends with a line break, which belongs to it: a model that goes
on with another digit or another value is wrong. Only the answers have labels.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from answer_tasks.haystacks import Haystacks

__all__ = ["NO_LABEL", "Answer", "Plan", "Question", "Window", "encoded", "joined", "plant"]

NO_LABEL = -100
Span = tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """One answer of a window.

    Attributes:
        start, end: its tokens, [start, end).
        needed: spans of tokens that one has to read for it; none where the text does not say it.
        depth: where the first needed span begins, as a share of the window; None: nothing is
            needed.
    """

    start: int
    end: int
    needed: tuple[Span, ...]
    depth: float | None


@dataclass(frozen=True)
class Window:
    """One example.

    Attributes:
        task: its name.
        ids: int64 [tokens].
        labels: int64 [tokens], not shifted: the tokens of answers, NO_LABEL elsewhere.
        answers: in the order of the window.
    """

    task: str
    ids: Tensor
    labels: Tensor
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Question:
    """A question about planted facts.

    Attributes:
        text: without "Question:".
        answer: without the space before and the line break behind it.
        needs: indices of the facts that one has to read.
    """

    text: str
    answer: str
    needs: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is planted and asked.

    Attributes:
        facts: sentences in the order of the text.
        questions: in the order of the window.
    """

    facts: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text, without special ones."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def plant(
    task: str,
    plan: Plan,
    haystacks: Haystacks,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    generator: random.Random,
) -> Window:
    """The window of a plan: its facts at random places of a text, its questions at the end.

    Raises:
        ValueError: facts and questions alone are longer than the window.
    """
    questions = plan.questions
    pieces = encoded(
        tokenizer,
        [
            *(f"\n{fact}\n" for fact in plan.facts),
            *(f"\nQuestion: {question.text}\nAnswer:" for question in questions),
            *(f" {question.answer}\n" for question in questions),
        ],
    )
    facts = pieces[: len(plan.facts)]
    asked = pieces[len(facts) : len(facts) + len(questions)]
    answers = pieces[len(facts) + len(questions) :]
    fixed = sum(map(len, pieces))
    if fixed >= tokens:
        raise ValueError(
            f"tokens: expected more than the {fixed} of the facts and questions of task '{task}', "
            f"got {tokens}"
        )
    room = tokens - fixed
    document, start = haystacks.cut(generator, room)
    text = document.ids[start : start + room]
    parts: list[np.ndarray | list[int]] = []
    spans: list[Span] = []
    before = place = 0
    for cut, fact in zip(sorted(generator.randrange(room + 1) for _ in facts), facts):
        parts += [text[before:cut], fact]
        place += cut - before + len(fact)
        before = cut
        spans.append((place - len(fact), place))
    parts.append(text[before:])
    needed = [tuple(spans[fact] for fact in question.needs) for question in questions]
    return joined(task, parts, list(zip(asked, answers, needed)))


def joined(
    task: str,
    parts: Iterable[np.ndarray | list[int]],
    questions: Sequence[tuple[list[int], list[int], tuple[Span, ...]]],
    unlabelled: int = 0,
) -> Window:
    """A window of parts of text and (question, answer, needed spans).

    Args:
        unlabelled: tokens at the end of each answer that are not part of it.
    """
    pieces = [np.asarray(part, dtype=np.int64) for part in parts]
    place = sum(map(len, pieces))
    spans = []
    for question, answer, _ in questions:
        pieces += [np.array(question, dtype=np.int64), np.array(answer, dtype=np.int64)]
        start = place + len(question)
        place = start + len(answer)
        spans.append((start, place - unlabelled))
    ids = torch.from_numpy(np.concatenate(pieces))
    labels = torch.full_like(ids, NO_LABEL)
    answers = []
    for (start, end), (_, _, needed) in zip(spans, questions):
        labels[start:end] = ids[start:end]
        depth = min(first for first, _ in needed) / len(ids) if needed else None
        answers.append(Answer(start, end, needed, depth))
    return Window(task, ids, labels, tuple(answers))
