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


def test_labels_of_sequences_are_none_of_tokens():
    """Those of a module around the model."""
    ids = torch.ones(2, 5, dtype=torch.long)
    for labels in (LABELS[:, 1], LABELS[:, :3], LABELS / 2, ["good", "bad"], None):
        assert of_call({"input_ids": ids, "labels": labels}) is None
        assert of_call({"inputs_embeds": ids[..., None].float(), "shift_labels": labels}) is None
    assert of_call({"input_ids": ids, "labels": LABELS}) is not None


class Classifier(torch.nn.Module):
    """Of what the decoder gives for the last token."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        torch.manual_seed(0)
        self.head = torch.nn.Linear(model.config.hidden_size, 3)

    def forward(self, ids, labels):
        states = self.model.model(ids).last_hidden_state[:, -1]
        of_classes = torch.nn.functional.binary_cross_entropy_with_logits
        loss = torch.nn.functional.cross_entropy if labels.ndim == 1 else of_classes
        return loss(self.head(states), labels)


@pytest.mark.cpu_only
@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.eye(3)[:2]], ids=["one", "several"])
def test_a_classifier_around_the_model_trains(labels, path):
    found = []
    for keeps in (False, True):
        classifier = Classifier(make_model("llama"))
        if keeps:
            lemo.enable(classifier, flat_config(keep=1.0, block_size=8, path=path))
        loss = classifier(make_ids(2, 40), labels=labels)
        loss.backward()
        found.append((loss, classifier.model.model.layers[0].mlp.up_proj.weight.grad))
    for mine, theirs in zip(*found, strict=True):
        assert_close_fp32(mine, theirs, "loss and gradient")


@pytest.mark.cpu_only
@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("name", ["input_ids", "labels", "attention_mask", "position_ids"])
def test_arguments_that_are_no_tensors_are_named(name, path):
    """A tokenizer gives lists unless it is told otherwise."""
    model, _ = enabled(path)
    ids = make_ids(2, 24)
    batch = {"input_ids": ids, "labels": ids} | {name: ids.tolist()}
    with pytest.raises(TypeError, match=rf"^{name}: expected a \[batch, tokens\] tensor, got list"):
        model(**batch)


@pytest.mark.cpu_only
def test_what_handles_are_told_of_tokens_is_named():
    _, handle = enabled("native")
    calls = {"mask": handle.labelled, "scores": handle.scored, "input_ids": handle.on_host}
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name}: expected a .* tensor, got list"):
            call([[0, 1]]).__enter__()
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got \[2\]"):
            call(torch.ones(2)).__enter__()


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
