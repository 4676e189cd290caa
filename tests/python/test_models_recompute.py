"""Recomputed layers give what stored ones give (docs/design/recomputation.md)."""

import math
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lemo
from devices import on_gpu
from lemo.models.layers.execution import is_plain_checkpoint
from lemo.models.layers.recompute import _Gradients
from lemo.models.projections import rows
from lemo.packing.chunks import chunk_rows
from model_cases import BATCHES
from model_checks import assert_equal_steps, one_step, saved_bytes
from tiny_models import (
    LINEAR,
    all_of,
    config_of,
    gradients,
    lora,
    make_ids,
    make_model,
    padded_batch,
)
from tolerances import assert_close_fp32, assert_close_low_precision, relative_error

SETTINGS = {
    "everything": {"keep": 1.0},
    "shared set": {"keep": 0.5},
    "own sets": {"keep": 0.4, "keep_mlp": 0.6, "select_at": "all"},
    "all keys": {"keep": 0.5, "visible_keys": "all"},
    "computed keys": {"keep": 0.5, "visible_keys": "computed"},
    "computed keys, own sets": {
        "keep": 0.4,
        "keep_mlp": 0.6,
        "select_at": "all",
        "visible_keys": "computed",
    },
    "nothing forced": {"keep": 0.0, "keep_first": 0, "keep_last": 0, "dense_layers": [0]},
}
DEFAULTS = {"block_size": 8, "dense_layers": []}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 24 rows: several of them, the last one ragged, in every test batch."""
    monkeypatch.setattr(rows, "chunk_rows", lambda rows, width: 24)


def run(model, batch, how, autocast=False, seed=5, **settings):
    """(loss, gradients) of one step."""
    return one_step(model, batch, config_of(recompute=how, **DEFAULTS | settings), autocast, seed)


def assert_same(result, expected):
    assert_close_fp32(result[0], expected[0], "loss")
    assert result[1].keys() == expected[1].keys()
    for name, oracle in expected[1].items():
        # A key bias of OPT shifts all scores of a query alike: its gradient is rounding alone.
        if not name.endswith("k_proj.bias"):
            assert_close_fp32(result[1][name], oracle, name)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt"])
def test_gradients_of_lora_on_every_linear_layer(architecture, name, how):
    model = lora(make_model(architecture))
    batch = BATCHES["packed" if architecture == "llama" else "right"]()
    expected = run(model, batch, "none", **SETTINGS[name])
    assert_same(run(model, batch, how, **SETTINGS[name]), expected)


def test_gradients_of_chunks_are_summed_in_fp32():
    """Ones, of which a sum in bf16 stays at 256."""
    weight = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    gradients_of = _Gradients([weight])
    for _ in range(600):
        edge = get_gradient_edge(weight + weight)
        gradients_of.add([edge], None, [torch.full_like(weight, 0.5)])
    assert gradients_of.sums[0].tolist() == [600.0] * 3


@pytest.mark.cpu_only
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("name", ["shared set", "own sets"])
def test_gradients_of_every_parameter(name, how):
    model, batch = make_model("qwen2"), BATCHES["left"]()
    expected = run(model, batch, "none", **SETTINGS[name])
    assert_same(run(model, batch, how, **SETTINGS[name]), expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", SETTINGS)
def test_bits_depend_neither_on_the_run_nor_on_what_is_stored_of_attention(name):
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    first = run(model, batch, "layer", **SETTINGS[name])
    for how in ("layer", "selective"):
        assert_equal_steps(run(model, batch, how, **SETTINGS[name]), first)


@pytest.mark.parametrize("how", ["none", "layer", "selective"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_backward_of_attention_is_asked_to_be_deterministic(how, deterministic, monkeypatch):
    module = sys.modules["lemo.ops.segment_attention"]
    asked, call = [], module.call

    def listen(op, *arguments):
        if "backward" in str(op):
            names = [argument.name for argument in op.default._schema.arguments]
            asked.append(dict(zip(names, arguments))["deterministic"])
        return call(op, *arguments)

    monkeypatch.setattr(module, "call", listen)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        run(make_model("llama"), BATCHES["right"](), how, **SETTINGS["shared set"])
    finally:
        torch.use_deterministic_algorithms(before)
    assert asked == [deterministic] * 3


@pytest.mark.parametrize("dtype", [{}, {"dtype": torch.bfloat16}], ids=["working", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt"])
def test_bits_of_one_chunk_are_those_of_stored_layers(architecture, name, dtype):
    model, batch = lora(make_model(architecture, **dtype)), BATCHES["right"]()
    model = model.to(next(model.parameters()).dtype)
    expected = run(model, batch, "none", **SETTINGS[name])
    for how in ("layer", "selective"):
        assert_equal_steps(run(model, batch, how, **SETTINGS[name]), expected)


@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("name", ["shared set", "own sets"])
def test_dropout_draws_the_same_numbers_again(name, how):
    model, batch = lora(make_model("llama"), lora_dropout=0.3), BATCHES["packed"]()
    expected = run(model, batch, "none", **SETTINGS[name])
    after = torch.rand(3)
    result = run(model, batch, how, **SETTINGS[name])
    assert torch.equal(torch.rand(3), after)
    if not on_gpu():
        assert_same(result, expected)
    # In low precision: rounding is far below what other numbers would change.
    others = run(model, batch, "none", seed=6, **SETTINGS[name])
    apart, changed = (
        relative_error(all_of(found[1]), all_of(expected[1])) for found in (result, others)
    )
    assert apart < changed / 10


@pytest.mark.cpu_only
@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_dropout_of_computed_rows_leaves_that_of_kept_rows_alone(architecture, how):
    """Against torch's own checkpoints, which wrap the kept rows of a layer."""
    model, batch = lora(make_model(architecture), lora_dropout=0.3), BATCHES["packed"]()
    wrapped = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
    model.get_base_model()._set_gradient_checkpointing(
        True, lambda function, *arguments: wrapped(function, *arguments)
    )
    expected = run(model, batch, "auto", **SETTINGS["computed keys"])
    assert_same(run(model, batch, how, **SETTINGS["computed keys"]), expected)
    other = run(model, batch, how, seed=6, **SETTINGS["computed keys"])
    assert not torch.equal(other[0], expected[0])


