"""products="fp8": the training of layers whose frozen weights multiply in 8 bits."""

import copy
import logging

import pytest
import torch
from torch import nn

import lemo
from lemo import ops, reference
from lemo.models.layers import products
from lemo.models.layers.general import by_reason
from lemo.models.projections import fp8, weights
from lemo.models.projections.fp8 import LIMIT, Fp8Linear
from lemo.models.projections.linear import apply_linear
from model_checks import assert_same_gradients
from tiny_models import all_of, gradients, lora, make_ids, make_model, padded_batch
from tolerances import relative_error

# The GPU's attention knows no fp32.
pytestmark = pytest.mark.cpu_only

BLOCK = 8
# Of a product of independent factors: each is rounded by 2^-4 of itself at most, evenly between,
# so 2^-4 / sqrt(3) of its power of two in the mean square, and numbers are evenly spread between
# powers of two by their logarithm. Both factors together.
TYPICAL = (2 * 2**-8 / 3 * (1 - 1 / 4) / (2 * torch.tensor(2.0).log().item())) ** 0.5


def config_of(**settings):
    fixed = {"keep": 0.5, "block_size": BLOCK, "products": "fp8", "recompute": "none"}
    return lemo.LemoConfig(**fixed | settings)


def trained(model, batch, **settings):
    """(handle, loss), after a backward pass."""
    handle = lemo.enable(model, config_of(**settings))
    loss = model(**batch).loss
    loss.backward()
    return handle, loss.detach()


def others_left(handle):
    """`unquantised_products` but for queries, keys and the last MLP, which always stay."""
    reasons = handle.unquantised_products()
    last = [n for n, r in reasons.items() if ".2." in n and r.startswith("the last layer's MLP")]
    assert len(last) in (2, 3), "OPT's has two layers"
    heads = [n for n, r in reasons.items() if r.startswith("queries and keys")]
    assert sorted(part for n in heads for part in n.split(".") if part.endswith("_proj")) == (
        ["k_proj"] * 3 + ["q_proj"] * 3
    )
    return {name: reason for name, reason in reasons.items() if name not in last + heads}


def layers_of(model):
    return next(m for name, m in model.named_modules() if name.endswith("layers"))


def projection(model, name="up_proj"):
    return getattr(layers_of(model)[0].mlp, name)


def of_layer(module, x, dy):
    """The result and all gradients of lemo's node."""
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(1)
    y = apply_linear(module, leaf)
    y.backward(dy)
    return {"y": y.detach(), "x": leaf.grad} | gradients(module)


def base_of(module):
    return getattr(module, "base_layer", module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"lora_bias": True}])
def test_the_frozen_product_alone_is_rounded(settings, dtype):
    """Both directions are those of the oracle's factors; what pairs add is the same as before."""
    torch.manual_seed(0)
    module = projection(lora(make_model("llama", dtype=dtype), **settings))
    base = base_of(module)
    base.weight.data *= torch.randn(base.out_features, 1).exp()
    x = torch.randn(40, base.in_features).to(dtype)
    dy = torch.randn(40, base.out_features).to(dtype)
    plain = of_layer(module, x, dy)
    layer = Fp8Linear(base, "up_proj")
    found = of_layer(module, x, dy)
    layer.remove()
    assert of_layer(module, x, dy)["y"].equal(plain["y"])

    weight = base.weight.detach().float()
    values, scales = reference.fp8_rows(weight, None)
    row_values, row_scales = reference.fp8_rows(x, None)
    y = (row_values * row_scales) @ (values * scales).T - x.float() @ weight.T
    row_values, row_scales = reference.fp8_rows(dy, scales[:, 0])
    dx = (row_values * row_scales) @ values - dy.float() @ weight
    rounding = 1e-5 if dtype == torch.float32 else 2**-7
    for name, expected in (("y", y), ("x", dx)):
        scale = plain[name].float().norm()
        difference = found[name].float() - plain[name].float()
        assert (difference - expected).norm() < rounding * scale, name
        assert difference.norm() > 0.01 * scale, "it is rounded to 8 bits"
    for name in found.keys() - {"y", "x"}:
        assert torch.equal(found[name], plain[name]), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_products_err_as_rounding_does(architecture):
    """Of random factors, by what rounding to three bits gives in the mean square."""
    torch.manual_seed(0)
    model = lora(make_model(architecture))
    handle = lemo.enable(model, config_of())
    for module in layers_of(model).modules():
        layer = vars(module).get("_lemo_fp8")
        if layer is None:
            continue
        x = torch.randn(200, module.in_features)
        weight = module.weight
        y = layer.forward(x, x, lambda weight=weight: weight, module.bias)
        expected = nn.functional.linear(x, weight)
        error = relative_error(y if module.bias is None else y - module.bias, expected)
        assert 0.8 * TYPICAL < error < 1.2 * TYPICAL
    assert others_left(handle) == {}


