"""Bases that torchao has quantised train as plain models with the matrices of their products."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lemo
from devices import on_gpu, working_dtype
from generic_cases import BLOCK, kept_mask, make, masked_batch
from lemo import LemoConfig
from lemo.models.projections import torchao_weights
from lemo.models.projections.fp8 import fp8_of
from lemo.models.projections.weights import matrix_of
from tiny_models import gradients, lora, make_ids
from tolerances import assert_close_fp32, assert_close_low_precision, relative_error

quantization = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.filterwarnings("ignore")

TILES = {"group_size": 32, "int4_packing_format": "tile_packed_to_4d"}
KINDS = {
    "float8": lambda: quantization.Float8WeightOnlyConfig(),
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int8 tensor": lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor()),
    "int8 groups": lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32)),
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    # torch's kernel, which is for GPUs and has no backward pass of its own.
    "tiles": lambda: quantization.Int4WeightOnlyConfig(**TILES),
}
# The generic path runs the layers' own products.
CASES = [(kind, path) for kind in ("float8", "int8", "int4") for path in ("native", "generic")]
CASES += [("tiles", "native")] * on_gpu()


def quantised(kind, **settings):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    base = make("llama", **(sizes | settings))
    base.to(working_dtype())
    quantization.quantize_(base.model.layers, KINDS[kind]())
    return base.requires_grad_(False)


def linear_layers(model):
    return [module for module in model.modules() if type(module) is nn.Linear]


@torch.no_grad()
def matrix(linear):
    """[out, in]: what the layer multiplies by, by its own forward."""
    rows = torch.eye(linear.in_features, dtype=working_dtype())
    return nn.functional.linear(rows, linear.weight).T.contiguous()


def dequantised(base):
    """The same model with plain weights."""
    twin = copy.deepcopy(base)
    for linear in linear_layers(twin.model.layers):
        linear.weight = nn.Parameter(matrix(linear), requires_grad=False)
    return twin


def train(model, batch):
    """{"loss", and gradients by name}."""
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss, **gradients(model)}


def same_adapters(model, base):
    """`base` with the adapters of `model`."""
    twin = lora(base)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" in k}, strict=False)
    return twin


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_adapters_over_quantised_layers(kind, path, keep):
    base = quantised(kind)
    plain_base = dequantised(base)
    model = lora(base)
    plain = same_adapters(model, plain_base)
    handle = lemo.enable(model, LemoConfig(keep=keep, block_size=BLOCK, path=path))
    ids = make_ids(2, 61)
    batch = {"input_ids": ids, "labels": ids}
    mine = train(model, batch)
    seen = masked_batch(batch, kept_mask(handle, batch))
    oracle = train(copy.deepcopy(plain).float(), seen)
    theirs = train(plain, seen)
    assert mine.keys() == theirs.keys() == oracle.keys()
    assert len(oracle) > 1
    for name, expected in oracle.items():
        if not on_gpu():
            assert_close_fp32(mine[name], expected, name)
        elif name == "loss":  # of one number plain PyTorch's error may be none by chance
            assert relative_error(mine[name], expected) < torch.finfo(torch.bfloat16).eps
        else:
            assert_close_low_precision(mine[name], theirs[name], expected, name)
    if kind != "tiles":  # by itself the model cannot train
        handle.verify(batch)


def in_tiles(model):
    """Puts int4 in tiles into the linear layers, of which all values are 0."""
    kind = quantization.Int4TilePackedTo4dTensor
    for linear in linear_layers(model.model.layers):
        # Sizes are padded: rows to 8, columns to 1024.
        stored = torch.zeros(-(-linear.out_features // 8), 8, 32, 4, dtype=torch.int32)
        scales = torch.zeros(32, 8 * stored.shape[0], 2, dtype=torch.bfloat16)
        weight = kind(stored, scales, [1, 32], linear.weight.shape)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return model.requires_grad_(False)


class WithoutBackward(torch.autograd.Function):
    """As torch's kernel."""

    @staticmethod
    def forward(ctx, x, weight, group, scales):
        return x.new_zeros(x.shape[0], scales.shape[1])


@pytest.fixture
def tiles_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", WithoutBackward.apply)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("tiles_on_the_cpu")
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_tiles_cannot_train_in_the_generic_path(name):
    """What stands behind them can, and evaluation asks for no gradient."""
    model = lora(in_tiles(make(name)))
    handle = lemo.enable(model, LemoConfig(keep=0.5, block_size=BLOCK, path="generic"))
    ids = make_ids(2, 61)
    batch = {"input_ids": ids, "labels": ids}
    other = "path='native'.*, or quantise" if name == "llama" else "; quantise in another way"
    # The first one whose rows adapters have changed.
    where = "self_attn.o_proj.base_layer" if name == "llama" else "mlp.gate_up_proj"
    with pytest.raises(ValueError, match=rf"^model: model.layers.0.{where} is int4 of.*{other}"):
        model(**batch)
    assert model.eval()(**batch).loss.isfinite()
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    model(**batch).loss.backward()
    handle.remove()
    assert not any(linear._forward_pre_hooks for linear in linear_layers(model))


