"""The task "book": how a sentence of the document itself goes on. Nothing is planted."""

from __future__ import annotations

import random

import numpy as np
from transformers import PreTrainedTokenizerBase

from answer_tasks.haystacks import Haystacks
from answer_tasks.windows import Window, encoded, joined

__all__ = ["ANSWER_TOKENS", "book"]

ANSWER_TOKENS = 12
# Sentences whose rarity is above this share of those in the window are asked for.
_RAREST = 0.5
# The quotation has to be the only place of the text with its last tokens.
_UNIQUE_TOKENS = 8
_TRIES = 50


def book(
    haystacks: Haystacks,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    asked: int,
    generator: random.Random,
) -> Window:
    """A window whose questions quote the first half of a rare sentence of its text.

    The answer is the sentence's next 12 tokens. A line break follows which has no label, because
    nothing says where the answer ends.

    Raises:
        ValueError: the documents hold no window with so many sentences that can be asked for.
    """
    before, after, end = encoded(
        tokenizer, ['\nQuestion: how does the text go on after "', '"?\nAnswer:', "\n"]
    )
    for _ in range(_TRIES):
        document, start = haystacks.cut(generator, tokens)
        inside = np.flatnonzero(
            (document.sentences[:, 0] >= start) & (document.sentences[:, 1] <= start + tokens)
        )
        if len(inside) < asked:
            continue
        rarity = document.rarity[inside]
        rare = inside[rarity >= np.quantile(rarity, _RAREST)].tolist()
        text = document.ids[start : start + tokens]
        questions = []
        for index in generator.sample(rare, len(rare)):
            first, last = (int(place) - start for place in document.sentences[index])
            half = (first + last) // 2
            answer = text[half : half + ANSWER_TOKENS].tolist()
            if _occurs_once(text, text[half - _UNIQUE_TOKENS : half]):
                question = [*before, *text[first:half].tolist(), *after]
                questions.append((question, [*answer, *end], ((first, half + ANSWER_TOKENS),)))
            if len(questions) == asked:
                break
        room = tokens - sum(len(question) + len(answer) for question, answer, _ in questions)
        # Sentences behind the room that the questions leave are not in the window.
        if len(questions) == asked and all(span[1] <= room for _, _, (span,) in questions):
            return joined("book", [text[:room]], questions, unlabelled=len(end))
    raise ValueError(
        f"tokens: expected windows with {asked} rare sentences that can be asked for, found none "
        f"of {tokens} tokens in {_TRIES} tries"
    )


def _occurs_once(text: np.ndarray, piece: np.ndarray) -> bool:
    places = np.flatnonzero(text[: len(text) - len(piece) + 1] == piece[0])
    for i, token in enumerate(piece):
        places = places[text[places + i] == token]
    return len(places) == 1