class Rounded(torch.autograd.Function):
    """The oracle: a plain product whose factors are rounded in both directions."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.values, ctx.scales = reference.fp8_rows(weight, None)
        values, scales = reference.fp8_rows(x, None)
        return (values * scales) @ (ctx.values * ctx.scales).T

    @staticmethod
    def backward(ctx, dy):
        values, scales = reference.fp8_rows(dy, ctx.scales[:, 0])
        return (values * scales) @ ctx.values, None


class RoundedLinear(nn.Linear):
    def forward(self, x):
        y = Rounded.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def rounded(model):
    """The plain model, with the oracle in place of its layers' linear ones, but for those of
    queries, keys and the last MLP."""
    for name, module in layers_of(model).named_modules():
        last = name.startswith("2.") and ("mlp" in name or "fc" in name)
        stays = last or "q_proj" in name or "k_proj" in name
        if type(module) is nn.Linear and not module.weight.requires_grad and not stays:
            module.__class__ = RoundedLinear
    return model


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_with_everything_kept_it_is_the_model_with_rounded_factors(architecture, recompute):
    """A number next to the middle between two of e4m3 may be rounded the other way, by what two
    orders of a sum differ; that moves all that follows. So two of six batches have to agree."""
    model, oracle = lora(make_model(architecture)), rounded(lora(make_model(architecture)))
    plain = lora(make_model(architecture))
    errors, distances = [], []
    for seed in range(6):
        batch = padded_batch([25, 17], seed=seed)
        for each in (model, oracle, plain):
            each.zero_grad()
        handle, loss = trained(model, batch, keep=1.0, recompute=recompute)
        assert others_left(handle) == {}
        handle.remove()
        expected = oracle(**batch).loss
        expected.backward()
        assert relative_error(loss, expected) < 1e-3
        trained(plain, batch, keep=1.0, products="dtype")[0].remove()
        wanted = all_of(gradients(oracle))
        errors.append(relative_error(all_of(gradients(model)), wanted))
        distances.append(relative_error(all_of(gradients(plain)), wanted))
    assert sorted(errors)[1] < 0.001, errors
    assert max(errors) < min(distances) / 2, (errors, distances)


@pytest.mark.parametrize("recompute", ["layer", "selective"])
@pytest.mark.parametrize("visible_keys", ["kept", "all", "computed"])
def test_recomputing_changes_nothing(recompute, visible_keys):
    model, stored = lora(make_model("llama")), lora(make_model("llama"))
    batch = padded_batch([61, 45])
    _, loss = trained(model, batch, recompute=recompute, visible_keys=visible_keys)
    _, expected = trained(stored, batch, visible_keys=visible_keys)
    assert torch.equal(loss, expected)
    assert_same_gradients(model, stored)


def test_under_autocast_with_fp32_adapters():
    model = lora(make_model("llama", dtype=torch.bfloat16))
    plain = copy.deepcopy(model)
    batch, losses = padded_batch([61, 45]), []
    for each, kind in ((model, "fp8"), (plain, "dtype")):
        with torch.autocast("cpu", torch.bfloat16):
            handle, loss = trained(each, batch, products=kind)
        assert handle.unquantised_products() == {} if kind == "dtype" else not others_left(handle)
        assert all(gradient.isfinite().all() for gradient in gradients(each).values())
        losses.append(loss)
    # A logit is behind 12 products that err by a few hundredths of themselves.
    assert 0 < relative_error(*losses) < 0.05


def test_rows_are_rounded_once_for_the_layers_that_read_them(monkeypatch):
    rounded, own = [], ops.fp8_rows
    monkeypatch.setattr(ops, "fp8_rows", lambda *a: rounded.append(a[0].shape[1]) or own(*a))
    model = lora(make_model("llama"))
    handle = lemo.enable(model, config_of(keep=1.0))
    batch = padded_batch([61])
    model(**batch).loss.backward()
    rounded.clear()
    loss = model(**batch).loss
    # For each layer: both norms' rows and the heads'; in the last one not the MLP's. The activation
    # comes in 8 bits.
    assert sorted(rounded) == [32] * 8
    rounded.clear()
    loss.backward()
    assert len(rounded) == 12 - 1, "the first layer's input needs no gradient"
    assert not fp8._shared
    assert not weights._kept
    handle.remove()


def test_recomputing_rounds_no_rows_of_products_without_values(monkeypatch):
    rounded, own = [], ops.fp8_rows
    model = lora(make_model("llama"))
    lemo.enable(model, config_of(keep=1.0, recompute="layer"))
    batch = padded_batch([61])
    model(**batch).loss.backward()
    loss = model(**batch).loss
    monkeypatch.setattr(ops, "fp8_rows", lambda *a: rounded.append(len(a)) or own(*a))
    loss.backward()
    assert rounded.count(1) == 3 * 3 - 1, "not the activation, whose product is not needed"


def test_weights_are_rounded_once_and_again_when_they_change():
    model = lora(make_model("llama"))
    trained(model, padded_batch([61]))
    base = base_of(projection(model))
    layer = vars(base)["_lemo_fp8"]
    first = layer.weight()
    assert layer.weight()[0] is first[0]
    with torch.no_grad():
        base.weight.mul_(2)
    assert torch.equal(layer.weight()[1], 2 * first[1])


def test_merged_adapters_and_removal():
    """Merging and saving see the weights as they are; a merged layer's product stays in dtype."""
    model, batch = lora(make_model("llama")), padded_batch([61])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle, loss = trained(model, batch)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not [name for name in model.state_dict() if "fp8" in name]
    module, x = projection(model), torch.randn(8, 32)
    expected = module(x)
    module.merge()
    assert relative_error(apply_linear(module, x), expected) < 1e-5
    module.unmerge()
    handle.remove()
    assert not [m for m in model.modules() if "_lemo_fp8" in vars(m)]
    assert relative_error(apply_linear(module, x), expected) < 1e-5
    assert torch.equal(trained(copy.deepcopy(model), batch)[1], loss)


