"""One node for linear layers with LoRA: what PEFT computes, with less kept."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lemo.models.linear import apply_linear
from tolerances import assert_close_fp32, assert_close_low_precision

ROWS, INPUTS, OUTPUTS = 37, 24, 40


def lora_layer(dtype=torch.float32, bias=True, adapter_dtype=None, **settings):
    """A PEFT layer around a frozen linear one; equal arguments give equal weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=bias)).to(dtype)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["0"]} | settings
    config = LoraConfig(init_lora_weights=False, **settings)
    layer = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    for name, parameter in layer.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
    return layer


def nodes(tensor):
    """Names of the autograd nodes behind a tensor."""
    found, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(type(node).__name__)
            todo += [parent for parent, _ in node.next_functions]
    return found


def run(function, layer, x, dy, autocast=False):
    """{name: tensor} of the result and the gradients, and the names of the nodes."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = function(x)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found, nodes(y)


def inputs(dtype=torch.float32):
    return torch.randn(ROWS, INPUTS, dtype=dtype), torch.randn(ROWS, OUTPUTS, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft(bias):
    layer, (x, dy) = lora_layer(bias=bias), inputs()
    expected, _ = run(layer, layer, x, dy)
    result, names = run(lambda x: apply_linear(layer, x), layer, x, dy)
    assert "_LinearBackward" in names
    assert result.keys() == expected.keys()
    for name, oracle in expected.items():
        assert_close_fp32(result[name], oracle, name)


@pytest.mark.parametrize("case", ["bf16", "autocast of bf16", "autocast of fp32 rows"])
def test_low_precision(case):
    adapter_dtype = torch.bfloat16 if case == "bf16" else torch.float32
    layer = lora_layer(torch.bfloat16, adapter_dtype=adapter_dtype)
    x, dy = inputs(torch.bfloat16)
    x = x.float() if case == "autocast of fp32 rows" else x
    exact = lora_layer(torch.bfloat16, adapter_dtype=adapter_dtype).float()
    oracle, _ = run(exact, exact, x.float(), dy.float())
    plain, _ = run(layer, layer, x, dy, autocast=case != "bf16")
    result, names = run(lambda x: apply_linear(layer, x), layer, x, dy, autocast=case != "bf16")
    assert "_LinearBackward" in names
    assert {name: t.dtype for name, t in result.items()} == {
        name: t.dtype for name, t in plain.items()
    }
    for name, value in result.items():
        low, low_plain = value.bfloat16(), plain[name].bfloat16()
        assert_close_low_precision(low, low_plain, oracle[name], name)


@pytest.mark.parametrize("adapted", [True, False])
def test_gradients_without_values(adapted):
    layer, (x, dy) = lora_layer(), inputs()
    layer = layer if adapted else layer.base_layer
    expected, _ = run(layer, layer, x, dy)
    result, names = run(lambda x: apply_linear(layer, x, values=False), layer, x, dy)
    assert "_LinearBackward" in names
    del expected["y"]
    for name, oracle in expected.items():
        assert_close_fp32(result[name], oracle, name)


def test_the_input_is_saved_once_and_in_the_dtype_of_the_products():
    layers = [lora_layer(torch.bfloat16, adapter_dtype=torch.float32) for _ in range(3)]
    x, _ = inputs(torch.bfloat16)
    x.requires_grad_()
    parameters = {p.data_ptr() for layer in layers for p in layer.parameters()}
    storages = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(x.device.type, torch.bfloat16),
    ):
        kept = [apply_linear(layer, x) for layer in layers]
    assert len(kept) == 3
    assert sum(storages.values()) == 2 * ROWS * (INPUTS + 3 * 4)


def hooked(layer):
    layer.register_forward_hook(lambda module, arguments, result: 2 * result)
    return layer


OTHERS = {
    "a hook": lambda: hooked(lora_layer()),
    "dropout": lambda: lora_layer(lora_dropout=0.5).train(),
    "DoRA": lambda: lora_layer(use_dora=True),
    "a bias of LoRA": lambda: lora_layer(lora_bias=True),
    "a trainable layer": lambda: nn.Linear(INPUTS, OUTPUTS),
    "an adapter in fp64": lambda: lora_layer(adapter_dtype=torch.float64),
    "another module": lambda: nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.GELU()),
}


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_runs_as_it_is(case):
    layer, (x, dy) = OTHERS[case](), inputs()
    torch.manual_seed(1)
    expected, _ = run(layer, layer, x, dy)
    torch.manual_seed(1)
    result, names = run(lambda x: apply_linear(layer, x, values=False), layer, x, dy)
    assert "_LinearBackward" not in names
    for name, oracle in expected.items():
        assert torch.equal(result[name], oracle), name


def test_disabled_and_merged_adapters():
    layer, (x, _) = lora_layer(), inputs()
    with torch.no_grad():
        adapted = apply_linear(layer, x)
        layer.merge()
        assert_close_fp32(apply_linear(layer, x), adapted)
        layer.unmerge()
        layer.enable_adapters(False)
        assert_close_fp32(apply_linear(layer, x), layer.base_layer(x))
