"""Lexical scores: the words that a block shares with the answers. No model is asked."""

from torch import Tensor

from lemo.relevance.answers import Answers
from lemo.relevance.words import word_relevance
from lemo.selection.scorers.answers import AnswerScorer
from lemo.selection.scorers.base import BlockedBatch

__all__ = ["LexicalScorer"]


class LexicalScorer(AnswerScorer):
    """Scores a block by the rare words that it shares with an answer, in two steps.

    An answer's words are its tokens and the 8 tokens before it, the end of its question. First
    step: a word counts log(blocks / blocks that have it). Second step, for answers that are copied
    from a place that the question describes with other words, or that only another fact leads to:
    the 16 tokens of the prompt that hold most of the answer are its place, and the words around it
    (24 tokens before its end, 8 behind) are looked for; a block counts the square of the most of
    them that stand within 32 tokens. A block has the larger of the two steps' scores.

    It costs no forward pass: sorting the tokens of a batch. It fails where nothing of the answer
    stands in the prompt and the question has other words than the text.

    Args:
        seed: of the random scores of sequences without answers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__("lexical", seed)

    def relevance(
        self, layer: int, residual: Tensor, batch: BlockedBatch, answers: list[Answers | None]
    ) -> list[Tensor | None]:
        assert batch.ids is not None
        size = batch.layout.block_size
        return [
            None if found is None else word_relevance(ids, found, size)
            for ids, found in zip(batch.ids.split(batch.layout.seqlens), answers)
        ]