@pytest.mark.parametrize("passes_while_merged", [False, True])
def test_a_new_adapter_over_merged_ones_multiplies_with_the_new_weights(passes_while_merged):
    """As in ReLoRA, with the handle still on."""
    model, batch = lora(make_model("llama")), padded_batch([61, 45])
    handle, before = trained(model, batch, keep=1.0)
    if passes_while_merged:
        model.merge_adapter()
        model(**batch)
    model = lora(model.merge_and_unload())
    loss = model(**batch).loss.detach()
    handle.remove()
    _, expected = trained(model, batch, keep=1.0)
    assert torch.equal(loss, expected)
    assert relative_error(loss, before) > 1e-3


def test_merged_weights_without_adapters_are_rounded_again():
    model, batch = lora(make_model("llama")), padded_batch([61, 45])
    handle, _ = trained(model, batch, keep=1.0)
    model = model.merge_and_unload()
    loss = model(**batch).loss
    layer = vars(projection(model))["_lemo_fp8"]
    assert torch.equal(layer.weight()[1], ops.fp8_rows(projection(model).weight)[1])
    handle.remove()
    lemo.enable(model, config_of(keep=1.0))
    assert torch.equal(model(**batch).loss, loss)


def test_merged_layers_hold_no_copy():
    """Whoever merges and starts again in the same LoRA layer finds the new weights."""
    model, batch = lora(make_model("llama")), padded_batch([61])
    handle, _ = trained(model, batch)
    module = projection(model)
    layer = vars(module.base_layer)["_lemo_fp8"]
    module.merge()
    name = "model.layers.0.mlp.up_proj.base_layer"
    assert others_left(handle) == {name: "merged adapters"}
    model(**batch)
    assert layer._weight is None
    assert fp8.bytes_to_come(model) == 0, "not while it is merged"
    module.merged_adapters.clear()
    assert fp8.bytes_to_come(model) == 48 * (32 + 4)
    model(**batch)
    assert torch.equal(layer.weight()[1], ops.fp8_rows(module.base_layer.weight)[1])
    assert others_left(handle) == {}


