"""Examples, and scores for their blocks."""

import random
from dataclasses import dataclass

import torch


@dataclass
class Sample:
    """An example as the model reads it."""

    ids: list[int]
    labels: list[int]
    name: str


def samples(count=7):
    """Examples of 20 to 89 random ids, the same ones in every call."""
    draw = random.Random(1)
    made = []
    for number in range(count):
        ids = [draw.randrange(100) for _ in range(draw.randrange(20, 90))]
        made.append(Sample(ids, [-100] * (len(ids) - 3) + ids[-3:], f"data.jsonl:{number + 1}"))
    return made


def mean_ids(example, size=16):
    """Some scores: the mean id of each block."""
    blocks = [example.ids[i : i + size] for i in range(0, len(example.ids), size)]
    return torch.tensor([sum(block) / len(block) for block in blocks])
