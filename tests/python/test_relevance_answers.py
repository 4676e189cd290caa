"""Answers of a sequence and the blocks before them, against loops over rows and blocks."""

import pytest
import torch

from lemo.relevance.answers import Answers, are_answers, shares

BLOCK = 16


@pytest.mark.parametrize(("labelled", "found"), [(0, False), (1, True), (5, True), (6, False)])
def test_labels_on_half_of_the_tokens_at_most_are_answers(labelled, found):
    assert are_answers(labelled, 10) is found
    rows = torch.arange(10) < labelled
    assert (Answers.of(rows) is not None) is found


def test_runs_of_labels_are_answers_of_64_tokens_at_most():
    runs = [(0, 2), (40, 104), (120, 185), (200, 201), (299, 300)]
    rows = torch.zeros(300, dtype=torch.bool)
    for first, end in runs:
        rows[first:end] = True
    answers = Answers.of(rows)
    assert answers.firsts == (0, 40, 120, 184, 200, 299)
    assert answers.ends == (2, 104, 184, 185, 201, 300)
    assert answers.rows() == rows.nonzero()[:, 0].tolist()
    spans = zip(answers.firsts, answers.ends)
    of_rows = [answer for answer, (first, end) in enumerate(spans) for _ in range(end - first)]
    assert answers.of_rows() == of_rows


def test_blocks_without_labels_before_an_answer_are_open():
    rows = torch.zeros(160, dtype=torch.bool)
    for row in (34, 35, 47, 95, 96, 144):
        rows[row] = True
    like = torch.zeros(10)
    with_labels = {row // BLOCK for row in (34, 35, 47, 95, 96, 144)}
    answers = Answers.of(rows)
    assert answers.free_blocks(BLOCK, like).tolist() == [
        float(block not in with_labels) for block in range(10)
    ]
    assert answers.open_blocks(BLOCK, like).tolist() == [
        [block not in with_labels and block < first // BLOCK for block in range(10)]
        for first in (34, 47, 95, 144)
    ]


def test_the_largest_over_the_rows_of_each_answer():
    rows = torch.zeros(32, dtype=torch.bool)
    rows[3:5] = rows[8:9] = True
    values = torch.tensor([[-3.0, 2.0], [-1.0, 1.0], [-5.0, -6.0]])
    assert Answers.of(rows).largest(values).tolist() == [[-1.0, 2.0], [-5.0, -6.0]]


def test_shares_of_nothing_are_none():
    """An answer that looks at blocks with labels alone."""
    scores = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1e-30]])
    assert shares(scores).tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
