"""The task "text": a document as it is, so that training on answers does not spoil text."""

from __future__ import annotations

import random

import torch

from answer_tasks.haystacks import Haystacks
from answer_tasks.windows import NO_LABEL, Answer, Window

__all__ = ["LABELLED_TOKENS", "text"]

# About as many as the answers of a window have.
LABELLED_TOKENS = 128


def text(haystacks: Haystacks, tokens: int, generator: random.Random) -> Window:
    """A window of a document; its last tokens have labels."""
    document, start = haystacks.cut(generator, tokens)
    ids = torch.from_numpy(document.ids[start : start + tokens].astype("int64"))
    first = max(tokens - LABELLED_TOKENS, 0)
    labels = torch.full_like(ids, NO_LABEL)
    labels[first:] = ids[first:]
    return Window("text", ids, labels, (Answer(first, tokens, (), None),))
