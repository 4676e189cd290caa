"""One node for linear layers with LoRA: what PEFT computes, with less kept."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lemo.models.projections import dropout, rows
from lemo.models.projections.linear import apply_linear, apply_linears
from lemo.models.projections.low_rank import summed
from linear_cases import (
    CONFIGURATIONS,
    INPUTS,
    OUTPUTS,
    PRECISIONS,
    RAGGED,
    ROWS,
    draw_as_lemo_does,
    inputs,
    lora_layer,
    of_lemo,
    run,
    runs_as_a_node,
)
from tolerances import assert_close_fp32, assert_close_low_precision


@pytest.fixture(autouse=True)
def equal_draws(monkeypatch):
    draw_as_lemo_does(monkeypatch)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("columns", [INPUTS, RAGGED])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_peft(name, columns, has_bias):
    """On the CPU dropout draws what torch's own draws."""
    layer = lora_layer(has_bias=has_bias, inputs=columns, **CONFIGURATIONS[name])
    x, dy = inputs(columns=columns)
    expected, _ = run(layer, layer, x, dy)
    result, names = run(of_lemo(layer), layer, x, dy)
    assert runs_as_a_node(names)
    assert result.keys() == expected.keys()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    for key, oracle in expected.items():
        assert_close_fp32(result[key], oracle, key)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_low_precision(precision, name):
    dtype, adapter_dtype, autocast = PRECISIONS[precision]
    settings = {"adapter_dtype": adapter_dtype} | CONFIGURATIONS[name]
    layer, (x, dy) = lora_layer(dtype, **settings), inputs(torch.bfloat16)
    x = x.to(dtype)
    exact = lora_layer(dtype, **settings).float()
    oracle, _ = run(exact, exact, x.float(), dy.float())
    plain, _ = run(layer, layer, x, dy, autocast)
    result, names = run(of_lemo(layer), layer, x, dy, autocast)
    assert runs_as_a_node(names)
    assert {key: t.dtype for key, t in result.items()} == {key: t.dtype for key, t in plain.items()}
    for key, value in result.items():
        low, low_plain = value.bfloat16(), plain[key].bfloat16()
        assert_close_low_precision(low, low_plain, oracle[key], key)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp32_adapters_lose_nothing_to_the_dtype_of_the_rows(name):
    """Products of the pairs are of fp32, as PEFT's: far closer to it than bf16 would be."""
    # PEFT takes a bias out of the rounded result again before it scales the columns.
    settings = {"has_bias": name != "DoRA"} | CONFIGURATIONS[name]
    layer = lora_layer(torch.bfloat16, adapter_dtype=torch.float32, **settings)
    x, dy = inputs(torch.bfloat16)
    expected, _ = run(layer, layer, x, dy)
    result, _ = run(of_lemo(layer), layer, x, dy)
    parts = ("lora_A", "lora_B") + (("lora_magnitude",) if name == "DoRA" else ())
    compared = [key for key in expected if any(part in key for part in parts)]
    assert len(compared) >= len(parts)
    for key in compared:
        if "DoRA" in name and "dropout" in name:
            continue  # the large product of masked rows is one of bf16
        assert_close_fp32(result[key], expected[key], key)


@pytest.mark.parametrize("name", ["plain", "dropout", "bias of LoRA", "trained bias", "DoRA"])
def test_results_are_rounded_once(name):
    """What fp32 pairs add to the product in bf16, and DoRA's scale of the sum, is of fp32."""
    layer = lora_layer(torch.bfloat16, adapter_dtype=torch.float32, **CONFIGURATIONS[name])
    x, dy = inputs(torch.bfloat16)
    pair = {key: getattr(layer, f"lora_{key}")["default"] for key in "AB"}
    torch.manual_seed(1)  # as `run` does
    low = pair["A"](layer.lora_dropout["default"](x.float()))
    added, scale = layer.scaling["default"] * pair["B"](low), 1.0
    base = layer.base_layer
    if name == "DoRA":
        product = layer.scaling["default"] * pair["B"].weight @ pair["A"].weight
        lengths = (base.weight.float() + product).norm(dim=1)
        scale = layer.lora_magnitude_vector["default"].weight / lengths
        wide = (nn.functional.linear(x, base.weight).float() + added) * scale + base.bias
    else:
        wide = base(x).float() + added
    result, _ = run(of_lemo(layer), layer, x, dy)
    # Sums in another order may round otherwise.
    assert (result["y"] != wide.bfloat16()).float().mean() < 0.02


