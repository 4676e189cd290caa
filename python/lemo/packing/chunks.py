"""How much of a layer is worked on at a time where it is recomputed: rows, or heads."""

from itertools import pairwise

__all__ = ["COPY_ELEMENTS", "chunk_rows", "split_heads"]

# Elements of the MLP's widest activation in a chunk: 256 MiB in bf16, of which half a dozen live at
# once in backward. Chunks of a usual model are thousands of rows, so its products lose no speed.
_CHUNK_ELEMENTS = 1 << 27

# Rows of a chunk are a multiple of this, so that no tile of a matrix product is cut.
_CHUNK_STEP = 256

COPY_ELEMENTS = 1 << 24
"""Elements of a copy of rows that is made for a product and not kept: 64 MiB in fp32."""


def chunk_rows(rows: int, width: int) -> int:
    """Rows of a chunk of the MLP: even shares of `rows` for activations of `width` features."""
    largest = max(1, _CHUNK_ELEMENTS // width // _CHUNK_STEP) * _CHUNK_STEP
    chunks = max(1, -(-rows // largest))
    return max(1, -(-rows // (chunks * _CHUNK_STEP))) * _CHUNK_STEP


def split_heads(key_heads: int, groups: int, shifted: bool = False) -> list[list[tuple[int, int]]]:
    """Key heads in groups of about one size, each as ranges of heads, from the first to the last.

    Args:
        key_heads: Hk.
        groups: the most groups.
        shifted: whether attention has shifted groups of positions, which depend on the half that a
            head is in: a group then has as many heads of either half.
    """
    if not shifted:
        cuts = _cuts(key_heads, groups)
        return [[cut] for cut in cuts]
    half = key_heads // 2
    upper = key_heads - half
    made = [[(a, b), (upper + a, upper + b)] for a, b in _cuts(half, groups)]
    if upper > half:
        # The head in the middle may have queries of both halves.
        if not made:
            return [[(0, key_heads)]]
        made[0].insert(1, (half, upper))
    return made


def _cuts(count: int, parts: int) -> list[tuple[int, int]]:
    parts = min(parts, count)
    ends = [count * part // parts for part in range(parts + 1)] if parts else [0]
    return list(pairwise(ends))
