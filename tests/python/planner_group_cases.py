"""Bytes of a step in one of the processes that share out its rows. Run by every rank."""

import torch
from torch import distributed

import lemo
from planner_cases import CASES, PeakOfTensors, model_of
from tiny_models import make_ids

TOKENS = 2048


def sized_model(layers: int, width: int, heads: tuple[int, int]):
    return model_of("llama", layers, CASES["all"][0], 2, TOKENS, width, heads).to(torch.bfloat16)


def highest(modes: list[str], keep: float, width: int, heads: tuple[int, int]) -> int:
    """Of all tensors, while a pass and its backward run."""
    torch.set_num_threads(1)
    model = sized_model(len(modes), width, heads)
    config = lemo.LemoConfig(recompute=modes, keep=keep, block_size=8)
    lemo.enable(model, config, lemo.ContextParallel(distributed.group.WORLD))
    ids = make_ids(1, TOKENS)
    with PeakOfTensors(model) as tensors:
        model(input_ids=ids, labels=ids).loss.backward()
    return tensors.peak


def all_highest(cases: list[tuple[list[str], float, int, tuple[int, int]]]) -> list[int]:
    return [highest(*case) for case in cases]
