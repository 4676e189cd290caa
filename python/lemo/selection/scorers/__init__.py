"""Block scores: what answers need, or what a sub-block computes (LeMo, section 4).

`lexical` and `random` are the defaults, for prompts with answers and for text. The paper's own
scorers are in `lemo.selection.scorers.paper`.
"""

from lemo.selection.scorers.attention import AttentionScorer, Scout
from lemo.selection.scorers.base import BlockedBatch, ScoredModel, Scorer
from lemo.selection.scorers.given import GivenScorer
from lemo.selection.scorers.lexical import LexicalScorer
from lemo.selection.scorers.paper import ExactScorer, PooledScorer, PredictorScorer
from lemo.selection.scorers.random import RandomScorer
from lemo.selection.scorers.relevance import RelevanceScorer
from lemo.settings.elimination import LemoConfig

__all__ = [
    "AttentionScorer",
    "BlockedBatch",
    "ExactScorer",
    "GivenScorer",
    "LexicalScorer",
    "PooledScorer",
    "PredictorScorer",
    "RandomScorer",
    "RelevanceScorer",
    "ScoredModel",
    "Scorer",
    "Scout",
    "make_scorer",
]


def make_scorer(config: LemoConfig, model: ScoredModel, scout: Scout) -> Scorer:
    """The scorer that `config` names, for `model`, whose first layers `scout` runs densely.

    Raises:
        FileNotFoundError, ValueError: the predictor folder is absent, damaged, or made for another
            model; the same of the file of heads.
    """
    match config.scorer:
        case "random":
            return RandomScorer(config.seed)
        case "lexical":
            return LexicalScorer(config.seed)
        case "attention" if config.heads is not None:
            return AttentionScorer.from_file(config.heads, model, scout, config.seed)
        case "given":
            return GivenScorer()
        case "pooled":
            return PooledScorer(model)
        case "exact":
            return ExactScorer(model)
        case "predictor" if config.predictor is not None and config.finds_answers:
            return RelevanceScorer.from_folder(config.predictor, model, config.seed)
        case "predictor" if config.predictor is not None:
            return PredictorScorer.from_folder(config.predictor, model)
    raise ValueError(f"scorer: expected one of LemoConfig's, got {config.scorer!r}")
