"""Highest bytes of steps, and what `recompute="auto"` plans for them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lemo
from lemo.models.layers import modes as modes_module
from lemo.planner.shape import LINEAR
from planner_cases import PeakOfTensors
from quantised_cases import quantise
from tiny_models import make_ids, make_model

pytestmark = pytest.mark.cpu_only

TOKENS, LAYERS = 1024, 4


def model_of(lora=None, put_in=None, wants_input=False, architecture="llama", **sizes):
    defaults = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": LAYERS}
    sizes = defaults | {"max_position_embeddings": TOKENS, "num_attention_heads": 4} | sizes
    model = make_model(architecture, dtype=torch.bfloat16, **sizes)
    if put_in is not None:
        put_in(model)
    settings = {"r": 4, "target_modules": sorted(LINEAR), "task_type": "CAUSAL_LM"} | (lora or {})
    model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if wants_input:
        model.enable_input_require_grads()
    return model.train()


def planned_step(monkeypatch, model, free):
    """(plan, planner, highest bytes beside those of the weights) of a step in so much memory."""
    plans = []
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: free)
    make = modes_module._actions

    def made(planner, free, modes):
        plan = planner.plan(free, modes) or planner.smallest(free, modes)
        plans.append((plan, planner))
        return make(planner, free, modes)

    with monkeypatch.context() as patch:
        patch.setattr(modes_module, "_actions", made)
        lemo.enable(model, lemo.LemoConfig(keep=0.5, block_size=8))
        ids = make_ids(1, TOKENS)
        with PeakOfTensors(model) as tensors:
            weights = tensors.now
            model(input_ids=ids, labels=ids).loss.backward()
    ((plan, planner),) = plans
    return plan, planner, tensors.peak - weights


def in_nf4_but_for_the_first_layer(model):
    first = copy.deepcopy(model.model.layers[0])
    quantise(model, "nf4").model.layers[0] = first.requires_grad_(False)


CASES = {
    "all layers": {},
    "an input that wants a gradient": {"wants_input": True},
    "the first two layers": {"lora": {"layers_to_transform": [0, 1]}},
    "the last two layers": {"lora": {"layers_to_transform": [2, 3]}},
    "every other layer": {"lora": {"layers_to_transform": [1, 3]}},
    "one layer": {"lora": {"layers_to_transform": [2]}},
    "one layer, and the input wants a gradient": {
        "lora": {"layers_to_transform": [3]},
        "wants_input": True,
    },
    # Else the first layer's attention stores nothing, which is not planned.
    "MLPs": {"lora": {"target_modules": sorted(LINEAR[4:])}, "wants_input": True},
    "a higher rank of queries": {"lora": {"rank_pattern": {"q_proj": 32}}},
    "a lower rank of MLPs": {
        "lora": {"r": 16, "rank_pattern": dict.fromkeys(LINEAR[4:], 4)},
    },
    "higher ranks in one layer": {"lora": {"rank_pattern": {r"layers\.1\..*": 32}}},
    "another scale": {"lora": {"alpha_pattern": {"q_proj": 32}}},
    "one key head": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "wide heads": {"head_dim": 64},
    "nf4": {"put_in": lambda model: quantise(model, "nf4"), "intermediate_size": 1024},
    "nf4 in most layers": {"put_in": in_nf4_but_for_the_first_layer, "intermediate_size": 1024},
}


@pytest.mark.parametrize("case", CASES)
def test_the_highest_bytes_of_a_step(case, monkeypatch):
    """With all memory, with less, and with none."""
    plan, planner, _ = planned_step(monkeypatch, model_of(**CASES[case]), 2**40)
    least = planner.smallest(0).peak
    for free in (2**40, (plan.peak + least) // 2, (plan.peak + 4 * least) // 5, 1):
        model = model_of(**CASES[case])
        plan, planner, found = planned_step(monkeypatch, model, free)
        assert plan.peak <= max(free, least)
        # There is no optimizer.
        trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
        predicted = plan.peak - 2 * trained
        shape = model.get_base_model().config
        queries = shape.num_attention_heads * getattr(shape, "head_dim", 0)
        sums = 4 * TOKENS // 2 * (queries or shape.hidden_size)
        assert found <= predicted, plan.modes
        assert predicted - sums < 1.05 * found, plan.modes
