"""Sizes and plans in words."""

import random
import re

import pytest

from lemo.planner.memory import LayerBytes
from lemo.planner.plan import Plan
from lemo.planner.text import bytes_text, layers_text, needed_text, plan_lines

pytestmark = pytest.mark.cpu_only

UNITS = {"bytes": 1, "MiB": 2**20, "GiB": 2**30}


def bytes_of(text):
    number, unit = re.fullmatch(r"([\d.]+) (\w+)", text).groups()
    return float(number) * UNITS[unit]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (104857, "104857 bytes"),
        (104858, "0.1 MiB"),
        (3 * 2**19, "1.5 MiB"),
        (102 * 2**20, "102 MiB"),
        (103 * 2**20, "0.10 GiB"),
        (5 * 2**28, "1.25 GiB"),
        (10 * 2**30, "10.0 GiB"),
        (20.25 * 2**30, "20.2 GiB"),
    ],
)
def test_bytes_in_words(size, text):
    assert bytes_text(size) == text


def test_what_is_needed_is_so_many_bytes_or_little_more():
    draw = random.Random(0)
    for _ in range(2000):
        size = int(2 ** draw.uniform(0, 40))
        said = bytes_of(needed_text(size))
        # The last digit that is printed, and a byte that is cut off.
        unit = 1 if size < 2**20 / 10 else 2**20 if size < 2**30 / 10 else 2**30 / 100
        unit = 2**30 / 10 if size >= 10 * 2**30 else unit
        assert size <= said + 1
        assert said < size + 1.1 * unit


def test_layers_that_are_alike_have_a_line():
    modes = ("none", "layer", "layer", "selective")
    kept = LayerBytes(3 * 2**20, 0, 0), LayerBytes(2**20, 0, 0, host=2**21), LayerBytes(5, 0, 0)
    layers = kept[0], kept[1], kept[1], kept[2]
    lines = [
        "layer 0: store everything, 3 MiB each",
        "layers 1-2: recompute all, 2 MiB to the host, 1 MiB each",
        "layer 3: recompute all but attention, 5 bytes each",
    ]
    assert plan_lines(Plan(modes, layers, 0, 0.0, 0)) == lines
    groups = "attention's backward: by 2 groups of heads"
    assert plan_lines(Plan(modes, layers, 0, 0.0, 0, head_groups=2)) == [*lines, groups]
    # Where nothing is recomputed there are no groups.
    assert plan_lines(Plan(modes[:1], layers[:1], 0, 0.0, 0, head_groups=2)) == lines[:1]
    assert [layers_text(range(7, 8)), layers_text(range(7, 9))] == ["layer 7", "layers 7-8"]