@pytest.mark.cpu_only
@pytest.mark.usefixtures("small_chunks")
def test_dropout_in_chunks_is_the_same_in_both_passes():
    """Against differences of the loss, as chunks draw other numbers than whole layers."""
    model, batch = lora(make_model("llama"), lora_dropout=0.3), BATCHES["packed"]()
    _, found = run(model, batch, "layer", **SETTINGS["everything"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    step, losses = 1e-2 / all_of(found).norm(), []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found.values(), strict=True):
                parameter += sign * step * gradient
        losses.append(run(model, batch, "layer", **SETTINGS["everything"])[0])
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found.values(), strict=True):
                parameter -= sign * step * gradient
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope.item() == pytest.approx(all_of(found).norm().item() ** 2, rel=0.02)


@pytest.mark.cpu_only
@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["shared set", "computed keys"])
def test_autocast(case, weights, how):
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    oracle = run(model, batch, "none", **SETTINGS[case])
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(weights)
    plain = run(model, batch, "none", autocast=True, **SETTINGS[case])
    result = run(model, batch, how, autocast=True, **SETTINGS[case])
    assert all(gradient.dtype == torch.float32 for gradient in result[1].values())
    value, expected = (all_of(found[1]).bfloat16() for found in (result, plain))
    assert_close_low_precision(value, expected, all_of(oracle[1]), "gradients")


def test_backward_inside_of_autocast():
    """What forward cast without a graph is not taken from autocast's cache."""
    model, batch = lora(make_model("llama")), padded_batch([40])
    lemo.enable(model, config_of(recompute="layer", keep=1.0, **DEFAULTS))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.cpu_only
