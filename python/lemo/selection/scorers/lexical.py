"""Lexical scores: the words that a block shares with the answers. No model is asked."""

from collections.abc import Sequence

from torch import Tensor

from lemo import ops
from lemo.relevance.answers import Answers
from lemo.selection.scorers.answers import AnswerScorer
from lemo.selection.scorers.base import BlockedBatch

__all__ = ["LexicalScorer"]


class LexicalScorer(AnswerScorer):
    """Scores a block by the rare words that it shares with an answer, or with what stands around
    the place in the prompt that the answer repeats; see `lemo.ops.word_relevance`.

    The second step finds what a question says with other words, where the answer is copied, and
    facts that only another fact leads to. It costs no forward pass, but milliseconds on the host.
    It fails where nothing of the answer stands in the prompt, and the question has other words than
    the text or stands before it (docs/ANSWERS.md).

    Args:
        seed: of the random scores of sequences without answers.
    """

    reads_residual = False

    def __init__(self, seed: int) -> None:
        super().__init__("lexical", seed)

    def relevance(
        self,
        layer: int,
        residual: Tensor,
        batch: BlockedBatch,
        texts: Sequence[Tensor],
        answers: Sequence[Answers | None],
    ) -> list[Tensor | None]:
        size = batch.layout.block_size
        return [
            None if found is None else ops.word_relevance(ids, found.firsts, found.ends, size)
            for ids, found in zip(texts, answers)
        ]
