"""Predictors of block scores: labels, training with elastic size, thresholds, one folder."""

from lemo.predictors.storage import PredictorSet, load

__all__ = ["PredictorSet", "load"]
