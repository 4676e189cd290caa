"""Plans for several GPUs: a process's bytes against a count, times, and the ways to use them."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

import lemo
import multi_gpu
from lemo.planner.combinations import combination_lines, combinations
from lemo.planner.memory import MODES, StepMemory
from lemo.planner.plan import NOMINAL
from lemo.planner.request import Request
from lemo.planner.shape import Adapters, LayerRows, shape_of, step_of, weight_bytes
from lemo.planner.timing import StepTime
from planner_cases import CASES
from planner_group_cases import TOKENS, all_highest, sized_model
from processes import run

pytestmark = pytest.mark.cpu_only

GIB = 2**30
SHAPE = shape_of(
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
)


def request(keep=0.5, **more):
    elimination = lemo.LemoConfig(keep=keep, **more.pop("elimination", {}))
    return Request(SHAPE, Adapters(), elimination.resolved(answers=False), NOMINAL, **more)


def test_the_highest_bytes_of_a_process(tmp_path):
    cases = [([mode] * 4, keep, 384, (4, 2)) for mode in MODES for keep in (1.0, 0.5)]
    # Keys and values of the others take more than such an MLP.
    narrow = [([mode] * 2, 1.0, 64, heads) for mode in MODES for heads in ((4, 4), (4, 2))]
    found = run(2, all_highest, tmp_path, cases + narrow)
    adapters, settings = CASES["all"]
    for (modes, keep, *sizes), *peaks in zip(cases + narrow, *found, strict=True):
        shape = shape_of(sized_model(len(modes), *sizes).get_base_model().config)
        kept = round(keep * TOKENS)
        rows = [LayerRows(kept, kept)] * shape.layers
        step = step_of(shape, [TOKENS], rows, cuda=False, **settings).shared_out(2)
        memory = StepMemory(shape, adapters, step)
        predicted = memory.peak(modes) - 2 * adapters.size * adapters.parameters(shape)
        sums = 4 * kept // 2 * shape.queries
        assert max(peaks) <= predicted
        assert predicted - sums < (1.05 if sizes[0] > 64 else 1.15) * max(peaks)


def test_a_process_has_the_larger_share_of_what_cannot_be_shared_out_evenly():
    step = step_of(SHAPE, [100], [LayerRows(10, 10)] * SHAPE.layers).shared_out(4)
    assert (step.labels, step.residual_rows, *step.rows[0]) == (3, 3, 3, 3)


def test_processes_share_the_work_and_send_what_the_page_says():
    alone, shared = (shared_time(size, 131072).layer(0, "layer") for size in (1, 4))
    # What is sent hides, but for the first of four parts.
    rows = 131072 // 4
    time = shared_time(4, 131072)
    options = multi_gpu.parse_arguments(["context", "--tokens", "131072"])
    of_layer = time.exchanged(rows, "layer")
    assert of_layer == 4 * 3 / 4 * 131072 * 2 * 1024 * 2
    assert of_layer == exchanged(options, 1.0, 4)
    assert shared - of_layer / NOMINAL.between / 4 == pytest.approx(alone / 4)
    # Where little is computed the exchange is all that counts.
    slow = replace(NOMINAL, between=1e6)
    sent = time.exchanged(rows, "none") / 1e6
    assert shared_time(4, 131072, slow).layer(0, "none") == pytest.approx(sent, rel=0.05)


def shared_time(size, tokens, rates=NOMINAL):
    rows = [LayerRows(tokens, tokens)] * SHAPE.layers
    return StepTime(SHAPE, Adapters(), step_of(SHAPE, [tokens], rows).shared_out(size), rates)


def exchanged(options, keep, size):
    """As the benchmark of two GPUs has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_gpu.dist, "get_world_size", lambda: size)
        return multi_gpu.exchanged(options, keep)


