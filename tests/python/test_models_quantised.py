"""Quantised bases: the same training as with the weights that they stand for."""

import pytest
import torch
from torch import nn

import lemo
from lemo.models import one_set_passes
from lemo.models.layers import one_set
from lemo.models.layers.architectures import architecture_of
from lemo.models.projections import weights
from lemo.models.projections.linear import apply_linear
from lemo.packing import chunks
from model_checks import assert_same_gradients
from quantised_cases import decoder_layers, quantise
from tiny_models import lora, make_model, padded_batch
from tolerances import assert_close_fp32, relative_error

bitsandbytes = pytest.importorskip("bitsandbytes")

# The GPU's attention knows no fp32.
pytestmark = pytest.mark.cpu_only

BLOCK = 8


def dequantised(model):
    """Puts plain layers with the weights that 4 bits stand for in place of quantised ones."""
    for layer in decoder_layers(model):
        for module in list(layer.modules()):
            for name, child in module.named_children():
                if type(child) is bitsandbytes.nn.Linear4bit:
                    plain = nn.Linear(child.in_features, child.out_features, bias=False)
                    state = child.weight.quant_state
                    plain.weight.data = bitsandbytes.functional.dequantize_4bit(
                        child.weight.data, state
                    )
                    plain.bias = child.bias
                    setattr(module, name, plain)
    del model.is_loaded_in_4bit
    return model.requires_grad_(False)


def quantised_lora(kind, architecture="llama", stored=torch.uint8):
    return lora(quantise(make_model(architecture), kind, stored))


def trained(model, batch, config=None):
    """The loss, after a backward pass."""
    if config is not None:
        lemo.enable(model, config)
    loss = model(**batch).loss
    loss.backward()
    return loss


def copied(model, twin):
    """Gives `twin` the trained weights of `model`."""
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            parameter.data = model.get_parameter(name).data.clone()
    return twin


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_with_everything_kept_it_is_plain_qlora(kind, recompute):
    model, batch = quantised_lora(kind), padded_batch([61, 45])
    plain = copied(model, quantised_lora(kind))
    loss = trained(model, batch, lemo.LemoConfig(keep=1.0, recompute=recompute))
    assert_close_fp32(loss, trained(plain, batch))
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
@pytest.mark.parametrize(
    ("architecture", "stored"),
    [
        ("llama", torch.uint8),
        ("llama", torch.bfloat16),
        ("llama", torch.float32),
        ("opt", torch.uint8),
    ],
)
def test_four_bits_train_as_the_weights_that_they_stand_for(architecture, stored, recompute):
    model, batch = quantised_lora("nf4", architecture, stored), padded_batch([61, 45])
    twin = lora(dequantised(quantise(make_model(architecture), "nf4")))
    config = lemo.LemoConfig(keep=0.5, block_size=BLOCK, recompute=recompute)
    loss = trained(model, batch, config)
    assert_close_fp32(loss, trained(copied(model, twin), batch, config))
    assert_same_gradients(model, twin)


def test_products_of_four_bits_are_as_long_as_those_of_what_they_stand_for(monkeypatch):
    model = quantised_lora("nf4")
    work, is_long = [], one_set.OneSet.is_long
    # Long where CUDA graphs would not be captured.
    monkeypatch.setattr(one_set_passes, "supports_graphs", lambda device: True)
    monkeypatch.setattr(one_set.OneSet, "is_long", lambda s: work.append(s._work()) or is_long(s))
    batch = padded_batch([61, 45])
    rows = batch["attention_mask"].sum().item()
    trained(model, batch, lemo.LemoConfig(keep=1.0))
    sizes = [
        module.in_features * module.out_features
        for module in decoder_layers(model)[0].modules()
        if type(module) is bitsandbytes.nn.Linear4bit
    ]
    assert len(sizes) == 7
    assert work == [rows * sum(sizes)]


@pytest.mark.parametrize("nested", [True, False])
def test_scales_that_move_are_another_state(nested):
    """What a graph reads is not the weight's own memory alone."""
    model = lora(quantise(make_model("llama"), "nf4", nested=nested))
    architecture = architecture_of(model)
    state = decoder_layers(model)[1].mlp.up_proj.base_layer.weight.quant_state
    assert (state.state2 is not None) == nested
    for owner, name in [(state, "absmax")] + [(state, "offset"), (state.state2, "absmax")] * nested:
        before = one_set.state_of(architecture).said
        assert one_set.state_of(architecture).said == before
        setattr(owner, name, getattr(owner, name).clone())
        assert one_set.state_of(architecture).said != before


def test_adapters_that_are_merged_before_backward():
    """PEFT quantises the merged weights and puts them in place of those of forward."""
    model, batch = quantised_lora("nf4"), padded_batch([61, 45])
    plain = copied(model, quantised_lora("nf4"))
    lemo.enable(model, lemo.LemoConfig(keep=1.0, recompute="none"))
    for each in (model, plain):
        loss = each(**batch).loss
        each.merge_adapter()
        loss.backward()
    assert_same_gradients(model, plain)


