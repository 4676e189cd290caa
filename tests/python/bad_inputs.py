"""Bad inputs that several operators refuse alike: what changes, the error, its message.

What reads the data of index tensors is for the CPU only.
"""

import dataclasses

import pytest
import torch

from lemo.packing.blocks import BlockLayout

# Rows of a tensor of six.
BAD_ROWS = [
    pytest.param(
        {"rows": torch.tensor([1, 6]).int()},
        ValueError,
        "'rows': expected strictly ascending rows below 6, got 6",
        marks=pytest.mark.cpu_only,
    ),
    pytest.param(
        {"rows": torch.tensor([1, 1]).int()},
        ValueError,
        "'rows': .* got 1 after 1 at index 1",
        marks=pytest.mark.cpu_only,
    ),
    ({"rows": torch.tensor([1, 2])}, TypeError, "'rows': expected int32, got int64"),
]


def bad_layouts(layout: BlockLayout) -> list:
    """Layouts in the place of one of ten tokens in three blocks."""
    return [
        pytest.param(
            {"layout": BlockLayout.from_seqlens([11], 4)},
            ValueError,
            "'block_starts': expected a last entry of 10, got 11",
            marks=pytest.mark.cpu_only,
        ),
        (
            {"layout": dataclasses.replace(layout, block_starts=layout.block_starts.long())},
            TypeError,
            "'block_starts': expected int32, got int64",
        ),
        (
            {"layout": dataclasses.replace(layout, block_starts=torch.empty(0).int())},
            ValueError,
            "'block_starts': expected at least one entry",
        ),
        (
            {"layout": dataclasses.replace(layout, cu_blocks=layout.cu_blocks.long())},
            TypeError,
            "'cu_blocks': expected int32, got int64",
        ),
        pytest.param(
            {"layout": dataclasses.replace(layout, cu_blocks=layout.cu_blocks[:-1])},
            ValueError,
            "'cu_blocks': expected a last entry of 3, got 2",
            marks=pytest.mark.cpu_only,
        ),
    ]
