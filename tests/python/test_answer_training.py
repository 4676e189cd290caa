"""Training of answers.py, with a model of one weight whose steps can be computed by hand."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import answer_runs
from answer_runs import Protocol, fine_tune, perplexity
from answer_tasks import Answer, Window, make_haystacks
from lemo.data import Document
from tiny import sample_text, tiny_tokenizer
from tiny_models import make_model

pytestmark = pytest.mark.cpu_only


class Numbers:
    """Window number i has i + 1 as its value and one to three labels."""

    def __init__(self):
        self.lengths = []

    def window(self, index, tokens):
        self.lengths.append(tokens)
        labels = torch.full((tokens,), -100)
        labels[: 1 + index % 3] = index + 1
        answer = Answer(0, 1, ((0, 5), (6, 7)) if index % 2 else (), None)
        return Window(f"task {index % 2}", torch.full((tokens,), index + 1), labels, (answer,))


def value(windows):
    labels = torch.cat([each.labels[each.labels != -100] for each in windows])
    return labels.double().mean().item()


class OneWeight:
    """The loss of some windows is the weight times the mean of their labels."""

    device, method = "cpu", SimpleNamespace(name="m")

    def __init__(self, worth=value):
        self.model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(self.model.weight)
        self.begun, self.parts, self.worth = [], [], worth

    def begin_step(self, *progress):
        self.begun.append(progress)

    def prepared(self, windows):
        self.parts.append([int(window.ids[0]) for window in windows])
        return windows

    def loss(self, windows):
        return self.model.weight.sum() * self.worth(windows)

    def kept(self, windows):
        """Of blocks of 5 tokens the first of the first part of a step, and both of the others."""
        blocks = [0] if len(self.parts) % 2 else [0, 1]
        return lambda: (5, len(windows) * [blocks])


PROTOCOL = Protocol(
    steps=12,
    minutes=None,
    batch=4,
    micro_batch=3,
    learning_rate=0.01,
    warmup=3,
    lengths=(7, 8, 9),
    workers=0,
    evaluate_every=5,
)


@pytest.fixture
def sgd(monkeypatch):
    """A step is the learning rate times the gradient."""
    adam = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: adam(parameters, lr))


@pytest.mark.usefixtures("sgd")
def test_steps_are_those_of_whole_batches():
    trial, mixture, weight, losses = OneWeight(), Numbers(), 1.0, []
    found = fine_tune(trial, mixture, PROTOCOL, lambda: round(trial.model.weight.item(), 6))
    after = []
    for step in range(12):
        windows = [Numbers().window(4 * step + i, 7) for i in range(4)]
        losses.append(weight * value(windows))
        rate = min(1, (step + 1) / 3) * (1 - 0.9 * step / 12)
        weight -= 0.01 * rate * value(windows)
        after.append(round(weight, 6))
    assert trial.model.weight.item() == pytest.approx(weight)
    assert found["loss"] == pytest.approx(sum(losses[-10:]) / 10, abs=1e-5)
    assert found["curve"] == [[5, after[4]], [10, after[9]]]
    assert trial.begun == [(step, 12, step / 12) for step in range(12)]
    assert mixture.lengths == [7] * 16 + [8] * 16 + [9] * 16
    numbers = [[4 * step + i + 1 for i in range(4)] for step in range(12)]
    assert trial.parts == [part for each in numbers for part in (each[:3], each[3:])]
    assert found["steps"] == 12
    # Two blocks in a window, of which one or both are kept; a part without the need has no recall.
    assert found["kept_share"] == 0.75
    assert found["recall"] == {"task 1": 100 * (12 * 0.5 + 12 * 1.0) / 24}


@pytest.mark.usefixtures("sgd")
def test_the_first_steps_are_no_part_of_the_time(monkeypatch):
    """A step takes three seconds, but each of the first three takes thirty."""
    ticks = itertools.accumulate([30.0] * 6 + [3.0] * 200)
    monkeypatch.setattr(answer_runs, "now", lambda _: next(ticks))
    protocol = replace(PROTOCOL, minutes=0.2, learning_rate=1e-6, evaluate_every=0)
    found = fine_tune(OneWeight(), Numbers(), protocol, None)
    # Twelve seconds are four steps of three.
    assert found["steps"] == 3 + 4
    assert found["step_s"] == 3.0
    assert found["step_s_range"] == [3.0, 3.0]
    assert found["training_s"] == 3 * 30 + 4 * 3


@pytest.mark.usefixtures("sgd")
def test_a_loss_that_is_not_finite_ends_a_run():
    def worth(windows):
        return math.nan if windows[0].ids[0] > 8 else 1.0

    with pytest.raises(FloatingPointError, match="step 2: expected a finite loss, got nan"):
        fine_tune(OneWeight(worth), Numbers(), PROTOCOL, lambda: None)


def test_perplexity_is_of_the_first_tokens_of_some_documents():
    model = make_model("llama", vocab_size=257, max_position_embeddings=64, dtype=torch.float32)
    texts = [sample_text(40, seed)[:length] for seed, length in enumerate((64, 85, 90, 95, 100))]
    haystacks = make_haystacks(
        [Document(f"{i}", "a", text) for i, text in enumerate(texts)], tiny_tokenizer(), 10_000
    )
    lengths = [len(each.ids) for each in haystacks.documents]
    assert lengths == [48, 64, 68, 72, 75]  # the first quarter is left out
    found = perplexity(model, haystacks, [48, 64, 500], 2)
    assert model.training
    model.eval()
    for length, chosen in ((48, [0, 2]), (64, [1, 3])):
        losses = []
        for index in chosen:
            ids = torch.tensor(haystacks.documents[index].ids[None, :length].astype("int64"))
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids).loss.item())
        assert found[str(length)] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    assert {*found} == {"48", "64"}
