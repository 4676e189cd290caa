"""What scorers of answers have in common: they score the sequences that have answers."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.packing.to_device import to_device
from lemo.relevance.answers import Answers
from lemo.selection.scorers.base import BlockedBatch, Scorer
from lemo.selection.scorers.random import RandomScorer

__all__ = ["AnswerScorer"]


class AnswerScorer(Scorer):
    """Scores blocks by how much an answer of their sequence needs them.

    Every answer's scores are divided by their sum over the blocks without labels, and a block has
    the largest of them, so that each answer finds its own blocks (docs/LOG.md, 2026-11-28). All
    sub-blocks get the same scores. Sequences without labels, or with labels on more than half of
    their rows, get random scores.

    Args:
        name: of the scorer, for errors.
        seed: of the random scores.
    """

    def __init__(self, name: str, seed: int) -> None:
        self._name = name
        self._random = RandomScorer(seed)

    @abstractmethod
    def relevance(
        self,
        layer: int,
        residual: Tensor,
        batch: BlockedBatch,
        texts: Sequence[Tensor],
        answers: Sequence[Answers | None],
    ) -> list[Tensor | None]:
        """How much each answer of each sequence needs each of its blocks, [A, B] fp32, anywhere.

        Args:
            layer: the layer at whose entry the residual is.
            residual: [T, H].
            batch: the batch of the T rows.
            texts: the tokens of each sequence, on the CPU.
            answers: of each sequence; None where it has none, and so has the result.
        """

    def begin_step(self, step: int) -> None:
        self._random.begin_step(step)

    def begin_replica(self, replica: int) -> None:
        self._random.begin_replica(replica)

    def begin_pass(self, index: int) -> None:
        self._random.begin_pass(index)

    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        if batch.ids is None or batch.labelled is None:
            default = " (auto for prompts with answers)" if self._name == "lexical" else ""
            begin = f"scorer: '{self._name}'{default} expected the batch's "
            if batch.ids is None:
                raise ValueError(
                    f"{begin}input_ids, got inputs_embeds, as of prompt tuning and P-tuning; set "
                    "scorer='random', and keep_first=1, so that virtual tokens are kept, or "
                    "scorer='given' with handle.scored"
                )
            raise ValueError(
                f"{begin}labels, got none; pass them to the model, or use handle.labelled or "
                "handle.attach, or set scorer='random'"
            )
        layout = batch.layout
        texts, labelled = (rows.split(layout.seqlens) for rows in batch.on_host())
        answers = [Answers.of(rows) for rows in labelled]
        relevance = self.relevance(layer, residual, batch, texts, answers)
        scores = self._random(layer, kind, residual, batch).split(layout.block_counts)
        parts = [
            drawn if found is None else to_device(found.amax(0), drawn.device)
            for drawn, found in zip(scores, relevance)
        ]
        return torch.cat(parts)
