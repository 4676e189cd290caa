"""Backward of attention by groups of heads gives the bits of all heads at once."""

import importlib
import sys

import pytest
import torch

import lemo
from devices import on_gpu
from lemo.models.projections import rows
from lemo.packing.chunks import split_heads
from lemo.planner import memory
from lemo.planner.memory import StepMemory
from lemo.planner.plan import NOMINAL, Planner
from lemo.planner.shape import Adapters, LayerRows, ModelShape, shape_of, step_of
from lemo.planner.text import plan_lines
from lemo.planner.timing import StepTime
from model_cases import BATCHES
from model_checks import assert_equal_steps, one_step
from planner_cases import CASES, PeakOfTensors, model_of
from tiny_models import config_of, gradients, lora, make_ids, make_model

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
SETTINGS = {
    "everything": {"keep": 1.0},
    "shared set": {"keep": 0.5},
    "own sets": {"keep": 0.4, "keep_mlp": 0.6, "select_at": "all"},
    "all keys": {"keep": 0.5, "visible_keys": "all"},
    "shifted groups": {"keep": 0.5, "group_size": 12},
}
LORA = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "biases": {"lora_bias": True},
    "norms": {"modules_to_save": ["input_layernorm"]},
}


def made(architecture="llama", dtype=None, **overrides):
    heads = {**HEADS}
    if on_gpu():
        heads["hidden_size"] = 512  # heads of 64, which the kernels there know
    if architecture == "opt":
        del heads["num_key_value_heads"]
    if architecture == "qwen3":
        heads["head_dim"] = 64 if on_gpu() else 16
    return make_model(architecture, dtype=dtype, **heads | overrides)


def run(model, batch, how, groups, autocast=False, **settings):
    """(loss, gradients) of one step."""
    config = {"block_size": 8, "dense_layers": [], "recompute": how, "head_groups": groups}
    return one_step(model, batch, config_of(**config | settings), autocast)


@pytest.fixture(autouse=True)
def _deterministic():
    """On a GPU the gradient of queries depends on the run without it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on_gpu())
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_bits_are_those_of_all_heads_at_once(architecture, name, how):
    model = lora(made(architecture), target_modules="all-linear")
    batch = BATCHES["packed" if architecture == "llama" else "right"]()
    expected = run(model, batch, how, 1, **SETTINGS[name])
    for groups in (2, 3, 8):
        assert_equal_steps(run(model, batch, how, groups, **SETTINGS[name]), expected)


@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("case", LORA)
def test_bits_with_kinds_of_lora(case, how, monkeypatch):
    monkeypatch.setattr(rows, "chunk_rows", lambda rows, width: 24)
    model, batch = lora(made(), **LORA[case]), BATCHES["packed"]()
    for name in ("shared set", "own sets"):
        expected = run(model, batch, how, 1, **SETTINGS[name])
        assert_equal_steps(run(model, batch, how, 2, **SETTINGS[name]), expected)


@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_bits_of_low_precision(architecture, autocast, how):
    model, batch = lora(made(architecture, dtype=torch.bfloat16)), BATCHES["right"]()
    if not autocast:
        model = model.to(torch.bfloat16)
    for name in ("shared set", "all keys"):
        expected = run(model, batch, how, 1, autocast, **SETTINGS[name])
        assert_equal_steps(run(model, batch, how, 4, autocast, **SETTINGS[name]), expected)


@pytest.mark.parametrize("how", ["layer", "selective"])
def test_bits_of_every_parameter(how):
    model, batch = made("qwen2"), BATCHES["left"]()
    expected = run(model, batch, how, 1, **SETTINGS["own sets"])
    assert_equal_steps(run(model, batch, how, 4, **SETTINGS["own sets"]), expected)


@pytest.mark.parametrize("how", ["layer", "selective"])
def test_bits_where_the_first_layers_attention_has_nothing_to_train(how):
    model, batch = lora(made(), target_modules=["down_proj"]), BATCHES["right"]()
    expected = run(model, batch, how, 1, **SETTINGS["shared set"])
    assert_equal_steps(run(model, batch, how, 2, **SETTINGS["shared set"]), expected)


@pytest.mark.parametrize("how", ["layer", "selective"])
def test_bits_of_a_loss_outside_the_model(how):
    """Its left-out rows are computed, whose keys all heads meet at once."""
    batch, results = BATCHES["right"](), []
    for groups in (1, 2):
        model = lora(made())
        config = {"block_size": 8, "dense_layers": [], "recompute": how, "head_groups": groups}
        handle = lemo.enable(model, config_of(keep=0.5, **config))
        handle.begin_step(0, 1)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits.square().mean().backward()
        results.append((logits.detach(), gradients(model)))
    assert_equal_steps(*results)


@pytest.mark.parametrize("how", ["layer", "selective"])
def test_an_odd_number_of_key_heads_in_shifted_groups(how):
    """The head in the middle has queries of both halves."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    model = lora(made(**heads, hidden_size=576 if on_gpu() else 72))
    batch = BATCHES["right"]()
    expected = run(model, batch, how, 1, **SETTINGS["shifted groups"])
    assert_equal_steps(run(model, batch, how, 3, **SETTINGS["shifted groups"]), expected)


