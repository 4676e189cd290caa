"""The paper's own scorers: what each sub-block of each layer attends to and computes (LeMo, 4).

`exact` computes the paper's scores, `predictor` foretells them by trained networks, `pooled` takes
means of blocks for tokens. They are kept to compare with the paper. Nothing chooses them by
default: text did as well with random blocks (docs/QUALITY.md), and answers need blocks that share
words with them or that retrieval heads look at (docs/ANSWERS.md).
"""

from lemo.selection.scorers.paper.exact import ExactScorer
from lemo.selection.scorers.paper.pooled import PooledScorer
from lemo.selection.scorers.paper.predictor import PredictorScorer

__all__ = ["ExactScorer", "PooledScorer", "PredictorScorer"]
