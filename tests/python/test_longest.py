"""Searches for the longest window, steps of long windows as they are planned, and their tables."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import comparison_longest
import longest
import longest_page
from common import records, timing
from common.models import config_of_shape, random_llama, with_lora
from common.planned import settings_of
from common.processes import WorkerError
from lemo import LemoConfig, enable
from lemo.models.layers import decoder
from lemo.models.layers.unit import Unit
from lemo.planner.plan import NOMINAL, Planner
from lemo.planner.request import Request
from lemo.planner.shape import Adapters, shape_of
from lemo.training import calibration

pytestmark = pytest.mark.cpu_only

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LIMITS = {"short": 8192, "most": 1048576, "trials": 4, "step_limit": 60.0}


# --- the search


def searched(most, weights, growth, usable, limits=LIMITS, known=(), power=1.5):
    """(GiB of each length, what ends them) of a contender whose memory grows by `growth` GiB for
    8192 tokens, and which in truth trains `most` tokens."""
    trials = []
    for _ in range(20):
        tokens, bound = comparison_longest.next_length(trials, usable, limits, [*known])
        if tokens is None or tokens in [each[0] for each in trials]:
            return {tokens: peak for tokens, peak, _ in trials}, bound
        peak = None if tokens > most else weights + growth * tokens / 8192
        trials.append([tokens, peak, None if peak is None else (tokens / 8192) ** power])
    raise AssertionError(f"no end: {trials}")


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
    """Trains up to 24000 tokens and takes 0.2 s for 1024 of them. Of Unsloth every trial but the
    short ones takes too long to answer."""

    asked: ClassVar = []

    def __init__(self, _script, settings, _environment, log):
        self.settings, self.has_failed, self.log = settings, False, log.stem

    def ask(self, question, seconds):
        assert not self.has_failed, "a process that ran out of memory is asked again"
        self.asked.append((self.settings["contender"], self.settings.get("share"), seconds))
        if self.settings["contender"] == "liger":
            return {"failed": "ImportError: no liger"}
        if "share" in self.settings:
            tokens = round(1e4 * self.settings["share"]) + round(self.settings["host_memory"])
            peak = None if self.settings["share"] > 0.96 else 22.0
            return {"trials": [[tokens, peak, peak and 4.0]], "predicted_s": 4.1, "host_gib": 3}
        if not question:
            if self.settings["contender"] == "cce" and self.log.endswith("-1"):
                time.sleep(seconds)
                raise WorkerError(f"no answer in {seconds:g} s")
            return {}
        tokens = json.loads(question)
        if self.settings["contender"] == "unsloth-tiled" and tokens > 16384:
            time.sleep(seconds)
            raise WorkerError(f"no answer in {seconds:g} s")
        if tokens > 24000:
            self.has_failed = True
            return {"trials": [[tokens, None, None]]}
        peak = 14.0 + 3.0 * tokens / 8192
        return {"trials": [[tokens, peak, tokens / 5120]], "host_gib": 3, "pinned_gib": 7.0}

    def close(self):
        pass

    end = close

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def search_of(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison_longest, "Worker", FakeWorker)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(FakeWorker, "asked", [])

    def make(*arguments):
        given = ["--logs", str(tmp_path), "--output", str(tmp_path / "rows.jsonl"), *arguments]
        stack = SimpleNamespace(enter_context=lambda worker: worker)
        return comparison_longest.Search(options(*given), stack)

    return make


def test_a_new_process_goes_on_where_memory_ran_out(search_of):
    row = search_of().row("checkpointing")
    assert row["tokens"] <= 24000 < row["too_long"]
    assert row["too_long"] <= comparison_longest.CLOSE * row["tokens"]
    wanted = {"bounded_by": "memory", "too_slow": None, "host_gib": 3}
    assert row.items() >= wanted.items()
    row = search_of().row("liger")
    assert (row["tokens"], row["failed"]) == (None, "ImportError: no liger")


def test_trials_of_earlier_rows_say_where_to_begin(search_of, tmp_path):
    search = search_of("--device", "cuda")
    known = [[8192, 17.0, 1.6], [16384, 20.0, 3.2]]
    shape = {"model": "Llama-3-8B shape", "layers": 32, "lora_rank": 8}
    row = {"bench": "longest window", "contender": "checkpointing", "quantize": None}
    row |= {"memory": 48.0, "tokens": 16384, "trials": known, "gpu": "G", "shape": shape}
    records.append(tmp_path / "rows.jsonl", [row])
    row = search.row("checkpointing")
    # 23.25 GiB are reached at 25259 tokens; nothing short is trained.
    assert row["trials"][0] == [24576, None, None]
    assert row["tokens"] <= 24000 < row["too_long"]
    # What did not fit into as much does not fit.
    row["trials"].append([23552, None, None])
    records.append(tmp_path / "rows.jsonl", [row | {"gpu": "G"}])
    assert search_of("--device", "cuda").row("checkpointing")["trials"][0][0] == 21504
    other = search.row("cce")
    assert other["trials"][0][0] == 8192


def test_a_step_beyond_the_limit_is_too_long_in_time(search_of):
    row = search_of("--step-limit", "3.5").row("checkpointing")
    # 0.2 s for 1024 tokens: 17920 take 3.5 s.
    assert row["tokens"] <= 17920
    assert row["bounded_by"] == "time"
    assert row["step_s"] <= 3.5
    # The square of the length says less than this contender can do; where it says more:
    slow = LIMITS | {"step_limit": 10.0, "trials": 9}
    peaks, bound = searched(10**6, 15, 0.5, 100.0, slow, power=4)
    assert bound == "time"
    within = max(tokens for tokens in peaks if (tokens / 8192) ** 4 <= 10)
    beyond = min(tokens for tokens in peaks if (tokens / 8192) ** 4 > 10)
    assert within < beyond <= 1.5 * within


def test_no_contender_takes_the_others_time(search_of):
    search = search_of("--step-limit", "0.05")
    began = time.monotonic()
    # Two short steps are fast; the answer to the third length does not come.
    row = search_of().row("unsloth-tiled", 0.5)
    assert time.monotonic() - began < 5
    assert (row["tokens"], row["bounded_by"]) == (16384, "deadline")
    assert "failed" not in row
    assert max(seconds for *_, seconds in FakeWorker.asked) <= 0.5
    # What was found stays where the next process is not ready in time.
    row = search_of().row("cce", 0.5)
    assert (row["tokens"], row["too_long"], row["bounded_by"]) == (16384, 24576, "deadline")
    assert "failed" not in row
    # No answer for longer than a step may take: the length is too long, and shorter ones follow.
    given = ("--step-limit", "0.3", "--timeout", "0.4", "--short", "32768")
    row = search_of(*given).row("unsloth-tiled")
    (tokens, peak, seconds), *_ = row["trials"]
    assert (tokens, peak) == (32768, None)
    assert seconds >= 0.4
    assert (row["tokens"], row["too_slow"], row["too_long"]) == (1024, 2048, None)
    row = search.row("unsloth-tiled", 0.2)
    assert (row["tokens"], row["too_slow"], row["bounded_by"]) == (None, 1024, "time")


def test_plans_are_tried_for_less_and_less_of_the_cap(search_of, tmp_path):
    row = search_of().row("lemo-1-planned")
    assert [trial[:2] for trial in row["trials"]] == [[9900, None], [9700, None], [9500, 22.0]]
    assert (row["tokens"], row["too_long"], row["step_s"]) == (9500, 9700, 4.0)
    assert (row["keep"], row["predicted_s"]) == (1.0, 4.1)
    assert {name for name, *_ in FakeWorker.asked} == {"lemo-1-planned"}
    # With as much of the host as Unsloth has taken.
    search = search_of("--device", "cuda")
    assert "no row of Unsloth" in search.row("lemo-1-host")["failed"]
    unsloth = search.row("unsloth") | {"gpu": "G"}
    records.append(tmp_path / "rows.jsonl", [unsloth])
    assert search.row("lemo-1-host")["tokens"] == 9507
    assert search_of("--host-memory", "3").row("lemo-1-host")["tokens"] == 9503


def test_trials_of_one_process():
    """A tiny model trains; what is above the memory there is counts as out of memory."""
    settings = {"contender": "checkpointing", "shape": "tiny", "layers": None, "device": "cpu"}
    settings |= {"most": 4096, "memory": 1e3, "quantize": None}
    answer = comparison_longest.worker(settings)
    for tokens in (1024, 2048):
        ((found, peak, seconds),) = answer(json.dumps(tokens))["trials"]
        assert found == tokens
        assert 0 < peak < 1e3
        assert seconds > 0
    answer = comparison_longest.worker(settings | {"memory": 1e-3})
    assert answer("1024")["trials"] == [[1024, None, None]]


def test_a_planned_trial(monkeypatch):
    """The longest window of a share of the memory, and a shorter one where steps may not last."""
    slow = replace(NOMINAL, products=1e10, attention=1e10, attention_backward=1e10)
    monkeypatch.setattr(calibration, "calibrated", lambda *_: slow)
    # The whole process is measured on the CPU: its memory is no plan's.
    monkeypatch.setattr(comparison_longest, "held", lambda _: {"host_gib": 0.0})
    settings = {"contender": "lemo-0.25-planned", "shape": "tiny", "layers": None, "device": "cpu"}
    settings |= {"quantize": None, "keep": 0.25, "host_memory": 0.0, "memory": 0.02}
    found = {}
    for share, limit in ((1.0, 1e3), (0.9, 1e3), (1.0, None)):
        limit = limit or found[1.0, 1e3]["predicted_s"] / 2
        made = settings | {"share": share, "step_limit": limit}
        found[share, limit] = comparison_longest.worker(made)("")
    whole, less, short = found.values()
    assert [each["bounded_by"] for each in found.values()] == ["memory", "memory", "time"]
    assert whole["trials"][0][0] > less["trials"][0][0] > short["trials"][0][0] > 0
    assert whole["predicted_gib"] <= 0.02
    assert short["predicted_s"] <= whole["predicted_s"] / 2
    assert all(each["trials"][0][2] > 0 for each in found.values())
    made = settings | {"share": 1.0, "step_limit": 1e3, "memory": 1e-4}
    assert comparison_longest.worker(made)("")["failed"] == "not even 16 tokens fit"


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


def test_memory_that_runs_out_in_an_operator_is_a_row(monkeypatch):
    """The C++ core says it in words of its own."""

    def fails(*_):
        raise torch.OutOfMemoryError("cannot allocate 264241152 bytes for a tensor [9216, 14336]")

    monkeypatch.setattr(timing, "milliseconds", fails)
    found = answer(monkeypatch, "--tokens", "4096", "--warmup", "0", "--memory", "1")
    assert found["failed"] == "out of memory"


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
        window("lemo-1-planned", 24.0, 40960, 4.0, pinned_gib=0.4),
        window("lemo-1-planned", 48.0, 81920, 8.0, pinned_gib=24.44),
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
    assert text.splitlines()[2:10] == [
        "|  | 24 GiB, bf16 | 24 GiB, nf4 | 48 GiB, bf16 |",
        "| --- | ---: | ---: | ---: |",
        "| Liger kernels, checkpointing | 21504 (4.0 s) |  | 87040+ (24.0 s) |",
        "| lemo, keep 1, layers recomputed | 23552 (4.0 s) |  | 59392+ (1.5 s) |",
        "| lemo, keep 0.25, layers recomputed |  |  | 59392 (1.5 s) |",
        "| lemo, keep 1, planned | 40960 (4.0 s) |  | 81920 (8.0 s, host 24.4 GiB) |",
        "| lemo, keep 0.25, planned | 99904 (3.0 s) | 238112 (11.0 s) |  |",
        "",
    ]
    assert "| 1048576 | 0.25 | 24 | 20.0 / 20.0 | 20.0 / 20.0 | 1.0 / 124.6 | c |" in text
    assert "0.75 GiB of the cap" in text
    assert longest_page.figures([]) == longest_page.NOTHING
