"""Differentiable functions over torch.ops.lemo.* (docs/design/operators.md)."""

from lemo.ops import _library  # noqa: F401  registers the ops that the modules below refer to
from lemo.ops._device import supports_device
from lemo.ops.bf16_split import bf16_split, bf16_split_all
from lemo.ops.block_attention import block_attention
from lemo.ops.block_scores import block_scores
from lemo.ops.fp8_rows import fp8_product, fp8_rows, fp8_transpose
from lemo.ops.linear_cross_entropy import linear_cross_entropy
from lemo.ops.predictor import predictor
from lemo.ops.residual_scatter import residual_gather, residual_scatter_
from lemo.ops.rope import rope
from lemo.ops.segment_attention import segment_attention
from lemo.ops.select_norm import residual_select_norm, select_norm
from lemo.ops.swiglu import swiglu, swiglu_fp8
from lemo.ops.token_select import left_out, marked_blocks, token_select
from lemo.ops.word_relevance import word_relevance

__all__ = [
    "bf16_split",
    "bf16_split_all",
    "block_attention",
    "block_scores",
    "fp8_product",
    "fp8_rows",
    "fp8_transpose",
    "left_out",
    "linear_cross_entropy",
    "marked_blocks",
    "predictor",
    "residual_gather",
    "residual_scatter_",
    "residual_select_norm",
    "rope",
    "segment_attention",
    "select_norm",
    "supports_device",
    "swiglu",
    "swiglu_fp8",
    "token_select",
    "word_relevance",
]
