"""Memory and time of passes that are replayed as CUDA graphs, against measured ones."""

import dataclasses

import pytest

from common import records
from common.recorded_steps import EARLIER
from lemo.planner.memory import MODES, StepMemory
from lemo.planner.plan import MARGIN, NOMINAL, GraphRules, HostRules, Planner
from lemo.planner.shape import LINEAR, Adapters, LayerRows, ModelShape, step_of
from lemo.planner.timing import OPERATIONS, StepTime

pytestmark = pytest.mark.cpu_only

# Of benchmarks/small_models.py.
SHAPES = {
    "28M": ModelShape(14, 384, 1024, 6, 2, 64, 16384, tied=True),
    "135M": ModelShape(30, 576, 1536, 9, 3, 64, 49152, tied=True),
}
ADAPTERS = Adapters(16, size=2)
GIB = 2**30


# Before layers that read the same rows were one node.
FIRST = "6f4e780"
BEFORE = (FIRST, "1e0435c")


def parts(name="135M", keep=0.5, tokens=16384, adapters=ADAPTERS, started=OPERATIONS, **settings):
    shape, rows = SHAPES[name], int(keep * tokens)
    quantize = settings.pop("quantize", None)
    step = step_of(shape, (tokens,), [LayerRows(rows, rows)] * shape.layers, **settings)
    memory = StepMemory(shape, adapters, step, quantize)
    return memory, StepTime(shape, adapters, step, NOMINAL, started=started)


WHERE_SHORT, ALWAYS = GraphRules(), GraphRules(True)


def planner(*arguments, rules=WHERE_SHORT, host=None, **settings):
    return Planner(*parts(*arguments, **settings), host=host or HostRules(), graphs=rules)


def measured():
    """Of the 135M shape: where the host bounds a replayed step, as in the 28M, its time is not
    predicted well (docs/design/planner.md)."""
    rows = records.read(records.RESULTS / "h200_finetune.jsonl", "small model step")
    shapes = [(row["shape"]["model"], row["shape"]["graphs"]) for row in rows]
    return [row for row, shape in zip(rows, shapes, strict=True) if shape == ("135M", "on")]


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"keep {row['shape']['keep']}")
def test_what_graphs_held_and_how_long_steps_took(row):
    shape = row["shape"]
    arguments = shape["model"], shape["keep"], shape["tokens"]
    # As many operations as the measured steps had.
    before = row["commit"] in BEFORE
    started = EARLIER if before else OPERATIONS
    plan = planner(*arguments, started=started).plan(140 * GIB)
    assert plan.modes == ("none",) * len(plan.modes)
    # Later ones have been found to hold up to 4% more; the cause is not known.
    error = 0.02 if row["commit"] == FIRST else 0.05
    assert plan.graphs == pytest.approx(row["graph_gib"] * GIB, rel=error)
    assert plan.seconds == pytest.approx(row["ours"] / 1e3, rel=0.05)
    plain = planner(*arguments, rules=None, started=started).plan(140 * GIB)
    assert plain.graphs == 0
    assert plain.seconds > (2 if before else 1.5) * plan.seconds


def test_there_is_something_measured():
    assert len(measured()) >= 2


def test_as_much_memory_as_graphs_hold_stays_free():
    """Less and less memory: more is recomputed, then there are no graphs, then nothing fits."""
    plans = []
    for limit in range(16 * GIB, 0, -GIB // 8):
        plan, plain = (planner(rules=rules).plan(limit) for rules in (WHERE_SHORT, None))
        assert (plan is None) == (plain is None)
        if plan is None:
            break
        assert plan.limit == limit
        assert plan.peak + plan.graphs <= limit
        assert plan.seconds <= plain.seconds
        plans.append(plan)
    assert set(plans[0].modes) == {"none"}
    recomputed = next(i for i, plan in enumerate(plans) if set(plan.modes) != {"none"})
    assert plans[recomputed].graphs
    assert plans[-1].graphs == 0
    without = next(i for i, plan in enumerate(plans) if not plan.graphs)
    assert without > recomputed
    # Without graphs nothing has to be recomputed there.
    plain = planner(rules=None).plan(plans[recomputed].limit)
    assert set(plain.modes) == {"none"}


def test_always_takes_the_memory_of_one_pass():
    memory, _ = parts()
    none = ["none"] * 30
    # Copies of inputs, and gradients that graphs write.
    limit = memory.with_graphs().peak(none)
    assert 0 < limit - memory.peak(none) < memory.peak(none) / 50
    limit = round(1.01 * limit / (1 - MARGIN))  # bytes are rounded up
    assert planner(rules=ALWAYS).plan(limit).modes == tuple(none)
    assert set(planner().plan(limit).modes) != {"none"}


@pytest.mark.parametrize("more", [0, GIB])
def test_what_graphs_copy_is_a_part_of_the_highest_bytes(more):
    """Also beside bytes that were measured in place of those that are predicted."""
    memory, time = parts()
    plan = Planner(memory, time, memory.fixed + more, graphs=ALWAYS).plan(140 * GIB)
    assert plan.graphs
    assert plan.peak == memory.with_graphs().peak(plan.modes) + more
    assert plan.peak - more > memory.peak(plan.modes)


@pytest.mark.parametrize(
    "settings",
    [
        {"cuda": False},
        {"adapters": Adapters(16, norms=True)},
        {"quantize": "int8"},
        {"host": HostRules(GIB)},
        {"tokens": 2**20},
        {"rules": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_captured(settings):
    assert planner(**settings).plan(140 * GIB).graphs == 0


def test_long_kernels_are_captured_where_that_is_asked_for():
    assert planner(tokens=2**20).plan(140 * GIB).graphs == 0
    assert planner(tokens=2**20, rules=ALWAYS, keep=0.25).plan(140 * GIB).graphs > 0


def test_recomputed_layers_with_dropout_are_not_captured():
    adapters = dataclasses.replace(ADAPTERS, dropout=True)
    memory, _ = parts(adapters=adapters)
    assert memory.capturable(True) == MODES[:1]
    assert planner(adapters=adapters).plan(140 * GIB).graphs
    assert planner(adapters=adapters).plan(140 * GIB, ["layer"] * 30).graphs == 0
    short = planner(adapters=adapters).plan(7 * GIB)
    assert short.graphs == 0


def test_given_modes():
    given = planner().given(["layer"] * 30, 140 * GIB)
    assert given.graphs
    assert set(given.modes) == {"layer"}
    assert planner().given(["layer"] * 30, GIB // 8).graphs == 0
    assert len(LINEAR) == 7