def test_chunks_are_summed_in_fp32():
    """Ones, of which a sum in bf16 stays at 256."""
    total = None
    for _ in range(600):
        total = summed(total, torch.ones(3, dtype=torch.bfloat16))
    assert total.tolist() == [600.0] * 3


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_chunks_of_rows_add_up(name, monkeypatch):
    layer = lora_layer(torch.bfloat16, adapter_dtype=torch.float32, **CONFIGURATIONS[name])
    x, dy = inputs(torch.bfloat16)
    whole, _ = run(of_lemo(layer), layer, x, dy)
    monkeypatch.setattr(rows, "COPY_ELEMENTS", 10 * OUTPUTS)
    if "dropout" in name:
        # Draws of 10 rows are not those of 37: against differences of the loss.
        assert_slope(layer, x, dy)
        return
    chunked, _ = run(of_lemo(layer), layer, x, dy)
    for key, value in whole.items():
        if value.dtype == torch.float32:
            assert_close_fp32(chunked[key], value, key)
        else:
            assert_close_low_precision(chunked[key], value, value.float(), key)


def assert_slope(layer, x, dy):
    """Gradients are those of what forward computes, with the masks that it has drawn."""
    layer, x, dy = layer.double(), x.double(), dy.double()
    found, names = run(of_lemo(layer), layer, x, dy)
    assert runs_as_a_node(names)
    step, losses = 1e-5, []
    parameters = {"x": x} | {name: p.data for name, p in layer.named_parameters() if name in found}
    if "lora_magnitude_vector.default.weight" in parameters:
        # The norm of a column is a constant for the gradient only.
        parameters = {k: v for k, v in parameters.items() if k == "x" or "magnitude" in k}
    for sign in (1, -1):
        for name, value in parameters.items():
            value += sign * step * found[name]
        losses.append((run(of_lemo(layer), layer, x, dy)[0]["y"] * dy).sum())
        for name, value in parameters.items():
            value -= sign * step * found[name]
    slope = (losses[0] - losses[1]) / (2 * step)
    expected = sum(found[name].square().sum() for name in parameters)
    assert slope.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["adapted", "frozen", *CONFIGURATIONS])
def test_gradients_without_values(name):
    layer, (x, dy) = lora_layer(**CONFIGURATIONS.get(name, {})), inputs()
    layer = layer.base_layer if name == "frozen" else layer
    expected, _ = run(layer, layer, x, dy)
    result, names = run(of_lemo(layer, values=False), layer, x, dy)
    assert runs_as_a_node(names)
    del expected["y"]
    for key, oracle in expected.items():
        assert_close_fp32(result[key], oracle, key)
    with Results("mm", "addmm") as results:
        apply_linear(layer, x.requires_grad_(), values=False)
    assert (ROWS, OUTPUTS) not in [tuple(result.shape) for result in results.found]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_parameters_are_trained_where_the_rows_need_no_gradient(name, monkeypatch):
    """As those of a first layer, behind embedded tokens that are frozen; in chunks of rows."""
    monkeypatch.setattr(rows, "COPY_ELEMENTS", 10 * OUTPUTS)
    layer = lora_layer(torch.bfloat16, adapter_dtype=torch.float32, **CONFIGURATIONS[name])
    x, dy = inputs(torch.bfloat16)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    found = []
    for needs_gradient in (True, False):
        torch.manual_seed(1)  # for dropout
        y = apply_linear(layer, x.clone().requires_grad_(needs_gradient))
        found.append(torch.autograd.grad(y, trained, dy))
    assert all(map(torch.equal, *found))


