"""Predictors of block scores, as they run and as they are stored."""

from lemo.predictors.predictor_set import PredictorSet
from lemo.predictors.storage import load

__all__ = ["PredictorSet", "load"]