def test_a_weight_is_made_once_for_all_chunks_of_rows(monkeypatch):
    made, make = [], weights._dequantised

    def counted(packed, *more):
        made.append(packed.data_ptr())
        return make(packed, *more)

    monkeypatch.setattr(weights, "_dequantised", counted)
    monkeypatch.setattr(chunks, "_CHUNK_STEP", 16)
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 1)
    model, batch = quantised_lora("nf4"), padded_batch([61, 45])
    loss = trained(model, batch, lemo.LemoConfig(keep=1.0, recompute="layer"))
    assert loss.isfinite()
    gate = decoder_layers(model)[1].mlp.gate_proj.base_layer.weight.data_ptr()
    assert made.count(gate) == 2, "once forward, once backward, though there are seven chunks"
    assert not weights._kept, "no matrix outlives its layer"


def plain_lora(module, x):
    """PEFT's own forward."""
    return module(x)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"lora_bias": True}])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_fp32_adapters_over_a_quantised_layer_of_bf16(kind, settings):
    """Values and gradients are PEFT's, and the input is stored once, as it came."""
    torch.manual_seed(0)
    model = quantise(make_model("llama", dtype=torch.bfloat16), kind)
    module = decoder_layers(lora(model, **settings))[0].mlp.up_proj
    x, dy = (torch.randn(40, n).bfloat16() for n in (module.in_features, module.out_features))
    results, stored = [], []
    for function in (plain_lora, apply_linear):
        leaf, storages = x.clone().requires_grad_(), {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        module.zero_grad()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = function(module, leaf)
        y.backward(dy)
        found = {"y": y.detach(), "x": leaf.grad}
        found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append(found)
        parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        parameters.add(leaf.untyped_storage().data_ptr())
        stored.append(
            sum(t.untyped_storage().nbytes() for p, t in storages.items() if p not in parameters)
        )
    expected, result = results
    assert {name: t.dtype for name, t in result.items()} == {
        name: t.dtype for name, t in expected.items()
    }
    for name, value in expected.items():
        if value.dtype == torch.float32:
            assert_close_fp32(result[name], value, name)
        else:
            # Each of two roundings is one of bf16.
            assert relative_error(result[name], value) < 2**-8, name
    bits = 40 * module.in_features // 8 if "lora_dropout" in settings else 0
    assert stored[1] == 40 * 4 * 4 + bits
    assert stored[0] >= stored[1] + 40 * 4 * module.in_features


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
def test_dora_over_four_bits_that_are_computed_by_their_layers(recompute):
    """On the CPU PEFT then makes a new parameter of the same memory at each call."""
    model, plain = (
        lora(quantise(make_model("llama"), "nf4"), use_dora=True).train() for _ in range(2)
    )
    for module in model.modules():
        if type(module) is bitsandbytes.nn.Linear4bit:
            module.register_forward_hook(lambda *_: None)
    lemo.enable(model, lemo.LemoConfig(keep=1.0, recompute=recompute))
    for seed in range(2):
        batch = padded_batch([61, 45], seed=seed)
        model.zero_grad()
        plain.zero_grad()
        weight = decoder_layers(model)[0].mlp.up_proj.base_layer.weight
        assert_close_fp32(trained(model, batch), trained(plain, batch))
        assert decoder_layers(model)[0].mlp.up_proj.base_layer.weight is not weight
        assert_same_gradients(model, plain)


def test_what_runs_by_its_own_forward_is_named():
    found = {}
    for kind in ("nf4", "int8"):
        handle = lemo.enable(quantised_lora(kind), lemo.LemoConfig(keep=0.5))
        found[kind] = handle.general_modules()
    assert found["nf4"] == {}
    assert len(found["int8"]) == 21
    reason = "a bitsandbytes.nn.modules.Linear8bitLt, whose product is its own"
    assert found["int8"]["model.layers.0.self_attn.q_proj.base_layer"] == reason
    four = quantised_lora("nf4")
    decoder_layers(four)[0].mlp.up_proj.base_layer.compute_dtype = torch.bfloat16
    handle = lemo.enable(four, lemo.LemoConfig(keep=0.5))
    (reason,) = handle.general_modules().values()
    assert "computes in bfloat16 and the rows are float32" in reason


def test_four_bits_of_another_dtype():
    """Their layers round them to the rows' dtype forward, to that which was quantised backward."""
    model, plain = (quantised_lora("nf4") for _ in range(2))
    for each in (model, plain):
        for module in each.modules():
            if type(module) is bitsandbytes.nn.Linear4bit:
                module.weight.quant_state.dtype = torch.bfloat16
    handle = lemo.enable(model, lemo.LemoConfig(keep=1.0))
    batch = padded_batch([61, 45])
    assert_close_fp32(trained(model, batch), trained(plain, batch))
    assert_same_gradients(model, plain)
    (reason,) = {*handle.general_modules().values()}
    assert "stands for bfloat16 and the rows are float32" in reason
    handle.verify(batch)


def test_weights_of_other_kinds_are_left_to_their_layers():
    """torchao puts a tensor of its own kind into a plain linear layer."""

    class Stored(torch.Tensor):
        pass

    linear = nn.Linear(8, 8).requires_grad_(False)
    assert weights.is_plain(linear)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Stored), requires_grad=False)
    assert not weights.is_plain(linear)
    assert weights.matrix_of(linear, torch.float32) is None
    four = bitsandbytes.nn.Linear4bit(8, 8, quant_type="nf4")
    assert weights.matrix_of(four, torch.float32) is None, "not quantised yet"
    four = four.requires_grad_(False).to("cpu")
    assert weights.matrix_of(four, torch.float32)().shape == (8, 8)
    four.compute_dtype = torch.bfloat16
    assert weights.matrix_of(four, torch.float32) is None, "it computes in bf16"
