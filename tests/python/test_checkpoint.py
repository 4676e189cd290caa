"""Checkpoints by themselves: what is whole, what stays, and what a loaded one puts back."""

import json
import logging
import random

import numpy
import pytest
import torch

from lemo.settings.finetune import FinetuneConfig
from lemo.training.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    random_state,
    save_checkpoint,
)
from lemo.training.model import adapter_weights
from tiny_models import lora, make_model

pytestmark = pytest.mark.cpu_only

OPTIMIZER = {"optimizer": {"state": {}, "param_groups": []}, "scheduler": {"last_epoch": 7}}


@pytest.fixture
def model():
    return lora(make_model("llama"))


def save(folder, model, step, keep=9, states=None):
    states = [random_state()] if states is None else states
    paths = {"model": "model", "documents": "documents", "output": "run"}
    config = FinetuneConfig(**paths, keep_checkpoints=keep, gradient_accumulation=3, lora_rank=5)
    digests = "of data", {"model": "of the model"}
    given = adapter_weights(model), OPTIMIZER, states, *digests, config
    save_checkpoint(folder, step, model, *given)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def draw():
    """Numbers of all generators."""
    normal = numpy.random.standard_normal()
    return torch.rand(3).tolist(), random.random(), normal, numpy.random.random(3).tolist()


def flip(file, place):
    """Damages one byte."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_every_generator_goes_on_where_it_was(tmp_path, model):
    """Each process by its own state; numpy keeps the second one of two normal numbers."""
    states, expected = [], []
    for rank in range(2):
        torch.manual_seed(rank)
        random.seed(rank)
        numpy.random.seed(rank)
        numpy.random.standard_normal()
        states.append(random_state())
        expected.append(draw())
    save(tmp_path, model, 4, states=states)
    found = newest_checkpoint(tmp_path)
    assert (found.step, found.data, found.num_processes) == (4, "of data", 2)
    assert (found.inputs, found.gradient_accumulation) == ({"model": "of the model"}, 3)
    assert found.settings["lora_rank"] == 5
    for rank in (1, 0):
        assert load_checkpoint(found, model, rank) == OPTIMIZER
        assert draw() == expected[rank]
    load_checkpoint(found, model, 0)
    load_checkpoint(found, model, None)  # which leaves them as they are
    assert draw() == expected[0]


def test_weights_are_put_back_and_those_of_another_adapter_are_refused(tmp_path, model):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    expected = {name: p.detach().clone() for name, p in trained.items()}
    save(tmp_path, model, 1)
    for parameter in trained.values():
        torch.nn.init.zeros_(parameter)
    load_checkpoint(newest_checkpoint(tmp_path), model, None)
    assert all(torch.equal(p, expected[name]) for name, p in trained.items())
    smaller = lora(make_model("llama"), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"adapter of this run, got weights it does not have: .*"):
        load_checkpoint(newest_checkpoint(tmp_path), smaller, None)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "random-1.pt"]
)
def test_files_of_the_same_size_and_other_bytes_are_noticed(tmp_path, model, caplog, name):
    states = [random_state(), random_state()]
    save(tmp_path, model, 9, states=states)
    save(tmp_path, model, 10, states=states)
    assert newest_checkpoint(tmp_path).step == 10, "by the number, not by the name"
    file = tmp_path / "step-10" / name
    flip(file, file.stat().st_size // 2)
    assert newest_checkpoint(tmp_path).step == 9
    assert f"step-10 is not whole and is ignored: {name} differs" in caplog.text


def test_the_newest_whole_ones_stay(tmp_path, model, caplog):
    """Damaged ones, later ones and what a killed process left take no place."""
    caplog.set_level(logging.WARNING, "lemo")
    for step in (8, 9, 10, 11, 30):
        save(tmp_path, model, step)
    (tmp_path / "step-11" / "optimizer.pt").write_bytes(b"")
    for torn in (".step-7.tmp", ".step-10.old"):
        (tmp_path / torn).mkdir()
    (tmp_path / ".step-5.tmp").mkdir()
    (tmp_path / ".step-5.tmp" / "notes").write_text("mine")
    save(tmp_path, model, 12, keep=3)
    assert names(tmp_path) == [".step-5.tmp", "step-10", "step-12", "step-9"]
    assert ".step-5.tmp stays: " in caplog.text


def test_older_checkpoints_say_less(tmp_path, model):
    save(tmp_path, model, 1)
    file = tmp_path / "step-1" / "state.json"
    state = json.loads(file.read_text()) | {"format": 1}
    for name in ("sha256", "inputs", "settings", "gradient_accumulation"):
        del state[name]
    file.write_text(json.dumps(state))
    found = newest_checkpoint(tmp_path, 5)
    assert (found.inputs, found.settings, found.gradient_accumulation) == (None, {}, 5)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "random-1.pt"])
def test_a_checkpoint_that_does_not_name_a_file_is_passed_over(tmp_path, model, caplog, name):
    save(tmp_path, model, 1, states=[random_state(), random_state()])
    file = tmp_path / "step-1" / "state.json"
    state = json.loads(file.read_text()) | {"format": 1}
    del state["files"][name]
    file.write_text(json.dumps(state))
    assert newest_checkpoint(tmp_path) is None
    assert "state.json differs from what was written" in caplog.text, "it has a digest"
    del state["sha256"]
    file.write_text(json.dumps(state))
    assert newest_checkpoint(tmp_path) is None
    assert f"state.json does not name {name}" in caplog.text