def test_masks_are_of_the_share_and_of_their_own():
    x, _ = inputs()
    layer = lora_layer(lora_dropout=0.25)
    torch.manual_seed(5)
    bits = torch.empty(4000, dropout.packed_width(RAGGED), dtype=torch.uint8)
    mask = dropout.draw(torch.Size([4000, RAGGED]), 0.25, bits)
    assert mask.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(dropout.unpack(bits, RAGGED), mask)
    first, second = (apply_linear(layer, x) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    again = apply_linear(layer, x)
    torch.manual_seed(5)
    assert torch.equal(again, apply_linear(layer, x))
    assert torch.equal(apply_linear(layer.eval(), x), apply_linear(layer, x))
    everything = lora_layer(lora_dropout=0.5)
    everything.lora_dropout["default"].p = 1.0
    assert_close_fp32(apply_linear(everything, x), everything.base_layer(x))


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
    # The input, what each pair makes of it, and copies of the adapters in that dtype.
    rank, adapters = 4, sum(layer.lora_A["default"].weight.numel() for layer in layers)
    adapters += sum(layer.lora_B["default"].weight.numel() for layer in layers)
    assert sum(storages.values()) == 2 * ROWS * (INPUTS + 3 * rank) + 2 * adapters


def hooked(layer):
    layer.register_forward_hook(lambda module, arguments, result: 2 * result)
    return layer


def hooked_dropout():
    layer = lora_layer(lora_dropout=0.5)
    hooked(layer.lora_dropout["default"])
    return layer


OTHERS = {
    "a hook": lambda: hooked(lora_layer()),
    "a hook on dropout": hooked_dropout,
    "DoRA beside another adapter": lambda: lora_layer(use_dora=True, adapters=2),
    "a trainable layer": lambda: nn.Linear(INPUTS, OUTPUTS),
    "another module": lambda: nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.GELU()),
}


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_runs_as_it_is(case):
    layer, (x, dy) = OTHERS[case](), inputs()
    expected, _ = run(layer, layer, x, dy)
    result, names = run(of_lemo(layer, values=False), layer, x, dy)
    assert not runs_as_a_node(names)
    for name, oracle in expected.items():
        assert torch.equal(result[name], oracle), name


class Doubled(nn.Linear):
    """A base layer whose product is its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", [n for n in CONFIGURATIONS if "DoRA" not in n])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_pairs_over_a_layer_that_runs_by_its_own_forward(name, adapter_dtype):
    layer = lora_layer(torch.bfloat16, adapter_dtype=adapter_dtype, **CONFIGURATIONS[name])
    layer.base_layer.__class__ = Doubled
    exact, (x, dy) = copy.deepcopy(layer).float(), inputs(torch.bfloat16)
    oracle, _ = run(exact, exact, x.float(), dy.float())
    plain, _ = run(layer, layer, x, dy)
    result, names = run(of_lemo(layer), layer, x, dy)
    assert runs_as_a_node(names)
    assert result.keys() == plain.keys()
    for key, value in result.items():
        assert value.dtype == plain[key].dtype
        low, low_plain = value.bfloat16(), plain[key].bfloat16()
        assert_close_low_precision(low, low_plain, oracle[key], key)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_rows_that_peft_is_told_not_to_cast_are_refused(settings):
    layer = lora_layer(torch.bfloat16, adapter_dtype=torch.float32, **settings)
    layer.cast_input_dtype_enabled = False
    x, _ = inputs(torch.bfloat16)
    for function in (layer, of_lemo(layer)):
        with pytest.raises(RuntimeError, match="dtype"):
            function(x)


def test_what_a_hook_on_the_base_layer_sees_stays_as_it_is():
    """The pairs are added to a copy, whose rows are contiguous."""
    layer, (x, _) = lora_layer(), inputs()
    seen = []

    def watch(module, arguments, result):
        seen.append(result.T.contiguous().T)
        return seen[-1]

    layer.base_layer.register_forward_hook(watch)
    y = apply_linear(layer, x)
    assert y.is_contiguous()
    assert_close_fp32(y, layer(x))
    assert torch.equal(seen[0], seen[1])


def test_disabled_merged_and_switched_adapters():
    layer, (x, dy) = lora_layer(adapters=2), inputs()
    with torch.no_grad():
        adapted = apply_linear(layer, x)
        assert_close_fp32(adapted, layer(x))
        layer.merge()
        assert_close_fp32(apply_linear(layer, x), adapted)
        layer.unmerge()
        layer.enable_adapters(False)
        assert_close_fp32(apply_linear(layer, x), layer.base_layer(x))
        layer.enable_adapters(True)
        layer.merge()
        layer.enable_adapters(False)  # PEFT takes merged ones out when it is called
        assert_close_fp32(apply_linear(layer, x), layer.base_layer(x))
        assert not layer.merged
    layer.enable_adapters(True)
    layer.set_adapter(["1"])
    expected, _ = run(layer, layer, x, dy)
    result, _ = run(of_lemo(layer), layer, x, dy)
    assert result.keys() == expected.keys()
    assert "lora_A.1.weight" in result
    for key, oracle in expected.items():
        assert_close_fp32(result[key], oracle, key)


def test_frozen_pairs_store_nothing():
    layer, (x, _) = lora_layer().requires_grad_(False), inputs()
    layer.lora_B["default"].weight.requires_grad_()
    x.requires_grad_()
    y = apply_linear(layer, x)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert all(t.data_ptr() != x.data_ptr() for t in saved)
    expected = torch.autograd.grad(layer(x).sum(), [x, layer.lora_B["default"].weight])
    result = torch.autograd.grad(y.sum(), [x, layer.lora_B["default"].weight])
    for value, oracle in zip(result, expected, strict=True):
        assert_close_fp32(value, oracle)


def test_nothing_is_stored_for_pairs_whose_b_is_frozen():
    layers = side("frozen Bs")
    assert stored_bytes(layers.as_one, layers, torch.float32, False) == 0


def test_no_rows():
    for name, settings in CONFIGURATIONS.items():
        layer, (x, dy) = lora_layer(**settings), inputs()
        result, _ = run(of_lemo(layer), layer, x[:0], dy[:0])
        for key, value in result.items():
            assert not value.any(), (name, key)
        trained = {key for key, p in layer.named_parameters() if p.requires_grad}
        assert result.keys() == {"x", "y"} | trained


class Side(nn.Module):
    """Layers that read the same rows; their results side by side."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], dim=1)

    def as_one(self, x, values=True):
        return torch.cat(apply_linears(list(self.layers), x, values), dim=1)


