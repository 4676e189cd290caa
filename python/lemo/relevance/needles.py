"""Needles: facts planted in text, asked for at the end, to see what finds them.

In the manner of RULER (arXiv 2404.06654): many facts of one form, so that the name has to be read.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NeedleWindow", "needle_window"]

_FACTS = 16
_ASKED = 4

_QUALITIES = "amber brisk calm dusty eager faint gentle hollow icy jolly keen mellow narrow quiet"
_THINGS = "anchor basket candle drawer engine ferry garden harbor kettle ladder mirror orchard"
_PEOPLE = "Abbott Barlow Calder Dalton Elwood Fulton Garner Hobart Irving Jarvis Keaton Lowell"

# A fact, its question, and what a value looks like.
_FORMS: tuple[tuple[str, str, Callable[[random.Random], str]], ...] = (
    (
        "The code of the {name} is {value}.",
        "What is the code of the {name}?",
        lambda draw: str(draw.randrange(10**5, 10**6)),
    ),
    (
        "The {name} belongs to {value}.",
        "To whom does the {name} belong?",
        lambda draw: " ".join(draw.sample(_PEOPLE.split(), 2)),
    ),
    (
        "{value} is the key of the {name}.",
        "Which key has the {name}?",
        lambda draw: uuid.UUID(int=draw.getrandbits(128)).hex[:12],
    ),
)


@dataclass(frozen=True)
class NeedleWindow:
    """Text with facts, and questions about some of them behind it.

    Attributes:
        ids: [T] int64.
        labelled: [T] bool, rows that predict a token of an answer.
        needed: for each answer the (first, end) tokens of its fact.
    """

    ids: Tensor
    labelled: Tensor
    needed: tuple[tuple[int, int], ...]


def needle_window(
    text: Sequence[int], length: int, encode: Callable[[str], list[int]], draw: random.Random
) -> NeedleWindow:
    """A window of text with 16 facts at random places and questions about 4 of them.

    Args:
        text: tokens of a document; as many as needed are taken from a random place.
        length: tokens of the window.
        encode: gives the tokens of a string, without special tokens.
        draw: of everything random.

    Raises:
        ValueError: the text is too short for a window, or the window for the facts.
    """
    fact_form, question_form, make_value = draw.choice(_FORMS)
    pairs = [f"{quality} {thing}" for quality in _QUALITIES.split() for thing in _THINGS.split()]
    names = draw.sample(pairs, _FACTS)
    values = [make_value(draw) for _ in names]
    facts = [
        encode(f"\n{fact_form.format(name=name, value=value)}\n")
        for name, value in zip(names, values)
    ]
    tail: list[int] = []
    answers: list[tuple[int, int]] = []
    asked = draw.sample(range(_FACTS), _ASKED)
    for fact in asked:
        tail += encode(f"\nQuestion: {question_form.format(name=names[fact])}\nAnswer:")
        answer = encode(f" {values[fact]}")
        answers.append((len(tail), len(tail) + len(answer)))
        tail += answer
    room = length - len(tail) - sum(map(len, facts))
    if room < 0:
        raise ValueError(f"length: expected at least {length - room} tokens, got {length}")
    if len(text) < room:
        raise ValueError(f"text: expected at least {room} tokens, got {len(text)}")
    start = draw.randrange(len(text) - room + 1)
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    at = 0
    for cut, tokens in zip(sorted(draw.randrange(room + 1) for _ in facts), facts):
        ids += text[start + at : start + cut]
        places.append((len(ids), len(ids) + len(tokens)))
        ids += tokens
        at = cut
    ids += text[start + at : start + room]
    labelled = torch.zeros(length, dtype=torch.bool)
    for first, end in answers:
        labelled[len(ids) + first - 1 : len(ids) + end - 1] = True
    ids += tail
    return NeedleWindow(torch.tensor(ids), labelled, tuple(places[fact] for fact in asked))
