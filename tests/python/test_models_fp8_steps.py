"""products="fp8": weights whose rounding changes from step to step."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lemo
from lemo.models.layers import products
from lemo.models.projections import fp8
from lemo.models.projections.fp8 import Fp8Linear, fp8_of
from tiny_models import lora, make_ids, make_model

# The GPU's attention knows no fp32.
pytestmark = pytest.mark.cpu_only

STEPS = 128
PERIOD = 8


def enabled(model):
    return lemo.enable(model, lemo.LemoConfig(keep=0.5, block_size=8, products="fp8"))


def layers_of(model):
    """What computes in 8 bits, with the index of its layer."""
    found = ((name, fp8_of(module)) for name, module in model.named_modules())
    return [(int(name.split("layers.")[1][0]), each) for name, each in found if each is not None]


def linear(outputs=64, inputs=192):
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs, bias=False).bfloat16().requires_grad_(False)
    module.weight.copy_(torch.randn(outputs, inputs) * torch.randn(outputs, 1).exp())
    return module


def dequantised(layer):
    values, scales = layer.weight()
    return values.double() * scales.double()


def all_of_e4m3():
    """Its finite numbers: (8 + m) 2^(e - 10) of 3 bits m and 4 bits e, or m 2^-9 where e is 0."""
    sizes = [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
    sizes += [m * 2.0**-9 for m in range(8)]
    return torch.tensor(sorted({*sizes, *(-x for x in sizes)}), dtype=torch.float64)


def test_each_weight_is_the_nearest_of_a_grid_that_changes_by_turns():
    """Grids have scales 1 to 2 times as large, by multiples of the golden ratio."""
    numbers = all_of_e4m3()
    assert numbers.max() == 448
    module = linear()
    weight = module.weight.double()
    for place in (0, 5):
        layer = Fp8Linear(module, "some", place=place)
        scales = []
        for step in range(0, 40):
            layer.begin_step(step)
            turn = (step + place) // PERIOD
            wider = 2 ** (turn * 0.6180339887498949 % 1)
            expected = weight.abs().amax(1, keepdim=True) / 448 * wider
            assert torch.allclose(layer.weight()[1].double(), expected, rtol=1e-6)
            distance = (weight[..., None] / expected[..., None] - numbers).abs().amin(-1) * expected
            found = (dequantised(layer) - weight).abs()
            assert (found <= distance * (1 + 1e-5) + 1e-6 * weight.abs()).all()
            scales.append(layer.weight()[1][0].item())
        changes = [step for step in range(1, 40) if scales[step] != scales[step - 1]]
        assert changes == [step for step in range(1, 40) if (step + place) % PERIOD == 0]


def test_weights_of_a_loss_in_inference_mode_are_rounded_anew():
    """Tensors that are made in inference mode may not be written to outside of it."""
    module = linear()
    layer, other = Fp8Linear(module, "some"), Fp8Linear(module, "some")
    with torch.inference_mode():
        layer.weight()
    for each in (layer, other):
        each.begin_step(PERIOD)
    assert torch.equal(dequantised(layer), dequantised(other))


def test_the_mean_over_steps_is_nearer_to_the_weight_than_any_rounding():
    """What an adapter could learn to mend becomes small; one rounding errs as much as any other."""
    module = linear()
    weight = module.weight.double()
    layer = Fp8Linear(module, "some")
    total, once = torch.zeros_like(weight), []
    for step in range(STEPS):
        layer.begin_step(step)
        error = (dequantised(layer) - weight) / weight.norm(dim=1, keepdim=True)
        total += error
        once.append(error.norm().item())
    assert max(once) < 1.15 * min(once)
    assert total.norm() / STEPS < 0.25 * min(once)


def test_the_copy_stays_where_it_is():
    """It is written in place."""
    layer = Fp8Linear(linear(), "some")
    values, scales = layer.weight()
    before = values.clone()
    layer.begin_step(PERIOD)
    assert layer.weight()[0] is values
    assert layer.weight()[1] is scales
    assert not torch.equal(values.view(torch.uint8), before.view(torch.uint8))


class Quotients(TorchDispatchMode):
    """Sizes of tensors that were divided by others."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function._schema.name == "aten::div":
            self.sizes.append(result.numel())
        return result


def test_a_weight_that_is_rounded_in_parts_is_the_same(monkeypatch):
    """So many numbers are in fp32 at a time, whichever side is the longer one."""
    for shape in ((64, 192), (192, 64)):
        whole, parts = (Fp8Linear(linear(*shape), "some") for _ in range(2))
        expected = dequantised(whole)
        with monkeypatch.context() as patch, Quotients() as quotients:
            patch.setattr(fp8, "_AT_ONCE", 1000)
            found = parts.weight()
        assert torch.equal(found[0].double() * found[1].double(), expected)
        assert 500 < max(quotients.sizes) <= 1000
        assert sum(quotients.sizes) == 64 * 192


