"""Modules that run as they are are named, with the reason."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lemo
import processes
from lemo.models.layers.general import by_reason
from model_checks import saved_bytes
from tiny_models import ARCHITECTURES, config_of, lora, make_ids, make_model, padded_batch


def reasons(model, autocast=False, **settings):
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.5, **settings))
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found = handle.general_modules()
    handle.remove()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_ways_to_train_run_in_lemos_code(architecture):
    settings = {"lora_dropout": 0.1}
    for use_dora in (False, True):
        model = lora(make_model(architecture), use_dora=use_dora, **settings)
        assert reasons(model) == {}
        assert reasons(model, autocast=True) == {}
    assert reasons(lora(make_model(architecture, dtype=torch.bfloat16))) == {}
    assert reasons(make_model(architecture).requires_grad_(False)) == {}


def test_every_reason_is_told():
    model = lora(make_model("llama"))
    layers = model.base_model.model.model.layers
    layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    layers[0].self_attn.k_proj.base_layer.register_forward_hook(lambda *_: None)
    layers[0].self_attn.v_proj.lora_dropout["default"] = nn.AlphaDropout(0.1)
    layers[0].self_attn.o_proj.base_layer.requires_grad_()
    layers[1].self_attn.o_proj.scaling["default"] = torch.tensor(0.5)
    layers[1].mlp.register_forward_hook(lambda *_: None)
    layers[1].input_layernorm.to(torch.float64)
    layers[2].mlp.up_proj.base_layer.to(torch.float64)
    layers[2].mlp.gate_proj.lora_A["default"].to(torch.float64)
    model.base_model.model.lm_head.register_forward_hook(lambda *_: None)
    found = reasons(model)
    expected = {
        "model.layers.0.self_attn.q_proj": "a hook",
        "model.layers.0.self_attn.k_proj.base_layer": "a hook",
        "model.layers.0.self_attn.v_proj": "lora_dropout that is a AlphaDropout",
        "model.layers.0.self_attn.o_proj.base_layer": "its weight is trained",
        "model.layers.1.self_attn.o_proj": "a scaling that is a tensor",
        "model.layers.1.mlp": "a hook in place of the model's own MLP",
        "model.layers.1.input_layernorm": "its weight is float64 and the rows are",
        "model.layers.2.mlp.up_proj.base_layer": "its weight is float64 and the rows are",
        "model.layers.2.mlp.gate_proj": "a LoRA pair of two dtypes",
        "lm_head": "hooks in place of a plain head",
    }
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name]
        assert model.get_base_model().get_submodule(name) is not None


def test_kinds_of_adapters_without_a_node():
    two = lora(make_model("llama"), use_dora=True)
    two.add_adapter("other", two.peft_config["default"])
    two.base_model.set_adapter(["default", "other"])
    assert set(reasons(two).values()) == {"DoRA beside other adapters"}
    assert len(reasons(two)) == 21
    first = "model.layers.0.self_attn.q_proj"
    assert by_reason(reasons(two)) == [f"{first} and 20 more: DoRA beside other adapters"]


def test_the_generic_path_runs_the_models_own_modules():
    model = lora(make_model("llama"))
    assert reasons(model, path="generic") == {
        "model": "the generic path runs the model's own modules"
    }


def test_what_is_named_stores_more():
    """fp32 adapters in the general way: PEFT keeps a copy of every projection's input in fp32."""
    sizes = []
    for hooked in (False, True):
        model = lora(make_model("llama", dtype=torch.bfloat16))
        handle = lemo.enable(model, lemo.LemoConfig(keep=1.0))
        if hooked:
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.register_forward_hook(lambda *_: None)
        assert len(handle.general_modules()) == 21 * hooked
        sizes.append(saved_bytes(model, padded_batch([64])))
    assert sizes[1] > 1.4 * sizes[0]


def _of_sharded_model():
    """What runs as it is in a model whose weights are cut, before and after a step."""
    model = lora(make_model("llama"))
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    handle = lemo.enable(model, config_of(keep=0.5, dense_layers=(), scorer="random"))
    before, ids = handle.general_modules(), make_ids(1, 40)
    model(input_ids=ids, labels=ids).loss.backward()
    cut = all(isinstance(weight, DTensor) for weight in model.parameters())
    return before, handle.general_modules(), cut


@pytest.mark.cpu_only
def test_cut_weights_are_named_as_they_run(tmp_path):
    assert processes.run(1, _of_sharded_model, tmp_path) == [({}, {}, True)]
