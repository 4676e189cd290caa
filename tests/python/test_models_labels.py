"""Which rows predict a label, by the arguments of a call."""

from types import SimpleNamespace

import torch

from lemo.models.labels import named, of_call, of_tokens

LABELS = torch.tensor([[-100, 7, -100, -100, 5], [3, -100, 0, 2, -100]], device="cpu")


def test_a_row_predicts_the_token_after_it():
    mask = (LABELS != -100).tolist()
    expected = [[*row[1:], False] for row in mask]
    assert of_tokens(torch.tensor(mask)).tolist() == expected
    assert of_call({"labels": LABELS}).tolist() == expected


def test_shifted_labels_are_those_of_their_own_rows():
    expected = [[label != -100 for label in row] for row in LABELS.tolist()]
    assert of_call({"shift_labels": LABELS}).tolist() == expected
    # The others are not read then.
    others = torch.full_like(LABELS, 1)
    assert of_call({"labels": others, "shift_labels": LABELS}).tolist() == expected


def test_the_ignored_label_is_that_of_the_call():
    expected = [[label != 0 for label in row] for row in LABELS.tolist()]
    assert of_call({"shift_labels": LABELS, "ignore_index": 0}).tolist() == expected
    expected = [[*row[1:], False] for row in expected]
    assert of_call({"labels": LABELS, "ignore_index": 0}).tolist() == expected


def test_without_labels_nothing_is_known_and_what_was_named_stays():
    assert of_call({"input_ids": LABELS}) is None
    outer, inner = torch.ones(2, 5), torch.zeros(2, 5)
    target = SimpleNamespace(row_labels=None)
    with named(target, outer):
        with named(target, None):
            assert target.row_labels is outer
        with named(target, inner):
            assert target.row_labels is inner
        assert target.row_labels is outer
    assert target.row_labels is None
