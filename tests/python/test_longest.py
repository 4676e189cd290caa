"""Searches for the longest window, steps of long windows as they are planned, and their tables."""

import json
from types import SimpleNamespace

import pytest
import torch

import comparison_longest
import longest
import longest_page
from common.models import config_of_shape, random_llama, with_lora
from common.planned import settings_of
from lemo import LemoConfig, enable
from lemo.models import decoder
from lemo.models.unit import Unit
from lemo.planner.plan import NOMINAL, Planner
from lemo.planner.request import Request
from lemo.planner.shape import Adapters, shape_of
from lemo.training import calibration

pytestmark = pytest.mark.cpu_only

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LIMITS = {"short": 8192, "most": 1048576, "trials": 4, "step_limit": 60.0}


# --- the search


def searched(most, weights, growth, usable, limits=LIMITS):
    """(trials, what ends them) of a contender whose memory grows by `growth` GiB for 8192 tokens,
    and which in truth trains `most` tokens."""
    peaks, seconds = {}, {}
    for _ in range(20):
        tokens, bound = comparison_longest.next_length(peaks, seconds, usable, limits)
        if tokens is None or tokens in peaks:
            return peaks, bound
        peaks[tokens] = None if tokens > most else weights + growth * tokens / 8192
        if peaks[tokens] is not None:
            seconds[tokens] = (tokens / 8192) ** 1.5
    raise AssertionError(f"no end: {peaks}")


@pytest.mark.parametrize(
    ("most", "weights", "growth", "usable"),
    [
        (22000, 15, 3.1, 23.25),  # as predicted
        (24000, 15, 3.1, 23.25),  # more than predicted
        (20000, 15, 3.1, 23.25),  # less
        (85000, 15, 3.1, 47.25),
        (9500, 15, 7.0, 23.25),  # less than twice the first length
        (3000, 15, 9.0, 23.25),  # less than the first length
    ],
)
def test_a_length_that_trains_lies_close_to_one_that_does_not(most, weights, growth, usable):
    limits = LIMITS | {"trials": 8}
    peaks, bound = searched(most, weights, growth, usable, limits)
    trained = max(tokens for tokens, peak in peaks.items() if peak is not None)
    failed = min(tokens for tokens, peak in peaks.items() if peak is None)
    assert trained <= most < failed
    assert failed <= max(comparison_longest.CLOSE * trained, trained + comparison_longest.GRAIN)
    assert bound == "memory"
    assert len(peaks) <= 9


def test_a_search_ends_where_steps_take_too_long_or_nothing_trains():
    peaks, bound = searched(10**6, 15, 0.5, 100.0, LIMITS | {"step_limit": 20.0, "trials": 9})
    assert bound == "time"
    assert max(peaks) <= 8192 * 20  # by the square of the length, of steps that grow less
    peaks, _ = searched(100, 15, 9.0, 16.0)
    assert set(peaks.values()) == {None}


def options(*arguments):
    return comparison_longest.parse_arguments(["--memory", "24", "--commit", "abc", *arguments])


class FakeWorker:
    """The first process runs out of memory at 24576 tokens; the second ends the search."""

    def __init__(self, _script, settings, _environment, _log):
        self.settings = settings

    def ask(self, question, _seconds):
        known = json.loads(question)
        if self.settings["contender"] == "liger":
            return {"failed": "ImportError: no liger"}
        if not known:
            trials = [[8192, 18.1, 1.0], [16384, 21.2, 2.5], [24576, None, None]]
            return {"trials": trials, "bounded_by": "memory", "over": False}
        assert known[-1] == [24576, None, None]
        return {"trials": [[23552, 23.0, 4.0]], "bounded_by": "memory", "over": True, "host_gib": 3}

    def close(self):
        pass

    end = close

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_new_process_goes_on_where_memory_ran_out(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison_longest, "Worker", FakeWorker)
    stack = SimpleNamespace(enter_context=lambda worker: worker)
    search = comparison_longest.Search(options("--logs", str(tmp_path)), stack)
    row = search.row("checkpointing")
    wanted = {"tokens": 23552, "too_long": 24576, "step_s": 4.0, "peak_gib": 23.0, "host_gib": 3}
    assert row.items() >= wanted.items()
    row = search.row("liger")
    assert (row["tokens"], row["failed"]) == (None, "ImportError: no liger")


def test_trials_of_one_process(monkeypatch):
    """A tiny model trains; what is above the memory there is counts as out of memory."""
    settings = {"contender": "checkpointing", "shape": "tiny", "layers": None, "device": "cpu"}
    settings |= {"short": 1024, "most": 4096, "trials": 4, "step_limit": 1000.0}
    found = comparison_longest.tried(settings | {"memory": 1e3}, [])
    assert [trial[0] for trial in found["trials"]] == [1024, 2048, 4096]
    assert found["over"]
    found = comparison_longest.tried(settings | {"memory": 1e-3}, [])
    assert found["trials"] == [[1024, None, None]]
    assert not found["over"]


# --- planned steps


def request_of(keep, **more):
    shape = shape_of(config_of_shape("tiny", 2048))
    elimination = LemoConfig(keep=keep, **more).resolved(answers=False)
    adapters = Adapters(8, frozenset(TARGETS), size=2)
    return Request(shape, adapters, elimination, NOMINAL, autocast=False, cuda=False)


