"""Rates of a machine: how they follow from times that are given, and which ones are stored."""

import dataclasses
import json

import pytest
import torch

from lemo.planner.shape import ModelShape
from lemo.planner.timing import Rates
from lemo.training import calibration

pytestmark = pytest.mark.cpu_only

# Distinct products: 64 to 64, 64 to 32, 64 to 128 and 128 to 64 features.
SHAPE = ModelShape(4, 64, 128, 4, 2, 16, 256)
MULTIPLICATIONS = 64 * 64 + 64 * 32 + 2 * 64 * 128
CPU, ROWS = torch.device("cpu"), 8
RATES = Rates(1e12, 2e12, 1e12, 1e11, 1e-5)


@pytest.fixture
def taking(monkeypatch):
    """Runs take the times that are given, one after the other."""
    monkeypatch.setattr(calibration, "_ROWS", {"cpu": ROWS})
    monkeypatch.setattr(calibration, "_ELEMENTS", {"cpu": 1 << 10})
    monkeypatch.setattr(calibration, "_LINK", {"cpu": 1 << 12})

    def take(*times):
        left = iter(times)

        def seconds(run, device):
            run()
            return next(left)

        monkeypatch.setattr(calibration, "_seconds", seconds)

    return take


def test_bytes_that_are_read_and_written(taking):
    taking(0.5)
    assert calibration._bandwidth(CPU, torch.bfloat16) == 3 * (1 << 10) / 0.5
    taking(0.25, 0.5)
    assert calibration._link(CPU) == (1 << 12) / 0.5
    taking(0.5, 0.25)
    assert calibration._link(CPU) == (1 << 12) / 0.5


@pytest.mark.parametrize(
    ("measure", "moved"),
    [
        # Inputs and results, of two bytes; in 8 bits inputs have one.
        (calibration._products, ROWS * (2 * (64 + 64 + 64 + 128) + 2 * (64 + 32 + 128 + 64))),
        (calibration._fp8_products, ROWS * (64 + 64 + 64 + 128 + 2 * (64 + 32 + 128 + 64))),
    ],
    ids=["bf16", "fp8"],
)
def test_products_without_what_they_move(measure, moved, taking):
    operations = 2 * ROWS * MULTIPLICATIONS
    taking(*[0.5] * 4)
    rate = measure(SHAPE, CPU, torch.bfloat16, moved / 0.75)
    assert rate == pytest.approx(operations / (2 - 0.75))
    # A bandwidth that is measured too low does not make them faster than four times.
    taking(*[0.5] * 4)
    assert measure(SHAPE, CPU, torch.bfloat16, moved / 1.9) == pytest.approx(operations / 0.5)


@pytest.mark.parametrize(("both", "backward"), [(0.5, 0.375), (0.1, 0.125)])
def test_attention_in_both_passes(both, backward, taking):
    taking(0.125, both)
    pairs = 64 * ROWS * ROWS / 2  # of the features of all queries, half of them visible
    found = calibration._attention(SHAPE, CPU, torch.float32)
    assert found == pytest.approx((4 * pairs / 0.125, 10 * pairs / backward))


@pytest.mark.parametrize(("times", "layer"), [((0.25, 1.25), 0.125), ((0.5, 0.5), 0.05 / 8)])
def test_an_operation_of_the_host(times, layer, taking, monkeypatch):
    taking(*times)
    monkeypatch.setattr(calibration, "_small_step", lambda layers, device, dtype: int)
    # Of a layer whose attention has adapters: itself, 4 adapters, 2 stacks, one of several.
    operations = 31 + 4 * 3 + 2 * 3 + 3
    assert calibration._launch(CPU, torch.float32) == pytest.approx(layer / operations)


def test_a_gpu_is_measured_under_load_and_a_cpu_at_its_best(monkeypatch):
    counts = []

    def of_each(seconds):
        def time(run, device, count=1):
            counts.append(count)
            return count * next(seconds)

        monkeypatch.setattr(calibration, "_time", time)

    of_each(iter([9.0, 0.1, 0.2, 0.05]))
    assert calibration._seconds(int, torch.device("cuda")) == pytest.approx(0.05)
    assert counts == [1, 1, 3, 3]  # a quarter of a second
    of_each(iter([0.01, 0.5, 0.3, 0.2, 0.4, 0.6]))
    assert calibration._seconds(int, CPU) == pytest.approx(0.2)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "FOLDER", tmp_path)
    return tmp_path / "rates.json"


def test_rates_are_added_to_others(cache):
    other = ModelShape(4, 128, 128, 4, 2, 16, 256)
    for shape, rates in ((SHAPE, RATES), (other, Rates(1, 2, 3, 4, 5))):
        calibration._store(calibration._key(shape, CPU, torch.float32), rates)
    assert calibration.stored_rates(SHAPE, CPU, torch.float32) == RATES
    assert calibration.stored_rates(other, CPU, torch.float32) == Rates(1, 2, 3, 4, 5)


def test_rates_that_lack_some_do_not_count(cache):
    key = calibration._key(SHAPE, CPU, torch.float32)
    calibration._store(key, RATES)
    stored = json.loads(cache.read_text())
    del stored[key]["between"]
    cache.write_text(json.dumps(stored))
    assert calibration.stored_rates(SHAPE, CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch.__version__", "0.1"),
        ("platform.node", lambda: "another"),
        ("torch.get_num_threads", lambda: 77),
        ("_C.build_info", lambda: {"version": "0.0.0"}),
        ("_MANNER", -1),
    ],
)
def test_rates_of_other_machines_and_versions_do_not_count(name, value, cache, monkeypatch):
    calibration._store(calibration._key(SHAPE, CPU, torch.float32), RATES)
    assert calibration.stored_rates(SHAPE, CPU, torch.float32) == RATES
    monkeypatch.setattr(f"lemo.training.calibration.{name}", value)
    assert calibration.stored_rates(SHAPE, CPU, torch.float32) is None


@pytest.mark.parametrize("name", ["hidden", "width", "heads", "key_heads", "head_size"])
def test_rates_of_products_and_heads_of_other_sizes_do_not_count(name, cache):
    calibration._store(calibration._key(SHAPE, CPU, torch.float32), RATES)
    other = dataclasses.replace(SHAPE, **{name: 2 * getattr(SHAPE, name)})
    assert calibration.stored_rates(other, CPU, torch.float32) is None
    # As many more layers have the same rates.
    deeper = dataclasses.replace(SHAPE, layers=2 * SHAPE.layers)
    assert calibration.stored_rates(deeper, CPU, torch.float32) == RATES


def test_rates_that_are_measured_take_the_place_of_those_that_lack_some(cache, monkeypatch):
    key = calibration._key(SHAPE, CPU, torch.float32)
    cache.write_text(json.dumps({key: {"products": 1.0}}))
    monkeypatch.setattr(calibration, "measure", lambda *_: RATES)
    assert calibration.calibrated(SHAPE, CPU, torch.float32) == RATES
    assert calibration.stored_rates(SHAPE, CPU, torch.float32) == RATES


def test_each_rate_is_what_was_measured_for_it(monkeypatch):
    names = {"_products": 1.0, "_attention": (2.0, 3.0), "_bandwidth": 4.0, "_launch": 5.0}
    for name, rate in (names | {"_link": 6.0}).items():
        monkeypatch.setattr(calibration, name, lambda *_, rate=rate: rate)
    assert calibration.measure(SHAPE, CPU, torch.float32) == Rates(
        products=1.0, attention=2.0, attention_backward=3.0, bytes=4.0, launch=5.0, link=6.0
    )
