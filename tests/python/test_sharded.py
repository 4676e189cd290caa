"""Training with weights that FSDP2 shards, against one process and against whole weights."""

import functools
import gc
import operator
import re
import weakref

import pytest
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lemo
from lemo.models.memory import sharded
from processes import run
from sharded_cases import CASES, measure, others
from tiny_models import config_of, lora, make_ids, make_model
from tolerances import FP32_RELATIVE_ERROR

pytestmark = pytest.mark.cpu_only

REFUSED = {
    "decoder, generic": "expected fully_shard on layers and on LlamaForCausalLM .* LlamaModel",
    "mlps, native": "got fully_shard on mlp of layer 0, whose parts lemo computes itself",
    "logits read late, native": "expected whole weights while .* runs, got 'weight' as a DTensor",
    "logits read late, generic": "expected whole weights while .* runs, got 'weight' as a DTensor",
}
OF_FOUR = ("keep 1", "layer", "embedding and tail")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder, names = tmp_path_factory.mktemp("two"), [*CASES]
    # A few at a time, for slow machines.
    parts = [
        run(2, measure, folder, names[first : first + 14]) for first in range(0, len(names), 14)
    ]
    return [functools.reduce(operator.or_, found) for found in zip(*parts)]


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return run(4, measure, tmp_path_factory.mktemp("four"), OF_FOUR)


def names(cases):
    return [f"{name}, {path}" for name in cases for path in CASES[name].paths]


@pytest.mark.parametrize("name", [name for name in names(CASES) if name not in REFUSED])
def test_losses_and_gradients_are_those_of_whole_weights(of_two, name):
    check(of_two, name)


@pytest.mark.parametrize("name", names(OF_FOUR))
def test_four_processes(of_four, name):
    check(of_four, name)


def check(measured, name):
    for errors in measured:
        errors = errors[name]
        assert isinstance(errors, dict), errors
        assert errors["loss"] <= FP32_RELATIVE_ERROR
        assert errors["gradients"] <= FP32_RELATIVE_ERROR


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_is_refused(of_two, name):
    for found in of_two:
        assert isinstance(found[name], str), found[name]
        assert re.search(REFUSED[name], found[name]), found[name]


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return run(2, others, tmp_path_factory.mktemp("others"))


def test_mixed_precision_rounds_as_the_models_own_code_does(more):
    for errors, _, _ in more:
        assert errors["plain"] > 1e-3
        assert max(errors["native"], errors["generic"]) <= 2 * errors["plain"]


def test_weights_that_are_not_whole_are_refused(more):
    wanted = (
        "expected whole weights while .* call the module that fully_shard was called on last",
        "expected lemo.enable to be called on what fully_shard is called on last",
        "expected whole weights while layer 1 runs, .* train without tensor parallelism",
    )
    for _, said, _ in more:
        assert len(said) == len(wanted)
        for text, pattern in zip(said, wanted):
            assert re.search(pattern, text), text


def test_verify_compares_sharded_models_with_their_own_code(more):
    for _, _, said in more:
        assert len(said) == 2
        assert all("lemo does not compute what the model computes" in text for text in said)


@pytest.mark.parametrize("path", ["native", "generic"])
def test_fsdp1_is_refused(path, monkeypatch):
    """It needs a GPU to start, so here is what it leaves of a model: its class around a layer."""
    monkeypatch.setattr(sharded, "_has_processes", lambda: True)
    model = lora(make_model("llama"))
    lemo.enable(model, config_of(keep=0.5, dense_layers=(), path=path, scorer="random"))
    layers = model.get_base_model().model.layers
    wrapped = object.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = layers[0]
    layers[0] = wrapped
    ids = make_ids(1, 20)
    with pytest.raises(ValueError, match=r"sharded by FSDP2 .* got FullyShardedDataParallel"):
        model(ids, labels=ids)


def test_modules_that_were_looked_through_are_not_kept_alive(monkeypatch):
    monkeypatch.setattr(sharded, "_has_processes", lambda: True)
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    for _ in range(2):
        sharded.check_whole(model, "it")
        sharded.check_unflattened(model)
    seen = weakref.ref(model), weakref.ref(model[0])
    del model
    gc.collect()
    assert [each() for each in seen] == [None, None]
