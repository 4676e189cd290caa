"""Predictors of block scores, as they run and as they are stored."""

from lemo.predictors.storage import PredictorSet, load

__all__ = ["PredictorSet", "load"]