def test_weights_are_cut():
    whole = request().planner(32768)
    for shards in (2, 8):
        cut = replace(request(), shards=shards).planner(32768)
        saved = weight_bytes(SHAPE, 2) * (shards - 1) / shards
        head, layer = 128256 * 4096 * 2, (weight_bytes(SHAPE, 2) - 2 * 128256 * 4096 * 2) / 32
        expected = saved - head - 3 * layer
        assert whole.weights - cut.weights == pytest.approx(expected, rel=0.05)
    # Long steps hide what is sent; short ones wait for it.
    slow = replace(NOMINAL, between=1e9)
    sent = 2 * weight_bytes(SHAPE, 2) * 7 / 8 / 1e9
    short = replace(request(), shards=8, rates=slow).planner(64).of(["none"] * 32, 0)
    assert short.seconds == pytest.approx(sent, rel=0.15)
    hidden = replace(request(), shards=8).planner(131072).of(["none"] * 32, 0)
    plain = request().planner(131072).of(["none"] * 32, 0)
    assert hidden.seconds == pytest.approx(plain.seconds, rel=0.002)


def test_ways_to_use_eight_gpus():
    found = combinations(request(1.0), 131072, 8, 133 * GIB)
    assert [each.rate for each in found] == sorted((each.rate for each in found), reverse=True)
    assert {(each.groups, each.size, each.shards) for each in found} == {
        (8 // size, size, shards) for size in (1, 2, 4, 8) for shards in (1, 8)
    }
    # One GPU has to compute again what eight can store.
    assert found[0].size == 8
    assert found[-1].size == 1
    short = combinations(request(0.25), 8192, 8, 133 * GIB)[0]
    assert (short.groups, short.size, short.shards) == (8, 1, 1)
    assert short.tokens == 8 * 8192
    lines = list(combination_lines(found, timed=True))
    assert lines[0].startswith(
        "1 window at a time, each shared out by 8 GPUs (--context-parallel 8): "
    )
    assert lines[0].endswith(" tokens a second")
    found += combinations(request(1.0), 131072, 2, 133 * GIB)
    for each, line in zip(found, combination_lines(found, timed=True), strict=True):
        assert line.startswith(f"{each.groups} window{'' if each.groups == 1 else 's'} at a time")
        assert (f"--context-parallel {each.size}" in line) == (each.size > 1)
        assert ("--shard" in line) == (each.shards > 1)
    small = combinations(request(1.0), 131072, 8, 12 * GIB)
    assert [each.plan for each in small if each.shards == 1] == [None] * 4
    assert list(combination_lines(small, timed=True))[-1].endswith(": does not fit")
    assert small[0].plan is not None
    assert [each.rate for each in small] == [
        0.0 if each.plan is None else each.tokens / each.plan.seconds for each in small
    ]
    # Of ways that are as fast the one with the least traffic and settings comes first.
    none = combinations(request(1.0), 131072, 8, GIB)
    assert [(each.shards, each.size) for each in none] == [
        (shards, size) for shards in (1, 8) for size in (1, 2, 4, 8)
    ]
    (alone,) = combinations(request(1.0), 131072, 1, 133 * GIB)
    assert (alone.groups, alone.size, alone.shards) == (1, 1, 1)


def test_all_sequences_of_all_passes_count():
    found = combinations(request(0.25, batch=2, passes=3), 8192, 4, 133 * GIB)
    assert {each.size: each.tokens for each in found} == {
        1: 4 * 2 * 3 * 8192,
        2: 2 * 2 * 3 * 8192,
        4: 1 * 2 * 3 * 8192,
    }


def test_ways_that_are_refused_are_not_proposed():
    def sizes(asked):
        found = combinations(asked, 65536, 4, 133 * GIB)
        return {(each.size, each.shards) for each in found}

    everything = {(size, shards) for size in (1, 2, 4) for shards in (1, 4)}
    assert sizes(request(quantize="nf4")) == everything
    assert sizes(request(quantize="int8")) == {(1, 1), (2, 1), (4, 1)}
    assert sizes(request(elimination={"host_memory": 8.0})) == {(1, 1)}
    for layerwise in ({"group_size": 4096}, {"keep_mlp": 0.25}, {"dense_layers": [0]}):
        asked = request(elimination={"layerwise": layerwise})
        assert sizes(asked) == {(1, 1), (1, 4)}, layerwise
    assert sizes(request(elimination={"head_groups": 2})) == {(1, 1), (1, 4)}
    assert (4, 1) in sizes(request(elimination={"head_groups": 1}))
    fp8 = request(elimination={"products": "fp8"})
    assert all(shards == 1 for _, shards in sizes(fp8))