def frozen(layer):
    return layer.base_layer


def trained(layer):
    """Its product is its own node's, and the pairs are lemo's."""
    layer.base_layer.weight.requires_grad_()
    return layer


def without(part):
    def freeze(layer):
        getattr(layer, part)["default"].weight.requires_grad_(False)
        return layer

    return freeze


def watched(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


PATTERNS = CONFIGURATIONS["rsLoRA and patterns"]
# (settings of LoRA, what is done to the layer) of layers side by side
SIDES = {name: [(settings, None)] * 3 for name, settings in CONFIGURATIONS.items()} | {
    "ranks": [({}, None), ({"r": 7, "lora_alpha": 7 * 6 / 4}, None), (PATTERNS, None)],
    "scalings": [({}, None), ({"lora_alpha": 5}, None)],
    "dropout of one": [({}, None), ({"lora_dropout": 0.3}, None), ({}, None)],
    "a frozen one": [({}, None), ({}, frozen), ({}, None)],
    "frozen ones": [({}, frozen)] * 2,
    "a trained one": [({}, None), ({}, trained), ({}, None)],
    "trained ones": [({}, trained)] * 2,
    "a frozen A": [({}, without("lora_A")), ({}, None)],
    "frozen As": [({}, without("lora_A"))] * 2,
    "a frozen B": [({}, without("lora_B")), ({}, None)],
    "frozen Bs": [({}, without("lora_B"))] * 2,
    "one of DoRA": [({}, None), ({"use_dora": True}, None)],
    "one with a hook": [({}, None), ({}, watched)],
}
ONE = [name for name in SIDES if "DoRA" not in name and name != "one with a hook"]


def side(name, dtype=torch.float32, **settings):
    layers = []
    for seed, (own, change) in enumerate(SIDES[name]):
        layer = lora_layer(dtype, seed=seed, **settings, **own)
        layers.append(layer if change is None else change(layer))
    return Side(layers)


def inputs_of(layers, dtype=torch.float32):
    x, _ = inputs(dtype)
    return x, torch.randn(ROWS, len(layers.layers) * OUTPUTS).to(dtype)


@pytest.mark.parametrize("name", SIDES)
def test_layers_of_the_same_rows(name):
    layers = side(name)
    x, dy = inputs_of(layers)
    expected, _ = run(layers, layers, x, dy)
    result, _ = run(layers.as_one, layers, x, dy)
    assert result.keys() == expected.keys()
    for key, oracle in expected.items():
        assert_close_fp32(result[key], oracle, key)
    found = {result.grad_fn for result in apply_linears(list(layers.layers), x.requires_grad_())}
    assert (len(found) == 1) == (name in ONE)


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_of_the_same_rows_in_low_precision(precision, name):
    dtype, adapter_dtype, autocast = PRECISIONS[precision]
    layers = side(name, dtype, adapter_dtype=adapter_dtype)
    x, dy = inputs_of(layers, torch.bfloat16)
    x = x.to(dtype)
    exact = copy.deepcopy(layers).float()
    oracle, _ = run(exact, exact, x.float(), dy.float())
    plain, _ = run(layers, layers, x, dy, autocast)
    result, _ = run(layers.as_one, layers, x, dy, autocast)
    assert {key: t.dtype for key, t in result.items()} == {key: t.dtype for key, t in plain.items()}
    for key, value in result.items():
        low, low_plain = value.bfloat16(), plain[key].bfloat16()
        assert_close_low_precision(low, low_plain, oracle[key], key)


@pytest.mark.parametrize("name", ["plain", "ranks", "a frozen one", "two adapters"])
def test_layers_of_the_same_rows_a_chunk_at_a_time(name, monkeypatch):
    layers = side(name, torch.bfloat16, adapter_dtype=torch.float32)
    x, dy = inputs_of(layers, torch.bfloat16)
    whole, _ = run(layers.as_one, layers, x, dy)
    monkeypatch.setattr(rows, "COPY_ELEMENTS", 10 * OUTPUTS)
    chunked, _ = run(layers.as_one, layers, x, dy)
    for key, value in whole.items():
        if value.dtype == torch.float32:
            assert_close_fp32(chunked[key], value, key)
        else:
            assert_close_low_precision(chunked[key], value, value.float(), key)


@pytest.mark.parametrize("name", ONE)
def test_gradients_of_layers_of_the_same_rows_without_values(name):
    layers = side(name)
    x, dy = inputs_of(layers)
    expected, _ = run(layers, layers, x, dy)
    result, _ = run(lambda x: layers.as_one(x, values=False), layers, x, dy)
    del expected["y"]
    for key, oracle in expected.items():
        assert_close_fp32(result[key], oracle, key)


def stored_bytes(results_of, layers, dtype, autocast):
    """Bytes of what autograd keeps, the layers' parameters and the rows left out."""
    x, _ = inputs(dtype)
    x.requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in (x, *layers.parameters())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            found[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(x.device.type, torch.bfloat16, enabled=autocast),
    ):
        y = results_of(x)
    assert y is not None
    return sum(size for _, size in found.values())


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_of_the_same_rows_store_what_they_store_apart(precision, name):
    dtype, adapter_dtype, autocast = PRECISIONS[precision]
    layers = side(name, dtype, adapter_dtype=adapter_dtype)

    def apart(x):
        return [apply_linear(layer, x) for layer in layers.layers]

    def together(x):
        return apply_linears(list(layers.layers), x)

    expected = stored_bytes(apart, layers, dtype, autocast)
    assert stored_bytes(together, layers, dtype, autocast) == expected


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_pairs_of_the_same_rows_that_change_before_backward_are_refused(part):
    layers = side("plain")
    x, dy = inputs_of(layers)
    y = layers.as_one(x)
    with torch.no_grad():
        getattr(layers.layers[1], part)["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


class Results(TorchDispatchMode):
    """What operators of some names give."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.found = names, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function.overloadpacket.__name__ in self.names:
            self.found.append(result)
        return result


def test_layers_of_the_same_rows_multiply_them_once(monkeypatch):
    """Products with As, and those of gradients with them, are one for all of the layers.

    And for all of the rows, where none are copied.
    """
    monkeypatch.setattr(rows, "COPY_ELEMENTS", 10 * OUTPUTS)
    layers = side("plain")
    with Results("mm", "addmm") as results:
        run(layers.as_one, layers, *inputs_of(layers))
    shapes = [tuple(result.shape) for result in results.found]
    assert shapes.count((ROWS, 12)) == 1
    assert shapes.count((12, INPUTS)) == 1
    assert shapes.count((ROWS, 4)) == 3  # gradients of the results with the Bs


def test_rows_are_copied_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(rows, "COPY_ELEMENTS", 10 * OUTPUTS)
    layers = side("plain", torch.bfloat16, adapter_dtype=torch.float32)
    with Results("_to_copy") as results:
        run(layers.as_one, layers, *inputs_of(layers, torch.bfloat16))
    copies = [x.numel() for x in results.found if x.dtype == torch.float32]
    assert len(copies) >= 2 * ROWS // 10
    assert max(copies) <= 10 * OUTPUTS


def test_nothing_is_multiplied_for_gradients_that_nobody_wants():
    layers = side("frozen As")
    x, dy = inputs_of(layers)
    y = layers.as_one(x)
    with Results("mm", "addmm") as results:
        y.backward(dy)
    assert [tuple(result.shape) for result in results.found] == [(OUTPUTS, 4)] * 2