@pytest.mark.cpu_only
@pytest.mark.usefixtures("tiles_on_the_cpu")
def test_tiles_that_run_by_their_own_product_cannot_train():
    """As over rows in fp32 without autocast."""
    model = lora(in_tiles(make("llama")))
    handle = lemo.enable(model, LemoConfig(keep=0.5, block_size=BLOCK, path="native"))
    ids = make_ids(2, 61)
    with pytest.raises(ValueError, match=r"linear layer of \[32, 32\] is int4 .*general_modules"):
        model(input_ids=ids, labels=ids)
    reasons = handle.general_modules()
    assert "rows are float32" in reasons["model.layers.0.self_attn.o_proj.base_layer"]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_in_8_bits_of_integers_are_refused(kind):
    model = lora(quantised(kind))
    with pytest.raises(ValueError, match=r"than float8, got 'fp8' and a torchao.* as .*q_proj"):
        lemo.enable(model, LemoConfig(path="native", products="fp8"))


@pytest.mark.cpu_only
def test_products_in_8_bits_of_float8_hold_no_copies():
    model = lora(quantised("float8"))
    handle = lemo.enable(model, LemoConfig(path="native", products="fp8", block_size=BLOCK))
    ids = make_ids(2, 61)
    model(input_ids=ids, labels=ids).loss.backward()
    layers = [found for found in map(fp8_of, model.modules()) if found is not None]
    assert len(layers) + len(handle.unquantised_products()) == 7 * 3
    assert layers
    assert all(layer._weight is None and layer._measured for layer in layers)


@pytest.mark.parametrize(
    "kind", ["float8", "int8", "int8 tensor", "int8 groups", "int4", *["tiles"] * on_gpu()]
)
def test_matrices_are_those_of_the_products(kind):
    """Sizes that are no multiples of a tile's, too."""
    base = quantised(kind, hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    for linear in linear_layers(base.model.layers):
        assert torch.equal(matrix_of(linear, working_dtype())(), matrix(linear))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["float8", "int8", "int4"])
def test_no_matrix_is_stored(kind, autocast):
    """By its own forward torchao keeps each until backward. Autocast casts those of fp32."""
    base = quantised(kind)
    shapes = {tuple(linear.weight.shape) for linear in linear_layers(base.model.layers)}
    model = lora(base)
    handle = lemo.enable(model, LemoConfig(keep=1.0, recompute="none", block_size=BLOCK))
    ids, found = make_ids(2, 61), []

    def pack(tensor):
        found.append(tuple(tensor.shape))
        return tensor

    with (
        torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        assert handle.general_modules() == {}
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.isfinite()
    assert found
    assert not (shapes | {shape[::-1] for shape in shapes}) & {*found}


def test_layers_that_somebody_has_changed_run_by_their_own_forward(monkeypatch):
    linear, other = linear_layers(quantised("int4").model.layers)[:2]
    linear.register_forward_hook(lambda *_: None)
    assert matrix_of(linear, working_dtype()) is None
    assert matrix_of(other, working_dtype()) is not None
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda module, x: 2 * forward(module, x))
    assert matrix_of(other, working_dtype()) is None


def packed(codes, kernel_tiles):
    """As torch's kernel stores the int4 values of [N, K], two values of a row in each byte.

    Of 32 threads, four share a row of a tile. Thread p of them has the pairs of columns p and p + 4
    of each 16 columns; a number is of twice 16 columns, the odd ones in its upper half.
    """
    assert codes.dtype == torch.uint8
    codes = torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()
    stored = torch.zeros(
        codes.shape[0] // 8, codes.shape[1] // (16 * kernel_tiles), 32, kernel_tiles // 2
    ).long()
    for row, column in itertools.product(*map(range, codes.shape)):
        tile, inside = divmod(column // 16, kernel_tiles)
        pair, half = divmod(column % 16, 2)
        thread = row % 8 * 4 + pair % 4
        place = (half * 2 + inside % 2) * 2 + pair // 4
        stored[row // 8, tile, thread, inside // 2] |= codes[row, column] << 4 * place
    return stored.int()


@pytest.mark.cpu_only
@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 256, 32), (11, 200, 128)])
def test_tiles_of_int4_values(rows, columns, group, monkeypatch):
    """Scales and zeros are those of a row and a group; rows and columns of padding are left out."""
    torch.manual_seed(0)
    padded = 16, 256
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", packed)
    codes = torch.randint(16, padded)
    scales, zeros = torch.randint(1, 64, (2, padded[0], padded[1] // group)).bfloat16() / 64
    weight = SimpleNamespace(
        qdata=packed((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8),
        scale_and_zero=torch.stack([scales, zeros], -1).transpose(0, 1).contiguous(),
        block_size=(1, group),
        shape=(rows, columns),
    )
    result = torchao_weights._of_tiles(weight, torch.bfloat16)
    of_columns = torch.arange(padded[1]) // group
    exact = (codes - 8) * scales.double()[:, of_columns] + zeros.double()[:, of_columns]
    assert result.is_contiguous()
    assert torch.equal(result, exact[:rows, :columns].bfloat16())