def test_a_step_does_all_that_its_plan_says(monkeypatch):
    groups = []

    def unit(*parts):
        groups.append(parts[3])
        return Unit(*parts)

    monkeypatch.setattr(decoder, "Unit", unit)
    request = request_of(0.5, host_memory=0.01)
    plan = request.planner(2048).smallest(1)
    assert plan.head_groups > 1
    assert plan.host
    config = request.elimination.model_copy(update=settings_of(plan))
    model = with_lora(random_llama(config_of_shape("tiny", 2048), "cpu"), 8, TARGETS).train()
    handle = enable(model, LemoConfig(**config.model_dump()))
    ids = torch.randint(0, 512, (1, 2048))
    model(input_ids=ids, labels=ids).loss.backward()
    assert set(groups) == {plan.head_groups}
    assert handle.path.forward.offload.pool is not None
    assert (config.recompute, config.offload) == (plan.modes, plan.shares)
    assert config.host_bytes == plan.host
    alone = settings_of(Planner.of(request_of(0.5).planner(2048), ["none"] * 2, 1))
    assert (alone["offload"], alone["host_memory"]) == (0.0, 0.0)


def answer(monkeypatch, *arguments):
    monkeypatch.setattr(calibration, "calibrated", lambda *_: NOMINAL)
    given = ["--device", "cpu", "--shrink", "64", "--layers", "2", *arguments]
    chosen = vars(longest.parse_arguments([*given, "--output", "x"]))
    chosen |= {"tokens": chosen["tokens"][0], "keep": chosen["keep"][0]}
    if chosen["longest"]:
        chosen |= {"tokens": None, "share": chosen["longest"][0]}
    return longest.worker(chosen)("measure")


def test_a_small_share_needs_small_blocks(monkeypatch):
    """A window keeps at least one block."""
    given = ("--tokens", "4096", "--keep", "0.0625", "--warmup", "0", "--memory", "1")
    assert answer(monkeypatch, *given)["kept_rows"] == 1024
    found = answer(monkeypatch, *given, "--block-size", "64")
    assert found["kept_rows"] == 256
    assert found["step_s"] > 0


def test_the_longest_window_fits_into_the_share_of_the_cap(monkeypatch):
    given = ("--keep", "0.25", "--warmup", "64", "--memory", "0.02")
    lengths = []
    for share in ("1", "0.9"):
        found = answer(monkeypatch, *given, "--longest", share)
        assert found["predicted_gib"] <= float(share) * 0.02
        lengths.append(found["tokens"])
    assert 0 < lengths[1] < lengths[0]
    found = answer(monkeypatch, *given[:-1], "0.0001", "--longest", "1")
    assert found == {"refused": "not even 16 tokens fit"}


# --- the tables


def window(contender, memory, tokens, step, **more):
    row = {"bench": "longest window", "contender": contender, "memory": memory, "quantize": None}
    row |= {"tokens": tokens, "step_s": step, "too_long": 9, "gpu": "G", "shape": {}}
    return row | {"context_gib": 0.75, **more}


def planned(tokens, step, **more):
    shape = {"keep": 0.25, "memory": 24.0, "host_memory": 0.0, "quantize": None, "tokens": tokens}
    row = {"bench": "longest", "shape": shape | more, "gpu": "G", "step_s": step, "commit": "c"}
    gib = dict.fromkeys(("peak_gib", "predicted_gib", "host_gib", "predicted_host_gib"), 20.0)
    return row | gib | {"predicted_s": 1.0}


def test_tables_of_the_longest_windows():
    rows = [
        window("lemo-1", 24.0, 23552, 4.0),
        window("liger", 24.0, 1024, 4.0),
        window("liger", 24.0, 21504, 4.0),
        window("liger", 48.0, 87040, 24.04, bounded_by="time", too_long=None),
        window("lemo-1", 48.0, 59392, 1.5, bounded_by="trials", too_long=103424),
        window("lemo-0.25", 48.0, 59392, 1.5, bounded_by="trials", too_long=60416),
        window("cce", 24.0, None, None, failed="ImportError: no cce"),
        window("checkpointing", 24.0, 9, 9.0, gpu=None),
        planned(99904, 3.0, share=1.0, context=0.75),
        planned(99904, 3.0, share=1.0) | {"failed": "out of memory"},
        planned(238112, 11.0, share=1.0, quantize="nf4"),
        planned(1048576, 124.6),
    ]
    text = longest_page.figures(rows)
    assert text.splitlines()[2:9] == [
        "|  | 24 GiB, bf16 | 24 GiB, nf4 | 48 GiB, bf16 |",
        "| --- | ---: | ---: | ---: |",
        "| Liger kernels, checkpointing | 21504 (4.0 s) |  | 87040+ (24.0 s) |",
        "| lemo, keep 1, layers recomputed | 23552 (4.0 s) |  | 59392+ (1.5 s) |",
        "| lemo, keep 0.25, layers recomputed |  |  | 59392 (1.5 s) |",
        "| lemo, keep 0.25, planned | 99904 (3.0 s) | 238112 (11.0 s) |  |",
        "",
    ]
    assert "| 1048576 | 0.25 | 24 | 20.0 / 20.0 | 20.0 / 20.0 | 1.0 / 124.6 | c |" in text
    assert "0.75 GiB of the cap" in text
    assert longest_page.figures([]) == longest_page.NOTHING
