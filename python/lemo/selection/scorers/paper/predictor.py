"""Predicted scores: small trained networks foretell the exact ones."""

from torch import Tensor

from lemo.predictors import PredictorSet, load
from lemo.selection.scorers.base import BlockedBatch, ScoredModel, Scorer

__all__ = ["PredictorScorer"]


class PredictorScorer(Scorer):
    """The trained predictors of all layers of a model.

    Args:
        predictors: what runs.
        model: the model that is scored.
    """

    def __init__(self, predictors: PredictorSet, model: ScoredModel) -> None:
        self.predictors = predictors
        self._model = model
        self.block_size = predictors.block_size
        self.thresholds = predictors.thresholds

    @classmethod
    def from_folder(cls, folder: str, model: ScoredModel) -> "PredictorScorer":
        """The predictors that `lemo prepare` wrote for a model.

        Raises:
            FileNotFoundError, ValueError: see `lemo.predictors.load`.
        """
        return cls(load(folder, model.config, model.embedding), model)

    def __call__(self, layer: int, kind: str, residual: Tensor, batch: BlockedBatch) -> Tensor:
        x = self._model.normalized(layer, kind, residual)
        return self.predictors.scores(layer, kind, x, batch.layout)
