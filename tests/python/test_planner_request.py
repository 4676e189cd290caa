"""What a request asks of the planner: each of its settings reaches what is planned."""

from dataclasses import replace

import pytest

from lemo.planner.plan import NOMINAL, DoesNotFitError
from lemo.planner.request import Request, adapters_of
from lemo.planner.shape import LINEAR, Adapters, LayerRows, ModelShape, Step
from lemo.settings.base import MOST
from tiny_models import flat_config

pytestmark = pytest.mark.cpu_only

SHAPE = ModelShape(3, 64, 128, 4, 2, 16, 256)
GIB = 2**30


def request(elimination=None, **more):
    config = flat_config(**{"block_size": 64} | (elimination or {}))
    return Request(SHAPE, Adapters(), config.resolved(answers=False), NOMINAL, **more)


def step(asked, tokens=1024):
    return asked.planner(tokens)._memory.step


def test_the_step_of_a_request():
    settings = {"keep": 0.25, "loss_chunk": 128, "head_groups": 2, "scorer": "pooled"}
    settings |= {"select_at": "all", "dense_layers": []}
    more = {"batch": 2, "size": 4, "autocast": False, "cuda": False, "passes": 3}
    assert step(request(settings, **more)) == Step(
        lengths=(1024, 1024),
        rows=(LayerRows(512, 512),) * 3,
        labels=2048,  # layers keep different rows
        residual_rows=2048,
        size=4,
        autocast=False,
        cuda=False,
        passes=3,
        loss_chunk=128,
        head_groups=2,
        embeds_all=True,
        selections=2,  # of the later layers, whose MLPs keep what their attention keeps
    )
    assert step(request({"keep": 0.25}, processes=2, shards=4)) == Step(
        lengths=(1024,),
        rows=(LayerRows(128, 128),) * 3,
        labels=128,
        residual_rows=128,
        autocast=True,
        head_groups=1,
        processes=2,
        shards=4,
    )
    assert step(request({"group_size": 256})).shifted
    assert not step(request()).shifted


def test_windows_and_groups_shorten_attention():
    def seconds(asked):
        return asked.planner(8192)._time.layer(0, "none")

    shorter = [request(window=128), request({"keep": 1.0, "group_size": 256})]
    for asked, whole in zip(shorter, (request(), request({"keep": 1.0})), strict=True):
        assert seconds(asked) < seconds(whole)


@pytest.mark.parametrize(
    ("settings", "more", "replayed"),
    [
        ({}, {}, True),
        ({"cuda_graphs": "off"}, {}, False),
        ({"select_at": "all"}, {}, False),
        ({}, {"processes": 2}, False),
        ({}, {"shards": 2}, False),
    ],
    ids=str,
)
def test_passes_that_are_replayed(settings, more, replayed):
    plan = request({"keep": 0.5} | settings, **more).planner(1024).plan(GIB)
    assert (plan.graphs > 0) == replayed


def test_long_kernels_are_replayed_where_that_is_asked_for():
    for setting, replayed in (("on", True), ("auto", False)):
        asked = request({"keep": 0.5, "cuda_graphs": setting})
        assert (asked.planner(2**25).plan(2**50).graphs > 0) == replayed


def test_the_longest_window_is_one_of_a_batch():
    """Of so much memory only the number of tokens that lemo takes is the limit."""
    for batch in (1, 3):
        assert request(batch=batch).longest(2**62) == MOST // batch // 16 * 16


def test_the_host_may_be_just_large_enough():
    asked = request({"offload": 1.0, "host_memory": 1.0, "recompute": "layer"})
    needed = asked.planner(1024).of(["layer"] * 3, 0).host
    for missing in (0, 1):
        room = (needed - missing) / GIB
        changed = asked.elimination.model_copy(update={"host_memory": room})
        one = replace(asked, elimination=changed)
        assert one.elimination.host_bytes == needed - missing
        if missing:
            with pytest.raises(DoesNotFitError, match=r"host_memory: expected .* for offload 1\.0"):
                one.check_host(1024)
        else:
            one.check_host(1024)


def test_what_is_advised_could_be_set():
    """Weights are not quantised twice, nor beside products in 8 bits, nor in fp32 on request."""

    def advice(settings=None, gib=2.0, **more):
        asked = request({"keep": 0.5} | (settings or {}), **more)
        large = replace(asked, shape=ModelShape(16, 2048, 8192, 32, 8, 64, 32000))
        return large.advice(4096, round(gib * GIB))

    assert "quantize nf4" in advice()
    assert "quantize nf4" not in advice(size=4)
    assert "quantize nf4" not in advice(quantize="int8")
    assert "quantize nf4" not in advice({"products": "fp8"}, gib=2.6)
    assert "recompute auto" not in advice()


def test_adapters_of_a_run():
    assert adapters_of(8, None) == Adapters(8)
    found = adapters_of(8, ("q_proj", "up_proj"), dropout=True, norms=True)
    assert found == Adapters(8, frozenset(["q_proj", "up_proj"]), dropout=True, norms=True)
    with pytest.raises(ValueError, match=f"some of {', '.join(LINEAR)}, .* got 'lm_head'"):
        adapters_of(8, ("q_proj", "lm_head"))