def test_evaluation_and_verify_run_in_the_models_dtype():
    model, batch = lora(make_model("llama")), padded_batch([61, 45])
    expected = model.eval()(**batch).loss
    handle = lemo.enable(model, config_of())
    assert torch.equal(model(**batch).loss, expected)
    model.train()
    handle.verify(batch)
    assert not vars(base_of(projection(model)))["_lemo_fp8"].paused


def test_a_layer_that_errs_too_much_stays(caplog):
    """Its weight cancels: what is left is what rounding makes."""
    model = lora(make_model("llama"))
    base = base_of(projection(model, "down_proj"))
    with torch.no_grad():
        # Columns in pairs that nearly cancel where the activations are alike.
        for name in ("gate_proj", "up_proj"):
            weight = projection(model, name).base_layer.weight
            weight[1::2] = weight[::2]
            for part in projection(model, name).lora_B.values():
                part.weight.zero_()
        base.weight[:, 1::2] = -base.weight[:, ::2] * (1 + 1e-2)
    batch = padded_batch([61, 45])
    with caplog.at_level(logging.WARNING, "lemo"):
        handle, _ = trained(model, batch)
    name = "model.layers.0.mlp.down_proj.base_layer"
    reasons = others_left(handle)
    assert reasons.keys() == {name}
    assert "forward product errs by" in reasons[name]
    assert name in caplog.text
    layer, x = vars(base)["_lemo_fp8"], torch.randn(4, 48)
    assert layer.forward(x, x, lambda: base.weight, None) is None
    assert layer.input_gradient(torch.randn(4, 32), lambda: base.weight) is not None


def test_what_cannot_be_is_named():
    model = lora(make_model("llama", intermediate_size=40, num_hidden_layers=2))
    model.base_model.model.model.layers[1].self_attn.v_proj.base_layer.requires_grad_(True)
    handle, _ = trained(model, padded_batch([61]))
    reasons = handle.unquantised_products()
    assert len(reasons) == 3 + 3 + 4 + 1, "two MLPs, queries and keys, the trained one"
    size = "its sizes 32 and 40 are not both multiples of 16"
    assert reasons["model.layers.0.mlp.up_proj.base_layer"] == size
    assert reasons["model.layers.1.self_attn.v_proj.base_layer"] == "its weight is trained"


def test_what_always_stays_is_named_once_for_each_reason_and_holds_no_copy():
    model = lora(make_model("llama"))
    handle, _ = trained(model, padded_batch([61]))
    assert by_reason(handle.unquantised_products()) == [
        "model.layers.0.self_attn.q_proj.base_layer and 5 more: queries and keys, whose error "
        "changes what attention looks at",
        "model.layers.2.mlp.gate_proj.base_layer and 2 more: the last layer's MLP, whose error "
        "reaches the loss most directly",
    ]
    on = [name.removesuffix(".base_layer") for name, m in model.named_modules() if fp8.fp8_of(m)]
    attention = [f"{i}.self_attn.{part}" for i in range(3) for part in ("v_proj", "o_proj")]
    mlps = [f"{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")]
    assert sorted(name.split("layers.")[1] for name in on) == sorted(attention + mlps)