def test_how_heads_are_split():
    assert split_heads(8, 2) == [[(0, 4)], [(4, 8)]]
    assert split_heads(3, 2) == [[(0, 1)], [(1, 3)]]
    assert split_heads(2, 8) == [[(0, 1)], [(1, 2)]]
    assert split_heads(8, 2, shifted=True) == [[(0, 2), (4, 6)], [(2, 4), (6, 8)]]
    assert split_heads(5, 8, shifted=True) == [[(0, 1), (2, 3), (3, 4)], [(1, 2), (4, 5)]]
    assert split_heads(1, 8, shifted=True) == [[(0, 1)]]
    for heads in range(1, 12):
        for groups in (1, 2, 3, 8):
            for shifted in (False, True):
                ranges = [r for group in split_heads(heads, groups, shifted) for r in group]
                assert sorted(head for a, b in ranges for head in range(a, b)) == [*range(heads)]


def test_what_is_refused():
    with pytest.raises(ValueError, match="head_groups: expected null or 1 with visible_keys"):
        lemo.LemoConfig(head_groups=2, visible_keys="computed")
    with pytest.raises(ValueError, match="head_groups: expected null or 1 in the generic path"):
        lemo.enable(make_model("llama"), lemo.LemoConfig(head_groups=2, path="generic"))


