"""Bytes that the planner predicts are those that autograd stores, and memory that was measured."""

from dataclasses import replace

import pytest
import torch

import lemo
from common.recorded_steps import predicted_bytes, recorded_steps
from lemo.models.projections import split_low_rank
from lemo.planner.memory import MODES, StepMemory
from lemo.planner.shape import Adapters, LayerRows, ModelShape, shape_of, step_of
from lemo.selection.scorers import RandomScorer
from model_checks import saved_bytes
from planner_cases import CASES, TOKENS, PeakOfTensors, model_of
from quantised_cases import quantise
from tiny_models import config_of, make_ids

pytestmark = pytest.mark.cpu_only


def measured(architecture, mode, adapters, settings, **elimination):
    """(bytes that a layer stores, what the model and the kept sets are)."""
    sizes, layers = [], (2, 5)
    for count in layers:
        model = model_of(architecture, count, adapters, settings.get("size", 2))
        config = {"mask_loss": False, "block_size": 8, "dense_layers": []} | elimination
        handle = lemo.enable(model, config_of(recompute=mode, **config))
        ids = make_ids(1, TOKENS)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.get("autocast", False)):
            sizes.append(saved_bytes(model, {"input_ids": ids, "labels": ids}))
        kept = handle.statistics()[0]
    shape = shape_of(model.get_base_model().config)
    return (sizes[1] - sizes[0]) / (layers[1] - layers[0]), shape, kept


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_bytes_that_a_layer_stores(architecture, case, mode):
    adapters, settings = CASES[case]
    found, shape, _ = measured(architecture, mode, adapters, settings, keep=0.5)
    rows = [LayerRows(TOKENS // 2, TOKENS // 2)] * shape.layers
    step = step_of(shape, [TOKENS], rows, drops=False, cuda=False, **settings)
    assert StepMemory(shape, adapters, step).layer(0, mode).kept == found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [False, True])
def test_bytes_of_pairs_whose_operands_are_split(dropout, mode, monkeypatch):
    """As on a GPU, whose attention stores what the CPU's stores."""
    adapters, more = Adapters(8, apart=True, dropout=dropout), []
    for is_split in (False, True):
        monkeypatch.setattr(
            split_low_rank, "_has_fp32_sums", lambda device, is_split=is_split: is_split
        )
        found, shape, _ = measured("llama", mode, adapters, {}, keep=0.5)
        rows = [LayerRows(TOKENS // 2, TOKENS // 2)] * shape.layers
        step = step_of(shape, [TOKENS], rows, drops=False, cuda=is_split)
        assert adapters.are_split(step) == is_split
        more.append(found - StepMemory(shape, adapters, step).layer(0, mode).kept)
    assert more == [0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_products_in_8_bits_store_nothing_more_of_a_layer(mode):
    adapters, settings = CASES["all"]
    found, shape, _ = measured("llama", mode, adapters, settings, keep=0.5, products="fp8")
    rows = [LayerRows(TOKENS // 2, TOKENS // 2)] * shape.layers
    step = step_of(shape, [TOKENS], rows, drops=False, cuda=False, **settings)
    plain, fp8 = StepMemory(shape, adapters, step), StepMemory(shape, adapters, step, fp8=True)
    assert fp8.layer(0, mode).kept == plain.layer(0, mode).kept == found
    assert fp8.layer(0, mode).backward > plain.layer(0, mode).backward
    # A byte for each weight but those of queries, keys and the last MLP, and none beside weights
    # that have one byte: of these, those of the others alone.
    values_output = shape.layers * shape.hidden * (shape.keys + shape.queries)
    mlps = (shape.layers - 1) * 3 * shape.hidden * shape.width
    assert fp8.weights - plain.weights == values_output + mlps
    of_mlp = shape.mlp_parameters()
    for left_out in ((), (of_mlp,)):
        partly = replace(shape, plain=left_out)
        alone = StepMemory(partly, adapters, step, "float8", fp8=True)
        copied = alone.weights - StepMemory(partly, adapters, step, "float8").weights
        assert copied == sum(left_out)


@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_a_layer_whose_sub_blocks_keep_other_rows(mode):
    adapters, settings = CASES["all"]
    own = {"keep": 0.25, "keep_mlp": 0.5, "select_at": "all"}
    found, shape, _ = measured("llama", mode, adapters, settings, **own)
    rows = [LayerRows(TOKENS // 4, TOKENS // 2)] * shape.layers
    step = step_of(shape, [TOKENS], rows, drops=False, cuda=False, **settings)
    # The sets themselves: rows of either, positions of attention's, and its sequences' bounds.
    index = 8 * (TOKENS // 4) + 4 * (TOKENS // 2) + 8
    stored = StepMemory(shape, adapters, step).layer(0, mode).kept
    assert stored + (index if mode == "none" else 0) == found


@pytest.mark.parametrize(
    ("case", "modes", "keep", "width", "drops"),
    [
        *(("all", [mode] * 4, keep, 384, True) for mode in MODES for keep in (1.0, 0.5)),
        *(("all", ["layer", "selective", "none", "none"], keep, 384, True) for keep in (1.0, 0.5)),
        # Attention takes more than such an MLP.
        *(("all", [mode] * 4, 0.5, 64, True) for mode in MODES),
        # Products of these adapters read copies.
        *((case, [mode] * 4, 0.5, 384, True) for mode in MODES for case in ("apart", "dropout")),
        ("autocast", ["layer"] * 4, 0.5, 384, True),
        # The loss counts rows that no layer keeps.
        *(("all", [mode] * 4, keep, 384, False) for mode in MODES for keep in (0.5, 0.25)),
    ],
    ids=str,
)
def test_the_highest_bytes_of_a_step(case, modes, keep, width, drops):
    """Of tensors: the sums inside of attention's backward are none, and are a part of it."""
    tokens, (adapters, settings) = 2048, CASES[case]
    model = model_of("llama", len(modes), adapters, 2, tokens, width=width)
    kept_rows = {"keep": keep, "block_size": 8, "mask_loss": drops}
    lemo.enable(model, lemo.LemoConfig(recompute=modes, **kept_rows))
    ids = make_ids(1, tokens)
    with PeakOfTensors(model) as tensors:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.get("autocast", False)):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    shape, kept = shape_of(model.get_base_model().config), round(keep * tokens)
    rows = [LayerRows(kept, kept)] * shape.layers
    more = {"drops": drops, "all_count": not drops, "cuda": False}
    step = step_of(shape, [tokens], rows, **more, **settings)
    memory = StepMemory(shape, adapters, step)
    # There is no optimizer.
    predicted = memory.peak(modes) - 2 * adapters.size * adapters.parameters(shape)
    sums = 4 * kept * shape.queries
    assert tensors.peak <= predicted
    assert predicted - sums < 1.05 * tensors.peak


ROWS = 2048
OWN_SETS = {"select_at": "all", "dense_layers": [], "mask_loss": False}
HALF = {"keep": 0.5, "dense_layers": []}
# Modes, rows of attention and of the MLP, settings, what the step has of them, sizes of the model.
OTHER_STEPS = {
    **{
        f"{rows} of {ROWS} rows, {mode}": (
            [mode] * 4,
            rows,
            {"keep": rows[0] / ROWS, "keep_mlp": rows[1] / ROWS} | OWN_SETS,
            {"drops": False, "all_count": True},
            {},
        )
        for mode in MODES
        for rows in ((512, 1024), (1024, 512))
    },
    **{
        f"groups of heads, {mode}": (
            [mode] * 4,
            (1024, 1024),
            HALF | {"head_groups": 2},
            {"head_groups": 2},
            {"width": 768},
        )
        for mode in MODES[1:]
    },
    "all tokens embedded": (
        ["layer"] * 2,
        (64, 64),
        {"keep": 1 / 32, "dense_layers": []},
        {"embeds_all": True},
        {"heads": (8, 2)},
    ),
}


@pytest.mark.parametrize("case", OTHER_STEPS)
def test_the_highest_bytes_of_other_steps(case, monkeypatch):
    modes, rows, config, more, sizes = OTHER_STEPS[case]
    adapters = CASES["all"][0]
    # No scorer takes memory of its own.
    monkeypatch.setattr(RandomScorer, "reads_residual", "embeds_all" in more)
    model = model_of("llama", len(modes), adapters, 2, ROWS, **{"width": 384} | sizes)
    lemo.enable(model, config_of(recompute=modes, block_size=8, scorer="random", **config))
    ids = make_ids(1, ROWS)
    with PeakOfTensors(model) as tensors:
        model(input_ids=ids, labels=ids).loss.backward()
    shape = shape_of(model.get_base_model().config)
    step = step_of(shape, [ROWS], [LayerRows(*rows)] * len(modes), cuda=False, **more)
    predicted = StepMemory(shape, adapters, step).peak(modes)
    # There is no optimizer.
    predicted -= 2 * adapters.size * adapters.parameters(shape)
    sums = 4 * rows[0] * shape.queries
    assert tensors.peak <= predicted
    assert predicted - sums < 1.05 * tensors.peak


def in_nf4(model):
    quantise(model, "nf4")


def by_torchao(name):
    def put_in(model):
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model.layers, getattr(torchao, name)())
        model.requires_grad_(False)

    return put_in


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("way", "put_in"),
    [
        ("nf4", in_nf4),
        ("float8", by_torchao("Float8WeightOnlyConfig")),
        ("torchao_int", by_torchao("Int8WeightOnlyConfig")),
    ],
)
def test_the_highest_bytes_over_quantised_weights(way, put_in, mode):
    """A matrix is made plain for a moment; torchao's float8 by way of another one in fp32."""
    tokens, (adapters, _), modes = 512, CASES["all"], [mode] * 3
    model = model_of("llama", len(modes), adapters, 2, tokens, width=1024, quantise=put_in)
    lemo.enable(model, lemo.LemoConfig(keep=0.5, block_size=8, recompute=modes))
    ids = make_ids(1, tokens)
    with PeakOfTensors(model) as tensors:
        model(input_ids=ids, labels=ids).loss.backward()
    shape, kept = shape_of(model.get_base_model().config), tokens // 2
    step = step_of(shape, [tokens], [LayerRows(kept, kept)] * shape.layers, cuda=False)
    # There is no optimizer. Scales of rows are small beside real rows.
    predicted = StepMemory(shape, adapters, step, way).peak(modes)
    predicted -= 2 * adapters.size * adapters.parameters(shape)
    sums = 4 * kept * shape.queries
    scales = 4 * shape.layers * sum(each.outputs for each in shape.linears())
    assert tensors.peak <= predicted + scales
    assert predicted - sums < 1.05 * tensors.peak


def test_a_given_chunk_of_the_loss_is_taken_as_it_is():
    """Only those that lemo chooses on a GPU are powers of two; none has more rows than count."""
    shape = ModelShape(2, 64, 128, 4, 2, 16, 1000)

    def loss(chunk):
        step = step_of(shape, [4096], [LayerRows(3000, 3000)] * 2, loss_chunk=chunk)
        return StepMemory(shape, Adapters(), step).loss

    assert loss(1500) - loss(1100) == 400 * 1000 * 2
    assert loss(10**6) == loss(3000)


def test_memory_that_was_measured_on_gpus():
    """Three models, 16384 to 1048576 tokens, H100 and H200; nothing is fitted."""
    steps = recorded_steps()
    assert len(steps) > 80
    assert {step.model for step in steps} == {"8B", "28M", "135M"}
    for step in steps:
        predicted = predicted_bytes(step) / 2**30
        assert predicted == pytest.approx(step.peak_gib, rel=0.05), step.name