def test_dora_stays_in_dtype_and_is_right():
    model, batch = lora(make_model("llama"), use_dora=True), padded_batch([61])
    plain = lora(make_model("llama"), use_dora=True)
    _, loss = trained(model, batch)
    _, expected = trained(plain, batch, products="dtype")
    assert torch.equal(loss, expected)


def test_dora_is_named_and_holds_no_copies():
    model = lora(make_model("llama"), use_dora=True)
    handle = lemo.enable(model, config_of())
    assert fp8.bytes_to_come(model) == 0
    model(**padded_batch([61]))
    reasons = others_left(handle)
    assert len(reasons) == 12
    assert {*reasons.values()} == {"DoRA"}
    handle.remove()
    assert handle.unquantised_products() == {}


MLP = {f"model.layers.0.mlp.{name}.base_layer" for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("when", ["before", "after"])
def test_linears_of_a_changed_mlp_are_named_and_come_back(when):
    """Whether it was changed before lemo was enabled, or later."""
    model, batch = lora(make_model("llama")), padded_batch([61])
    mlp = layers_of(model)[0].mlp
    if when == "before":
        hook = mlp.register_forward_hook(lambda *_: None)
        handle = lemo.enable(model, config_of(keep=1.0))
        # Values and outputs of three layers, and the second MLP: weights, and scales in fp32.
        weights, scales = 3 * 32 * (16 + 32) + 3 * 32 * 48, 3 * (16 + 32) + 2 * 48 + 32
        assert fp8.bytes_to_come(model) == weights + 4 * scales
    else:
        handle, _ = trained(model, batch, keep=1.0)
        hook = mlp.register_forward_hook(lambda *_: None)
    model(**batch)
    assert fp8.bytes_to_come(model) == 0
    reasons = others_left(handle)
    assert reasons.keys() == MLP
    assert {*reasons.values()} == {
        "a transformers.models.llama.modeling_llama.LlamaMLP or a hook in place of the model's own "
        "MLP"
    }
    assert not [name for name, m in mlp.named_modules() if "_lemo_fp8" in vars(m)]
    hook.remove()
    assert others_left(handle) == {}
    loss = model(**batch).loss
    assert vars(mlp.up_proj.base_layer)["_lemo_fp8"]._weight is not None
    handle.remove()
    assert not [m for m in model.modules() if "_lemo_fp8" in vars(m)]
    assert torch.equal(trained(model, batch, keep=1.0)[1], loss)


def test_an_mlp_of_another_kind_is_named():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(32, 32)

        def forward(self, x):
            return self.up(x)

    model = lora(make_model("llama"))
    layers_of(model)[1].mlp = Other()
    reasons = others_left(lemo.enable(model, config_of()))
    assert reasons.keys() == {"model.layers.1.mlp"}
    assert ".Other or a hook in place of" in reasons["model.layers.1.mlp"]


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_lora_layers_that_run_as_they_are_are_named(part):
    model, batch = lora(make_model("llama")), padded_batch([61])
    handle, _ = trained(model, batch)
    hook = projection(model, part).register_forward_hook(lambda *_: None)
    assert model(**batch).loss.isfinite()
    reason = "a hook or a forward of somebody else on the LoRA layer"
    assert others_left(handle) == {f"model.layers.0.mlp.{part}.base_layer": reason}
    hook.remove()
    assert others_left(handle) == {}
    layers_of(model)[0].mlp.up_proj = nn.Linear(32, 48, bias=False).requires_grad_(False)
    assert others_left(handle) == {
        "model.layers.0.mlp.up_proj": "a torch.nn.modules.linear.Linear that is no linear layer, "
        "or came after enable"
    }


def test_weights_that_are_not_finite_are_refused():
    model = lora(make_model("llama"))
    base_of(projection(model)).weight.data[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"expected finite weights .* in model.layers.0.mlp.up"):
        trained(model, padded_batch([61]))


def test_the_generic_path_is_refused():
    with pytest.raises(ValueError, match="products: expected 'dtype' in the generic path"):
        lemo.enable(lora(make_model("llama")), config_of(path="generic"))


@pytest.mark.parametrize("products", ["fp8", "fp8_fast"])
def test_other_quantised_bases_are_refused(products):
    class Linear4bit(nn.Linear):
        pass

    Linear4bit.__module__ = "bitsandbytes.nn.modules"
    model = make_model("llama").requires_grad_(False)
    layers_of(model)[1].mlp.up_proj = Linear4bit(32, 48, bias=False)
    got = f"got '{products}' and a bitsandbytes.nn.modules.Linear4bit as"
    with pytest.raises(ValueError, match=got):
        lemo.enable(model, config_of(products=products))
    assert not [m for m in model.modules() if "_lemo_fp8" in vars(m)]


def test_sharded_weights_are_refused_whenever_they_are(monkeypatch):
    model, batch = lora(make_model("llama")), padded_batch([61])
    lemo.enable(model, config_of())
    monkeypatch.setattr(products, "is_sharded", lambda module: True)
    message = "products: expected 'dtype' where weights are sharded"
    with pytest.raises(ValueError, match=message):
        model(**batch)
    with pytest.raises(ValueError, match=message):
        lemo.enable(lora(make_model("llama")), config_of())


class Float8Tensor(torch.Tensor):
    """What lemo reads of torchao's tensor of this name."""

    @staticmethod
    def of(weight):
        self = weight.detach().as_subclass(Float8Tensor)
        self.qdata, self.scale = ops.fp8_rows(weight.detach())
        self.act_quant_kwargs = None
        return self

    def dequantize(self):
        return (self.qdata.float() * self.scale).to(torch.bfloat16)


Float8Tensor.__module__ = "torchao.quantization"


def test_weights_that_are_in_8_bits_are_used_as_they_are():
    """Nothing is held beside them."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False).bfloat16().requires_grad_(False)
    plain = copy.deepcopy(linear)
    linear._parameters["weight"] = Float8Tensor.of(linear.weight)
    x, dy = torch.randn(20, 64).bfloat16(), torch.randn(20, 32).bfloat16()
    results = []
    for module in (linear, plain):
        layer = Fp8Linear(module, "it")
        assert layer.unfit() is None
        results.append(of_layer(module, x, dy))
        assert (layer._weight is None) == (module is linear)
    for name, value in results[1].items():
        assert torch.equal(results[0][name], value), name
    linear.weight.scale = linear.weight.scale[0]
    assert "without a scale for each output" in vars(linear)["_lemo_fp8"].unfit()
    linear.weight.act_quant_kwargs = {}
    assert vars(linear)["_lemo_fp8"].unfit() == "its weight is no plain matrix, or it has hooks"


def test_the_limit_is_what_rounding_both_factors_makes():
    assert LIMIT == 17 / 16 * 17 / 16 - 1
    assert TYPICAL < LIMIT / 3


def test_fast_sums_are_asked_for_in_both_directions(monkeypatch):
    """On the CPU they are the same as others."""
    asked, product = [], fp8.ops.fp8_product

    def recording(rows, weight, dtype, bias=None, fast=False):
        asked.append(fast)
        return product(rows, weight, dtype, bias, fast)

    monkeypatch.setattr(fp8.ops, "fp8_product", recording)
    losses, counts = {}, {}
    for name in ("fp8", "fp8_fast"):
        model, ids = lora(make_model("llama")), make_ids(1, 64)
        asked.clear()
        handle, losses[name] = trained(model, {"input_ids": ids, "labels": ids}, products=name)
        assert set(asked) == {name == "fp8_fast"}
        counts[name] = len(asked)
        handle.remove()
    assert counts["fp8"] == counts["fp8_fast"] > 40
    assert losses["fp8"].equal(losses["fp8_fast"])
