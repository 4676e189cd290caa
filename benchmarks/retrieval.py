"""Retrieval from far back: a passage planted in real text, asked for at the end.

A window is [text before | passage | text after | question]: the passage is from another document,
the question is its first half, and the answer its second half, which the model has to copy from
where the passage stands. The share of the answer's tokens that the model puts first is measured
for passages at several depths, 0 (the beginning of the window) to 1 (right before the question),
and, as the floor, in the same windows with the passage left out.

The passage is real text, because a small model copies words it has seen in order, but not numbers.
It does so over short distances only; `with_copies` makes documents to train on that ask for more.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lemo.data import Document

PASSAGE_TOKENS = 96
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
# Of documents with copies: a passage, or the copy of an earlier one, after so many tokens of text.
_TOKENS_BETWEEN, _CHARACTERS_PER_TOKEN = 128, 4
# Where texts and passages are taken from: behind title pages and tables of contents.
_SKIPPED_CHARACTERS = 4000


def retrieval_windows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[dict]:
    """The windows of the task: for each document one for each depth, and one without a passage.

    Args:
        documents: texts of one kind; each lends its passage to the next one. At least two.
        tokenizer: the model's tokenizer.
        length: tokens of a window.
        depths: where the passage begins, as shares of the room for it.
        seed: of the places that passages are taken from.

    Returns:
        {"depth" (None: no passage), "ids" int64 [length], "answer" (its number of tokens, which are
        the last ones of the window)}.

    Raises:
        ValueError: fewer than two documents are long enough.
    """
    half = PASSAGE_TOKENS // 2
    room = length - half - half  # text and passage; question and answer follow
    if room < 2 * PASSAGE_TOKENS:
        raise ValueError(f"length: expected at least {4 * PASSAGE_TOKENS}, got {length}")
    generator = random.Random(seed)
    texts: list[list[int]] = []
    passages: list[list[int]] = []
    for document in documents:
        text = document.text[_SKIPPED_CHARACTERS : _SKIPPED_CHARACTERS + 8 * length]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < length:
            continue
        # Not from what is used as text: no passage stands in a window twice.
        rest = document.text[_SKIPPED_CHARACTERS + 8 * length :] or text
        start = generator.randrange(max(len(rest) - 16 * PASSAGE_TOKENS, 1))
        piece = rest[start : start + 16 * PASSAGE_TOKENS]
        passage = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        # The first tokens may be the end of a word.
        passage = passage[8 : 8 + PASSAGE_TOKENS]
        if len(passage) == PASSAGE_TOKENS:
            texts.append(ids)
            passages.append(passage)
    if len(texts) < 2:
        raise ValueError(
            f"documents: expected at least two of {length} tokens or more, got {len(texts)}"
        )
    windows = []
    for number, text in enumerate(texts):
        passage = passages[number - 1]
        for depth in (None, *depths):
            planted = [] if depth is None else passage
            place = int((depth or 0.0) * (room - PASSAGE_TOKENS))
            ids = [*text[:place], *planted, *text[place : room - len(planted)], *passage]
            windows.append({"depth": depth, "ids": torch.tensor(ids), "answer": half})
    return windows


def with_copies(documents: Sequence[Document], length: int, seed: int = 0) -> Iterator[Document]:
    """Documents to learn the task from: passages of others in them, and copies further on.

    After every 128 tokens or so stands either a passage of another document or, as often, a copy of
    one that stood before. How far before is drawn evenly in its logarithm, up to the length of a
    window.

    Args:
        documents: the texts; each gets its passages from the one before it in its kind.
        length: tokens of the windows that will be cut from them.
        seed: of the places of passages, and of what is copied.
    """
    generator = random.Random(seed)
    between = _TOKENS_BETWEEN * _CHARACTERS_PER_TOKEN
    size = PASSAGE_TOKENS * _CHARACTERS_PER_TOKEN
    farthest = max(length // (_TOKENS_BETWEEN + PASSAGE_TOKENS), 1)
    sources = {document.kind: document for document in documents}
    for document in documents:
        source, sources[document.kind] = sources[document.kind], document
        parts, passages, place = [], [], 0
        while place < len(document.text):
            end = _space(document.text, place + between)
            parts.append(document.text[place:end])
            back = round(farthest ** generator.random())
            if back <= len(passages) and generator.random() < 0.5:
                passage = passages[-back]
            else:
                start = _space(source.text, generator.randrange(max(len(source.text) - size, 1)))
                passage = source.text[start : _space(source.text, start + size)]
            parts.append(passage)
            passages.append(passage)
            place = end
        yield Document(document.id, document.kind, "".join(parts))


def _space(text: str, place: int) -> int:
    """The next white space from `place` on, or the end of the text."""
    return next((i for i in range(place, len(text)) if text[i].isspace()), len(text))


@torch.no_grad()
def retrieval_accuracy(model: PreTrainedModel, windows: Iterable[dict]) -> dict[str, float]:
    """Share of answer tokens, in percent, that the model puts first, by depth.

    Args:
        model: a causal language model in eval mode.
        windows: from `retrieval_windows`.

    Returns:
        Depth ("0", "0.25", ...; "none" without a passage) -> percent; "mean" over the depths.
    """
    found: dict[str, list[float]] = {}
    for window in windows:
        ids, answer = window["ids"].to(model.device), window["answer"]
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=answer + 1).logits
        hits = logits[0, :-1].argmax(-1) == ids[-answer:]
        depth = "none" if window["depth"] is None else f"{window['depth']:g}"
        found.setdefault(depth, []).append(100.0 * hits.float().mean().item())
    accuracy = {depth: sum(values) / len(values) for depth, values in found.items()}
    depths = [value for depth, value in accuracy.items() if depth != "none"]
    return accuracy | {"mean": sum(depths) / len(depths)}