@pytest.mark.parametrize("how", ["layer", "selective"])
def test_heads_of_a_group_are_differentiated_together(how, monkeypatch):
    module, shapes = sys.modules["lemo.ops.segment_attention"], []
    call = module.call

    def listen(op, *arguments):
        if "backward" in str(op):
            shapes.append((arguments[1].shape[1], arguments[2].shape[1]))
        return call(op, *arguments)

    monkeypatch.setattr(module, "call", listen)
    run(lora(made()), BATCHES["right"](), how, 4, **SETTINGS["shared set"])
    assert shapes == [(2, 1)] * 4 * 3


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ("shared set", "plain", [3]),
        ("all keys", "plain", [2, 1]),
        ("shared set", "DoRA", [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_projections_of_one_node_are_differentiated_together(
    architecture, settings, kind, expected, monkeypatch
):
    """Others one after the other: what they are given is not held until all have run."""
    module, counts = importlib.import_module("lemo.models.layers.recompute"), []
    add = module._Gradients.add

    def listen(gradients, edges, leaf, dys):
        counts.append(len(edges))
        return add(gradients, edges, leaf, dys)

    model, batch = lora(made(architecture), **LORA[kind]), BATCHES["right"]()
    monkeypatch.setattr(module._Gradients, "add", listen)
    run(model, batch, "layer", 2, **SETTINGS[settings])
    layers = model.config.num_hidden_layers
    # The MLP and attention's output before; the norm, but of the first layer, behind.
    assert counts == ([1, 1, *expected, 1] * layers)[:-1]


@pytest.mark.cpu_only
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("mask_loss", [True, False], ids=["dropped rows", "all rows"])
@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize(("architecture", "key_heads"), [("llama", 4), ("llama", 8), ("qwen3", 4)])
def test_the_highest_bytes_of_a_step_are_predicted(
    architecture, key_heads, how, mask_loss, keep, monkeypatch
):
    """With as many key heads as queries' the projections are the highest of groups of one head."""
    for module in (rows, memory):
        monkeypatch.setattr(module, "chunk_rows", lambda rows, width: 256)
    tokens, (adapters, settings) = 2048, CASES["no MLP"]
    model = model_of(architecture, 3, adapters, 2, tokens, heads=(8, key_heads)).to(torch.bfloat16)
    ids, shape = make_ids(1, tokens), shape_of(model.get_base_model().config)
    labels = ids.clone()
    labels[:, :-128] = -100  # so that the loss is not the peak
    kept, peaks = round(keep * tokens), []
    for groups in (1, 2, key_heads):
        config = {"recompute": how, "keep": keep, "block_size": 8, "mask_loss": mask_loss}
        handle = lemo.enable(
            model, lemo.LemoConfig(**config, scorer="random", keep_last=16, head_groups=groups)
        )
        with PeakOfTensors(model) as tensors:
            model(input_ids=ids, labels=labels).loss.backward()
        model.zero_grad()
        handle.remove()
        step = step_of(
            shape,
            [tokens],
            [LayerRows(kept, kept)] * shape.layers,
            drops=mask_loss,
            labelled=127 / kept,
            cuda=False,
            head_groups=groups,
            **settings,
        )
        bytes_of = StepMemory(shape, adapters, step)
        # There is no optimizer; sums inside of attention's backward are no tensors.
        predicted = bytes_of.peak([how] * 3) - 2 * adapters.size * adapters.parameters(shape)
        peaks.append((tensors.peak, predicted, 4 * kept * shape.queries // groups))
    for measured, predicted, sums in peaks:
        assert measured <= predicted
        assert predicted - sums < 1.05 * measured
    # Backward of norms of the heads takes more than groups spare.
    assert (peaks[2][0] < peaks[0][0]) == (architecture == "llama")


def planner_of(groups, **overrides):
    shape = ModelShape(4, 512, 512, 8, 4, 64, 1000, **overrides)
    adapters, kept = Adapters(size=2), [LayerRows(2**16, 2**16)] * 4
    step = step_of(shape, [2**16], kept, labelled=1e-3, head_groups=groups)
    return Planner(StepMemory(shape, adapters, step), StepTime(shape, adapters, step, NOMINAL))


def test_the_planner_groups_heads_where_memory_asks_for_it():
    planner = planner_of(None)
    whole, grouped = (planner.of(["layer"] * 4, 0, groups).peak for groups in (1, 4))
    limit = (whole + grouped) // 2
    assert grouped < limit < whole
    plan = planner.plan(limit)
    assert plan.head_groups > 1
    assert plan.peak <= limit
    assert planner.plan(10 * whole).head_groups == 1
    assert planner.plan(grouped - 1) is None
    assert planner.least() < 1.001 * grouped  # kept bytes are rounded up
    assert planner_of(1).plan(limit) is None
    # Asked for as they are, the fewest groups that fit.
    assert planner.of(["layer"] * 4, limit).head_groups == plan.head_groups
    assert planner.of(["layer"] * 4, whole).head_groups == 1
    assert planner.of(["layer"] * 4, 0) == planner.smallest(0)
    # Norms of heads take as much.
    assert planner_of(None, head_norms=True).plan(limit) is None
    assert plan_lines(plan)[-1] == f"attention's backward: by {plan.head_groups} groups of heads"
