"""Pairs in fp32 over bf16 rows, with products of bf16 operands and fp32 sums.

On the CPU, where PyTorch has no such products, those of the same operands in fp32 stand for them.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lemo.models.projections import linear, rows, split_low_rank
from lemo.models.projections.adapters import adapted
from lemo.models.projections.linear import apply_linears
from linear_cases import (
    CONFIGURATIONS,
    OUTPUTS,
    RAGGED,
    ROWS,
    draw_as_lemo_does,
    inputs,
    lora_layer,
    of_lemo,
    run,
    runs_as_a_node,
)
from tolerances import assert_close_fp32, assert_close_low_precision, relative_error

PAIRS = {name: {"r": 8} | each for name, each in CONFIGURATIONS.items() if "DoRA" not in name}
PAIRS["rsLoRA and patterns"] = PAIRS["rsLoRA and patterns"] | {"rank_pattern": {"0": 16}}
PAIRS["negative"] = {"r": 8, "lora_alpha": -5}


@pytest.fixture(autouse=True)
def equal_draws(monkeypatch):
    draw_as_lemo_does(monkeypatch)


@pytest.fixture(autouse=True)
def split(monkeypatch):
    """Shapes of the weights of each call of the operator; the products are taken everywhere."""
    calls, own = [], split_low_rank.ops.bf16_split_all
    monkeypatch.setattr(split_low_rank, "_has_fp32_sums", lambda device: True)
    monkeypatch.setattr(
        split_low_rank.ops,
        "bf16_split_all",
        lambda xs, rows: calls.append([tuple(x.shape) for x in xs]) or own(xs, rows),
    )
    return calls


def layer_of(name, **settings):
    return lora_layer(torch.bfloat16, adapter_dtype=torch.float32, **{**PAIRS[name], **settings})


def in_fp32(monkeypatch, *arguments):
    """The same with products in fp32."""
    with monkeypatch.context() as patch:
        patch.setattr(split_low_rank, "_has_fp32_sums", lambda device: False)
        return run(*arguments)[0]


@pytest.fixture
def base_first(monkeypatch):
    """Products of pairs are added to those of base layers, as in fp32, so both round alike."""
    monkeypatch.setattr(linear._Plan, "begins_with_pair", lambda plan: False)
    monkeypatch.setattr(split_low_rank.SplitLowRank, "begins_gradient", lambda *of: False)


def assert_same(found, expected):
    """Results in bf16 differ by roundings that fall otherwise, those in fp32 by 2^-17.

    On a GPU a product is rounded before it is added to bf16 rows (cuBLAS), so more of them fall so.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        if value.dtype == torch.float32:
            assert_close_fp32(found[name], value, name)
        else:
            assert_close_low_precision(found[name], value, value.float(), name)
            assert value.is_cuda or (found[name] != value).float().mean() < 0.05, name


@pytest.mark.parametrize("columns", [24, 21])
@pytest.mark.parametrize("name", PAIRS)
def test_it_is_what_products_in_fp32_give(name, columns, split, base_first, monkeypatch):
    layer, (x, dy) = layer_of(name, inputs=columns), inputs(torch.bfloat16, columns)
    expected = in_fp32(monkeypatch, of_lemo(layer), layer, x, dy)
    assert not split
    found, names = run(of_lemo(layer), layer, x, dy)
    assert runs_as_a_node(names)
    assert split
    assert_same(found, expected)


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_what_peft_gives(name):
    layer, (x, dy) = layer_of(name), inputs(torch.bfloat16)
    exact = layer_of(name).float()
    oracle, _ = run(exact, exact, x.float(), dy.float())
    plain, _ = run(layer, layer, x, dy)
    found, _ = run(of_lemo(layer), layer, x, dy)
    for key, value in found.items():
        assert_close_low_precision(value.bfloat16(), plain[key].bfloat16(), oracle[key], key)


@pytest.mark.parametrize("name", PAIRS)
def test_chunks_of_rows_add_up(name, base_first, monkeypatch):
    layer, (x, dy) = layer_of(name), inputs(torch.bfloat16)
    monkeypatch.setattr(rows, "COPY_ELEMENTS", 10 * OUTPUTS)
    expected = in_fp32(monkeypatch, of_lemo(layer), layer, x, dy)
    found, _ = run(of_lemo(layer), layer, x, dy)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["plain", "dropout", "two adapters"])
def test_adapters_are_trained_where_the_rows_need_no_gradient(name):
    """As those of a first layer, behind embedded tokens that are frozen."""
    layer, (x, dy) = layer_of(name), inputs(torch.bfloat16)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    found = []
    for needs_gradient in (True, False):
        torch.manual_seed(1)  # for dropout
        y = of_lemo(layer)(x.clone().requires_grad_(needs_gradient))
        found.append(torch.autograd.grad(y, trained, dy))
    assert len(trained) >= 2
    assert all(map(torch.equal, *found))


