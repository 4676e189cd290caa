"""How many rows of the MLP are worked on at a time where it is recomputed."""

__all__ = ["COPY_ELEMENTS", "chunk_rows"]

# Elements of the MLP's widest activation in a chunk: 256 MiB in bf16, of which half a dozen live at
# once in backward. Chunks of a usual model are thousands of rows, so its products lose no speed.
_CHUNK_ELEMENTS = 1 << 27

# Rows of a chunk are a multiple of this, so that no tile of a matrix product is cut.
_CHUNK_STEP = 256

COPY_ELEMENTS = 1 << 24
"""Elements of a copy of rows that is made for a product and not kept: 64 MiB in fp32."""


def chunk_rows(rows: int, width: int) -> int:
    """Rows of a chunk of the MLP: even shares of `rows` for activations of `width` features."""
    largest = max(1, _CHUNK_ELEMENTS // max(width, 1) // _CHUNK_STEP) * _CHUNK_STEP
    chunks = max(1, -(-rows // largest))
    return max(1, -(-rows // (chunks * _CHUNK_STEP))) * _CHUNK_STEP
