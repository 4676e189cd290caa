"""Numbers of the planner's shapes against the parameters of real models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lemo.planner.shape import LINEAR, Adapters, shape_of, weight_bytes
from planner_cases import NORMS
from tiny_models import make_model

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_parameters_of_a_model(architecture, tied):
    model = make_model(architecture, tie_word_embeddings=tied)
    shape = shape_of(model.config)
    # Of biases, which Qwen2 has, a layer has few.
    numbers = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.endswith(".bias")
    }
    linear = sum(count for name, count in numbers.items() if name.split(".")[-2] in LINEAR)
    everything = sum(numbers.values())
    assert shape.parameters() == (linear, everything - linear)
    assert weight_bytes(shape, 2) == 2 * everything


@pytest.mark.parametrize("targets", [LINEAR, LINEAR[:3], ("o_proj", "down_proj")], ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_parameters_of_adapters(architecture, norms, targets):
    model = make_model(architecture)
    shape = shape_of(model.config)
    lora = LoraConfig(
        r=3,
        target_modules=list(targets),
        modules_to_save=NORMS if norms else None,
        task_type="CAUSAL_LM",
    )
    trained = get_peft_model(model, lora)
    expected = sum(each.numel() for each in trained.parameters() if each.requires_grad)
    assert Adapters(3, frozenset(targets), norms=norms).parameters(shape) == expected


def test_parameters_of_pairs_of_several_ranks():
    model = make_model("llama")
    ranks = {"q_proj": 4, "v_proj": 2, "up_proj": 8, "down_proj": 4}
    lora = LoraConfig(r=4, target_modules=list(ranks), rank_pattern=ranks, task_type="CAUSAL_LM")
    shape = shape_of(model.config)
    trained = get_peft_model(model, lora)
    expected = sum(each.numel() for each in trained.parameters() if each.requires_grad)
    assert Adapters.of_ranks(ranks).parameters(shape) == expected


def test_bytes_of_4_bits():
    """Of 64 numbers: half a byte each, a byte of their scale, and 1/256 of 4 bytes of its scale."""
    model = make_model("llama", dtype=torch.bfloat16)
    shape = shape_of(model.config)
    linear, others = shape.parameters()
    blocks = linear / 64
    assert (
        weight_bytes(shape, 2, "nf4") == round(linear / 2 + blocks + 4 * blocks / 256) + 2 * others
    )
    for name in ("int8", "float8"):
        assert weight_bytes(shape, 2, name) == linear + 2 * others