def test_two_units_in_one_graph_and_gradients_of_a_retained_graph():
    model, batch = lora(make_model("llama")), padded_batch([40])
    lemo.enable(model, config_of(recompute="layer", keep=0.5, **DEFAULTS))
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    loss.backward()
    for name, gradient in gradients(model).items():
        assert_close_fp32(gradient, 2 * once[name], name)


class Watch(TorchDispatchMode):
    """Counts ops, and remembers the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("how", "calls"), [("none", 3), ("layer", 6), ("selective", 3)])
def test_how_often_attention_runs_forward(how, calls):
    model, watch = lora(make_model("llama")), Watch()
    lemo.enable(model, config_of(recompute=how, keep=1.0, **DEFAULTS))
    with watch:
        model(**padded_batch([40])).loss.backward()
    assert watch.calls["lemo::segment_attention"] == calls
    assert watch.calls["lemo::segment_attention_backward"] == 3


@pytest.mark.cpu_only
@pytest.mark.usefixtures("small_chunks")
def test_the_activations_of_the_mlp_exist_for_one_chunk_only():
    tokens, width, hidden = 256, 2048, 32
    model = lora(make_model("llama", intermediate_size=width, max_position_embeddings=tokens))
    largest = {}
    for how in ("none", "layer"):
        handle = lemo.enable(model, config_of(recompute=how, keep=1.0, **DEFAULTS))
        with Watch() as watch:
            model(**padded_batch([tokens])).loss.backward()
        largest[how] = watch.largest
        handle.remove()
    assert largest["none"] == 4 * tokens * width
    # The frozen weights themselves are larger than a chunk here.
    assert largest["layer"] == 4 * width * hidden


def test_chunks():
    assert chunk_rows(65536, 14336) == 8192
    assert chunk_rows(1000, 14336) == 1024
    assert chunk_rows(0, 14336) == 256
    assert chunk_rows(10**6, 2**30) == 256
    for count in (9000, 16384, 100_000):
        chunk = chunk_rows(count, 14336)
        assert chunk * 14336 <= 2**27
        assert math.ceil(count / chunk) == math.ceil(count / 9216)


@pytest.mark.cpu_only
def test_the_flag_of_transformers_and_functions_of_the_user():
    batch, results, calls = padded_batch([40]), {}, []

    def own(function, *args):
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=False)

    for how in ("off", "on", "none", "own", "hook"):
        model = lora(make_model("llama"))
        base = model.base_model.model
        if how != "off":
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if how == "own":
            base._set_gradient_checkpointing(True, own)
        if how == "hook":
            weight = base.model.layers[1].self_attn.q_proj.lora_A["default"].weight
            weight.register_hook(lambda gradient: 2 * gradient)
        mode = "none" if how == "none" else "auto"
        lemo.enable(model, config_of(recompute=mode, keep=1.0, **DEFAULTS))
        size = saved_bytes(model, batch)
        loss = model(**batch).loss
        loss.backward()
        found = gradients(model)
        if how == "hook":
            weight.grad /= 2
        results[how] = size, (loss.detach(), found)
    assert len(calls) == 6  # two forward passes of three layers
    sizes = {how: size for how, (size, _) in results.items()}
    # The flag makes the embedded tokens require a gradient, which takes a little by itself.
    assert sizes["off"] <= sizes["none"] < 1.05 * sizes["off"]
    assert sizes["on"] == sizes["hook"] < sizes["none"] / 2
    for how in ("on", "none", "own", "hook"):
        assert_same(results[how][1], results["off"][1])


@pytest.mark.cpu_only
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", ["none", "layer", "selective"])
@pytest.mark.parametrize("when", ["before forward", "between forward and backward"])
def test_hooks_on_gradients_of_parameters(when, how, groups):
    """Each is called once, with the whole gradient, as in the plain model."""
    found, batch = [], padded_batch([40])
    for keeps in (False, True):
        model, calls, handles = lora(make_model("llama")), Counter(), []
        if keeps:
            lemo.enable(model, config_of(recompute=how, keep=1.0, head_groups=groups, **DEFAULTS))
        if when != "before forward":
            loss = model(**batch).loss
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:

                def twice(gradient, name=name, calls=calls):
                    calls[name] += 1
                    return 2 * gradient

                handles.append(parameter.register_hook(twice))
        if when == "before forward":
            loss = model(**batch).loss
        loss.backward()
        assert {*calls.values()} == {1}
        found.append((loss, {name: x.clone() for name, x in gradients(model).items()}))
        for handle in handles:
            handle.remove()
        calls.clear()
        model(**batch).loss.backward()
        assert not calls
    assert_same(found[1], found[0])


def _hooked(model, vector):
    """A vector is added to what some modules of the model give."""
    for module in _parts(model, "v_proj", "down_proj", "layernorm"):
        module.register_forward_hook(lambda module, args, output: output + vector[0])


def _of_the_user(model, vector):
    class Gated(torch.nn.SiLU):
        def forward(self, x):
            return super().forward(x) * vector.sum()

    for module in _parts(model, "mlp"):
        module.act_fn = Gated()


def _computed(*ends):
    """Weights that are made of others by the vector."""

    def compute(model, vector):
        for module in _parts(model, *ends):
            weight = module._parameters.pop("weight").detach()
            module.weight = weight * vector.sum()

    return compute


def _parts(model, *ends):
    return [module for name, module in model.named_modules() if name.endswith(ends)]


@pytest.mark.cpu_only
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("also_lora", [True, False])
@pytest.mark.parametrize("how", ["none", "layer", "selective", "checkpointing"])
@pytest.mark.parametrize(
    "read",
    [
        _hooked,
        _of_the_user,
        _computed("layernorm"),
        _computed("o_proj.base_layer", "up_proj.base_layer"),
        _computed("lora_A.default", "lora_B.default"),
    ],
    ids=["by hooks", "by a module", "as norms", "as projections", "as adapters"],
)
def test_trained_tensors_that_are_no_parameters_of_a_layer(read, how, also_lora):
    """Whoever reads them, they get the gradient that they have in the plain model."""
    found, batch = [], padded_batch([40])
    for keeps in (False, True):
        model = lora(make_model("llama"))
        model.requires_grad_(False)
        if also_lora:
            for parameter in model.get_base_model().model.layers[1].parameters():
                parameter.requires_grad_(True)
        vector = torch.full((4,), 0.3, requires_grad=True)
        read(model, vector)
        if keeps:
            if how == "checkpointing":
                model.gradient_checkpointing_enable()
            mode = "auto" if how == "checkpointing" else how
            lemo.enable(model, config_of(recompute=mode, keep=1.0, **DEFAULTS))
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), gradients(model) | {"vector": vector.grad}))
    assert_same(found[1], found[0])


def test_which_functions_are_plain():
    model = make_model("llama")
    for settings in (None, {"use_reentrant": False}):
        model.gradient_checkpointing_enable(settings)
        assert is_plain_checkpoint(model.model.layers[0]._gradient_checkpointing_func)
    assert is_plain_checkpoint(partial(checkpoint, use_reentrant=True))
    assert not is_plain_checkpoint(partial(checkpoint, context_fn=print))
    assert not is_plain_checkpoint(checkpoint)


@pytest.mark.parametrize("keep", [1.0, 0.25])
@pytest.mark.parametrize("how", ["none", "layer", "selective"])
def test_bytes_that_a_layer_stores(how, keep):
    """The table of docs/design/recomputation.md, for bf16 and LoRA of rank r on q, k, v and o."""
    tokens, heads, kv_heads, dim, width, rank, dtype = 256, 4, 2, 64, 384, 8, 2
    hidden, layers = heads * dim, (2, 5)
    sizes = []
    for count in layers:
        model = make_model(
            "llama",
            dtype=torch.bfloat16,
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=count,
            max_position_embeddings=tokens,
        )
        model = lora(model, target_modules=LINEAR[:4], r=rank).to(torch.bfloat16)
        lemo.enable(model, config_of(recompute=how, keep=keep, mask_loss=False, **DEFAULTS))
        ids = make_ids(1, tokens)
        sizes.append(saved_bytes(model, {"input_ids": ids, "labels": ids}))
    rows = keep * tokens
    stored = {
        "layer": dtype * hidden,
        "selective": 2 * dtype * hidden + 4 * heads,
        # Two gathered inputs of norms, one output of a norm, q and out; k and v; gate and up.
        "none": dtype * (5 * hidden + 2 * kv_heads * dim + 2 * width + 4 * rank) + 4 * (heads + 2),
    }[how]
    assert (sizes[1] - sizes[0]) / (layers[1] - layers[0]) == rows * stored


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
@pytest.mark.parametrize("visible_keys", ["kept", "computed"])
def test_second_derivatives_are_refused(recompute, visible_keys):
    model = make_model("llama")
    lemo.enable(model, config_of(recompute=recompute, visible_keys=visible_keys, **DEFAULTS))
    loss = model(**BATCHES["right"]()).loss
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True, allow_unused=True)


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
def test_gradients_that_somebody_else_reads_stay_as_they_are(recompute):
    """The gradient of the residual is written in place; a term of a sum hands out the same one."""
    model = make_model("llama")
    lemo.enable(model, config_of(keep=1.0, recompute=recompute, dense_layers=[], block_size=8))
    hidden = model.model(BATCHES["right"]()["input_ids"]).last_hidden_state
    other = torch.zeros_like(hidden, requires_grad=True)
    dy = torch.randn(hidden.shape).to(hidden.dtype)
    before = dy.clone()
    (hidden + other).backward(dy)
    assert torch.equal(dy, before)
    assert torch.equal(other.grad, before)


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
def test_a_training_step_copies_no_gradient_of_the_residual(recompute):
    shapes = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is torch.ops.aten.clone.default:
                tensor, *_ = arguments
                shapes.append(tuple(tensor.shape))
            return function(*arguments, **(keywords or {}))

    model, batch = lora(make_model("llama")), BATCHES["right"]()
    handle = lemo.enable(model, config_of(recompute=recompute, keep=0.5, **DEFAULTS))
    loss = model(**batch).loss
    residual = handle.statistics()[0].tokens, model.config.hidden_size
    with Copies():
        loss.backward()
    assert residual not in shapes


@pytest.mark.parametrize("how", ["none", "layer", "selective"])
def test_weights_that_are_gone_in_backward(how):
    """With other weights, backward would compute the layer again as it was in no forward pass."""
    model, batch = make_model("llama"), BATCHES["right"]()
    lemo.enable(model, config_of(keep=1.0, recompute=how, **DEFAULTS))
    others = {
        name: (weight.detach() + 0.1 * torch.randn_like(weight)).requires_grad_()
        for name, weight in model.named_parameters()
    }
    loss = torch.func.functional_call(model, others, (), batch).loss
    if how != "none":
        with pytest.raises(RuntimeError, match="expected LlamaDecoderLayer to have the same weigh"):
            loss.backward()
        return
    loss.backward()

    def plain_gradients(dtype):
        plain = make_model("llama", dtype=dtype)
        plain.load_state_dict(others)
        plain(**batch, use_cache=False).loss.backward()
        return gradients(plain)

    oracle, dtype = plain_gradients(torch.float32), model.dtype
    if dtype == torch.float32:
        for name, gradient in oracle.items():
            assert_close_fp32(others[name].grad, gradient, name)
        return
    for name, gradient in plain_gradients(dtype).items():
        assert_close_low_precision(others[name].grad, gradient, oracle[name], name)
