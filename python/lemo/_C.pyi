"""The extension module of bindings/module.cpp: host objects of the C++ core."""

from collections.abc import Sequence
from typing import Any

def plan_blocks(seqlens: Sequence[int], block_size: int) -> tuple[list[int], list[int]]: ...
def plan_selection(
    seqlens: Sequence[int], block_size: int, value: float, keep_first: int, keep_last: int
) -> tuple[int, int]: ...
def plan_loss_chunk(rows: int, vocabulary: int, budget_bytes: int) -> int: ...
def plan_memory(
    layers: list[list[tuple[int, int, int, int, float, int]]],
    device: int,
    host: int,
    fixed: int,
    granularity: int = 1,
    host_granularity: int = 1,
    states: int = ...,
) -> tuple[list[int], float, int, int]: ...
def least_memory(
    layers: list[list[tuple[int, int, int, int, float, int]]],
    host: int,
    fixed: int,
    granularity: int = 1,
    host_granularity: int = 1,
) -> int: ...
def build_info() -> dict[str, Any]: ...