def test_rows_of_zeros_and_the_largest_numbers_stay_finite():
    module = linear()
    module.weight[3] = 0
    module.weight[4] = torch.finfo(torch.bfloat16).max / 4
    layer = Fp8Linear(module, "some")
    for step in range(0, STEPS, PERIOD):
        layer.begin_step(step)
        found = dequantised(layer)
        assert found.isfinite().all()
        assert not found[3].any()


def test_the_handle_tells_of_steps_and_a_resumed_run_rounds_alike():
    ids = make_ids(1, 64)
    model, resumed = lora(make_model("llama")), lora(make_model("llama"))
    resumed.load_state_dict(model.state_dict())
    handle, last = enabled(model), enabled(resumed)
    assert {index for index, _ in layers_of(model)} == {0, 1, 2}
    first, seen = {}, set()
    for step in range(20):
        handle.begin_step(step, 20)
        model(input_ids=ids, labels=ids)
        for index, layer in layers_of(model):
            scales, turn = layer.weight()[1], (step + index) // PERIOD
            wider = scales / first.setdefault(layer.name, scales.clone())
            expected = torch.full_like(wider, 2 ** (turn * 0.6180339887498949 % 1))
            assert torch.allclose(wider, expected, rtol=1e-6)
            seen.add((index, turn))
    assert len(seen) == 9
    last.begin_step(19, 20)
    resumed(input_ids=ids, labels=ids)
    for (_, ours), (_, theirs) in zip(layers_of(model), layers_of(resumed), strict=True):
        assert ours.weight()[1].equal(theirs.weight()[1])
        assert dequantised(ours).equal(dequantised(theirs))


def test_a_layer_that_was_trained_in_between_is_rounded_anew():
    """By an optimizer that writes through `data`, which no tensor counts."""
    model = lora(make_model("llama", intermediate_size=64))
    enabled(model)
    ids = make_ids(2, 40)
    model(input_ids=ids, labels=ids).loss.backward()
    (_, layer), *_ = layers_of(model)
    before, weight = dequantised(layer).clone(), layer._module.weight
    weight.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    weight.data.add_(torch.randn(weight.shape))
    weight.requires_grad_(False)
    model(input_ids=ids, labels=ids)
    assert not torch.allclose(weight.double(), before, atol=0.5)
    assert torch.allclose(weight.double(), dequantised(layer), atol=0.5)


def test_a_merged_weight_is_rounded_on_the_grid_of_the_step():
    module = linear()
    layer = Fp8Linear(module, "some")
    layer.weight()
    layer.begin_step(PERIOD)
    module.weight.mul_(3)
    values, scales = layer.weight()
    expected = module.weight.float().abs().amax(1, keepdim=True) / 448 * 2**0.6180339887498949
    assert torch.allclose(scales, expected, rtol=1e-6)
    assert (values.float().abs().amax(1) > 448 / 2 * 0.9).all()


def test_an_mlp_leaves_8_bits_in_a_pass_and_comes_back_on_the_grid_of_the_step():
    """Nobody has to ask what is in 8 bits for that."""
    ids = make_ids(1, 64)
    model = lora(make_model("llama"))
    handle = enabled(model)
    model(input_ids=ids, labels=ids)
    mlp = model.base_model.model.model.layers[1].mlp
    base = mlp.up_proj.base_layer
    hook = mlp.register_forward_hook(lambda *_: None)
    model(input_ids=ids, labels=ids)
    assert fp8_of(base) is None, "a copy that nobody reads is held"
    # It has its turn one step before the first layer.
    handle.begin_step(2 * PERIOD - 1, 20)
    hook.remove()
    model(input_ids=ids, labels=ids)
    wider = 2 ** (2 * 0.6180339887498949 % 1)
    expected = base.weight.abs().amax(1, keepdim=True) / 448 * wider
    assert torch.allclose(fp8_of(base).weight()[1], expected, rtol=1e-6)


def test_a_gpu_without_such_products_is_refused_before_a_layer_is_changed(monkeypatch):
    def refused(device, fast):
        raise NotImplementedError(f"products: {fast}")

    monkeypatch.setattr(products, "check_gpu", refused)
    model = lora(make_model("llama"))
    with pytest.raises(NotImplementedError, match="products: False"):
        enabled(model)
    assert not layers_of(model)


def test_a_module_that_is_no_linear_layer_stays_and_is_named():
    class Own(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = linear.weight

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    model, ids = lora(make_model("llama"), target_modules=["up_proj"]), make_ids(1, 64)
    attention = model.base_model.model.model.layers[1].self_attn
    attention.v_proj = Own(attention.v_proj)
    handle = enabled(model)
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    reason = handle.unquantised_products()["model.layers.1.self_attn.v_proj"]
    assert ".Own that is no linear layer" in reason