def test_adapters_that_bf16_would_round_away_count():
    """An update of a thousandth of B changes the result by a thousandth of what B does."""
    layer, (x, _) = layer_of("plain", has_bias=False), inputs(torch.bfloat16)
    layer.base_layer.weight.data.zero_()
    b = layer.lora_B["default"].weight
    results = []
    for factor in (1.0, 1.001):
        wide = layer_of("plain", has_bias=False)
        wide.base_layer.weight.data.zero_()
        wide.lora_B["default"].weight.data = factor * b.data
        product = adapted(wide).pairs[0]
        low = split_low_rank.SplitLowRank.of(product)
        a, _, (upper,) = low.operands([product.a], [product.b])
        rows_low, _ = low.lower(x, a)
        results.append(rows_low.double() @ upper.T.double())
    assert relative_error(results[1] - results[0], 0.001 * results[0]) < 0.02


@pytest.mark.parametrize("frozen", [None, "lora_A", "lora_B"])
def test_layers_that_read_the_same_rows(frozen, split, base_first, monkeypatch):
    """Two pairs of a rank are a stack, the third is its own."""
    layers = [layer_of("plain", r=rank, seed=seed) for seed, rank in enumerate((8, 16, 8))]
    layers = torch.nn.ModuleList(layers)
    for name, parameter in layers.named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad_(False)
    x, dy = inputs(torch.bfloat16)

    def function(x):
        return torch.cat(apply_linears([*layers], x), 1)

    expected = in_fp32(monkeypatch, function, layers, x, dy.repeat(1, 3))
    found, names = run(function, layers, x, dy.repeat(1, 3))
    assert runs_as_a_node(names)
    assert_same(found, expected)
    assert split[0] == [(8, 24), (8, 24), (OUTPUTS, 8), (OUTPUTS, 8)]
    assert split[1] == [(16, 24), (OUTPUTS, 16)]


class AddedTo(TorchDispatchMode):
    """Inner sizes of the products that are added to something, in their order."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.addmm_.default:
            self.sizes.append(arguments[1].shape[1])
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_base_layers_are_added_to_those_of_pairs(has_bias):
    """A sum so far is read beside arithmetic that takes longer."""
    layer = layer_of("two adapters", has_bias=has_bias, inputs=RAGGED)
    x, dy = inputs(torch.bfloat16, RAGGED)
    with AddedTo() as forward:
        y = of_lemo(layer)(x.clone().requires_grad_())
    # A bias is added by the base layer's own product.
    assert forward.sizes == ([24, 24] if has_bias else [RAGGED, 24])
    with AddedTo() as backward:
        y.backward(dy)
    assert backward.sizes == [OUTPUTS]  # both pairs are one product


CASES = {
    "a rank that is no multiple of 8": ({"r": 4}, torch.bfloat16, torch.float32, False),
    "adapters in bf16": ({"r": 8}, torch.bfloat16, torch.bfloat16, False),
    "rows in fp16": ({"r": 8}, torch.float16, torch.float32, False),
    "rows in fp32": ({"r": 8}, torch.float32, torch.float32, False),
    "autocast": ({"r": 8}, torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("case", CASES)
def test_other_pairs_multiply_in_their_dtype(case, split):
    settings, dtype, adapter_dtype, autocast = CASES[case]
    layer = lora_layer(dtype, adapter_dtype=adapter_dtype, **settings)
    x, dy = inputs(dtype)
    if dtype == torch.float32 and torch.get_default_device().type != "cpu":
        x, dy = x.float(), dy.float()
    _, names = run(of_lemo(layer), layer, x, dy, autocast)
    assert runs_as_a_node(names)
    assert not split


class Wide(TorchDispatchMode):
    """Shapes of what is made in fp32."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("name", ["plain", "two adapters"])
def test_no_rows_are_copied_in_fp32(name, monkeypatch):
    layer, (x, dy) = layer_of(name, inputs=RAGGED), inputs(torch.bfloat16, RAGGED)
    monkeypatch.setattr(split_low_rank, "_wide", quiet)
    with Wide() as seen:
        run(of_lemo(layer), layer, x, dy)
    assert (8, RAGGED) in seen.shapes
    assert not seen.shapes & {(ROWS, RAGGED), (RAGGED, ROWS), (ROWS, OUTPUTS), (OUTPUTS, ROWS)}


def quiet(left, right, out=None):
    """A product whose inside nobody sees."""
    with _disable_current_modes():
        found = torch.mm(left.float(), right.float(), out=out)
    return found
