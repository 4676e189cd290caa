"""Which rows predict a label, by the arguments of a call."""

from types import SimpleNamespace

import pytest
import torch

import lemo
from lemo.models.calls.labels import named, of_call, of_tokens
from tiny_models import flat_config, make_ids, make_model, padded_batch
from tolerances import assert_close_fp32

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


def enabled(path):
    model = make_model("llama")
    settings = {"keep": 1.0, "block_size": 8, "scorer": "random", "path": path}
    return model, lemo.enable(model, flat_config(**settings))


@pytest.mark.cpu_only  # where attention knows fp32
@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("keep", [0, 24, 99])
def test_logits_of_all_tokens_beside_labels_change_nothing(path, keep):
    model, ids = enabled(path)[0], make_ids(2, 24)
    expected = make_model("llama")(ids, labels=ids, logits_to_keep=keep).loss
    assert_close_fp32(model(ids, labels=ids, logits_to_keep=keep).loss, expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_have_another_ignored_label(path, side):
    model, batch = enabled(path)[0], padded_batch([24, 17], side)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 7)
    expected = make_model("llama")(**batch, ignore_index=7).loss
    assert_close_fp32(model(**batch, ignore_index=7).loss, expected)


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize(
    "keep",
    [1, 5, -5, torch.tensor([3, 4, 5]), torch.arange(23, -1, -1)],
    ids=["last", "last five", "without the first five", "three", "all, reversed"],
)
def test_logits_of_some_tokens_beside_labels_are_refused(path, keep):
    """Transformers fails, or takes labels of these columns alone; lemo's loss had all of them."""
    model, handle = enabled(path)
    ids = make_ids(2, 24)
    for labels in (ids, ids[:, keep if torch.is_tensor(keep) else slice(-keep, None)]):
        for call in (model, handle.loss):
            with pytest.raises(ValueError, match="logits_to_keep: expected 0 beside labels"):
                call(input_ids=ids, labels=labels, logits_to_keep=keep)
    model.eval()
    assert model(ids, logits_to_keep=5).logits.shape[1] == 5


@pytest.mark.cpu_only
def test_a_loss_function_of_ones_own_gets_the_logits_of_some_tokens():
    def total(logits, labels, vocab_size, **_):
        return logits[..., 0].square().mean() + labels.float().mean()

    model, dense, ids = enabled("native")[0], make_model("llama"), make_ids(2, 24)
    for each in (model, dense):
        each.loss_function = total
    call = {"labels": ids, "logits_to_keep": 5, "output_hidden_states": True}
    mine, plain = (each(ids, **call) for each in (model, dense))
    assert_close_fp32(mine.loss, plain.loss)
    for state, oracle in zip(mine.hidden_states, plain.hidden_states, strict=True):
        assert_close_fp32(state, oracle)
