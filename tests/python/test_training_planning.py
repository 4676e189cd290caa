"""Plans of runs: what they store, what is refused, what is said when memory runs out."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MistralConfig

import lemo
from lemo import LemoConfig
from lemo.models.layers import modes as modes_module
from lemo.planner.plan import MARGIN, DoesNotFitError
from lemo.planner.request import Request
from lemo.planner.shape import Adapters, shape_of
from lemo.planner.timing import Rates
from lemo.preparation.pipeline import prepare
from lemo.preparation.windows import Window
from lemo.report import load_run, write_report
from lemo.settings.finetune import FinetuneConfig
from lemo.settings.preparation import PredictorSettings
from lemo.training import calibration, dry_run, planning
from lemo.training import finetune as module
from lemo.training.finetune import finetune
from lemo.training.model import load_config
from lemo.training.planning import out_of_memory, plan_run, request_of
from lemo.training.run_log import read_log
from tiny import save_tiny_llama, write_documents
from tiny_models import config_of, lora, make_ids, make_model

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]

RATES = Rates(1e11, 2e10, 2e10, 2e10, 2e-5)
GIB = 2**30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model", layers=4)
    write_documents(folder / "documents.jsonl")
    return folder


@pytest.fixture(autouse=True)
def rates(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(calibration, "measure", lambda *_: RATES)


@pytest.fixture
def config(inputs, tmp_path):
    return FinetuneConfig(
        model=str(inputs / "model"),
        documents=str(inputs / "documents.jsonl"),
        output=str(tmp_path / "run"),
        context_length=96,
        steps=4,
        lora_rank=4,
        save_every=2,
        device="cpu",
        elimination=LemoConfig(keep=0.5, block_size=16),
    )


def changed(config, **values):
    return config.model_copy(update=values)


def peaks(config):
    """GiB that the run needs with everything stored, and with all recomputed."""
    found = []
    for recompute in ("none", "layer"):
        elimination = changed(config.elimination, recompute=recompute)
        with_limit = changed(config, memory_limit=1.0, elimination=elimination)
        found.append(planned(with_limit).plan.peak / GIB)
    return found


def planned(config):
    limit = None if config.memory_limit is None else round(config.memory_limit * GIB)
    elimination = config.elimination.resolved(False)
    arguments = load_config(config.model), torch.float32, torch.device("cpu"), limit
    return plan_run(config, elimination, *arguments)


def test_settings_of_a_run_reach_what_is_planned(config, monkeypatch):
    """With values none of which is the one that it has by itself."""
    settings = {"lora_rank": 2, "lora_targets": ("q_proj",), "lora_dropout": 0.1}
    settings |= {"train_norms": True, "batch_size": 3, "gradient_accumulation": 5}
    config = changed(config, **settings, quantize="float8")
    elimination = changed(config.elimination, products="fp8").resolved(False)
    model, asked = MistralConfig(num_hidden_layers=2, sliding_window=48), []
    monkeypatch.setattr(planning, "calibrated", lambda *a: asked.append(a) or RATES)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    expected = Request(
        shape_of(model),
        Adapters(2, frozenset(["q_proj"]), dropout=True, norms=True),
        elimination,
        RATES,
        batch=3,
        size=2,
        autocast=True,
        cuda=True,
        passes=5,
        quantize="float8",
        window=48,
        may_shard=False,
    )
    assert request_of(config, elimination, model, torch.float16, cuda) == expected
    assert asked == [(expected.shape, cuda, torch.float16, True)]
    other = {"size": 4, "autocast": False, "cuda": False, "may_shard": True}
    found = request_of(config, elimination, model, torch.float32, cpu, RATES)
    assert found == dataclasses.replace(expected, **other)


@pytest.mark.parametrize(("shard", "shards"), [(True, 4), (False, 1)])
def test_processes_of_a_run_reach_what_is_planned(config, shard, shards):
    config = changed(config, context_parallel=2, shard=shard)
    arguments = load_config(config.model), torch.bfloat16, torch.device("cpu"), GIB
    found = plan_run(config, config.elimination.resolved(False), *arguments, processes=4)
    assert (found.request.processes, found.request.shards) == (2, shards)


def test_without_a_limit_nothing_is_planned_on_the_cpu(config):
    assert planned(config) is None
    finetune(config)
    assert not (Path(config.output) / "plan.json").exists()
    assert load_run(config.output).plan is None


def test_free_memory_buys_time(config):
    most, least = peaks(config)
    modes = []
    for limit in (2 * most, (most + least) / 2 / 0.95, 1.01 * least):
        modes.append(planned(changed(config, memory_limit=limit)).plan.modes)
    assert modes[0] == ("none",) * 4
    assert len(set(modes[1])) > 1
    assert "none" not in modes[2]


def test_a_run_keeps_its_plan_and_the_report_shows_it(config, tmp_path):
    most, least = peaks(config)
    config = changed(config, memory_limit=(most + least) / 2 / 0.95)
    finetune(changed(config, elimination=changed(config.elimination)))
    content = json.loads((Path(config.output) / "plan.json").read_text())
    assert len(set(content["modes"])) > 1
    run = load_run(config.output)
    assert run.plan.modes == content["modes"]
    page = write_report([run], tmp_path / "report").read_text()
    for text in ("Plan of a step", "recompute all", "peak memory (predicted)"):
        assert text in page
    # As long as it fits, whatever else would be planned now.
    content["modes"] = ["layer", "none", "layer", "selective"]
    (Path(config.output) / "plan.json").write_text(json.dumps(content))
    assert planned(changed(config, resume=True)).plan.modes == tuple(content["modes"])
    anew = planned(config).plan.modes
    assert anew != tuple(content["modes"])
    for damaged in ("[]", "[" * 100_000):
        (Path(config.output) / "plan.json").write_text(damaged)
        assert planned(changed(config, resume=True)).plan.modes == anew


def test_a_plan_that_was_made_for_something_else_is_not_kept(config):
    most, least = peaks(config)
    config = changed(config, memory_limit=2 * most)
    path = Path(config.output) / "plan.json"
    path.parent.mkdir()
    planned(config).write(path.parent)
    content = json.loads(path.read_text())

    def resumed(**settings):
        """The modes and groups of a run that goes on by this content."""
        path.write_text(json.dumps(content))
        found = planned(changed(config, resume=True, **settings))
        return found.plan.modes, found.settings["head_groups"]

    content |= {"modes": ["layer"] * 4, "head_groups": 2}
    assert resumed() == (("layer",) * 4, 2)
    anew = planned(config).plan.modes, 1
    assert resumed(memory_limit=2.1 * most) == anew
    assert resumed(elimination=changed(config.elimination, head_groups=1)) == anew
    assert resumed(elimination=changed(config.elimination, recompute="none")) == anew
    assert resumed(elimination=changed(config.elimination, host_memory=0.01))[0] == anew[0]
    # Of the same memory, which holds no more than this.
    config = changed(config, memory_limit=1.01 * least)
    content |= {"modes": ["none"] * 4, "head_groups": 1}
    content["asked"]["memory_limit"] = config.memory_limit
    assert "none" not in resumed()[0]


def test_the_memory_that_is_advised_stores_less(config):
    most, least = peaks(config)
    config = changed(config, memory_limit=2 * most)
    plan = planned(config)
    said = str(out_of_memory(2, MemoryError(), config, plan, 0))
    advised = float(re.search(r"--memory-limit (\S+) \(GiB\)", said)[1])
    assert least < advised < (1 - MARGIN) * plan.plan.peak / GIB
    assert planned(changed(config, memory_limit=advised)).plan.peak < plan.plan.peak
    # Where all is recomputed a lower limit is of no use.
    all_again = dataclasses.replace(plan.plan, modes=("layer",) * 4)
    plan = dataclasses.replace(plan, plan=all_again)
    assert "--memory-limit" not in str(out_of_memory(2, MemoryError(), config, plan, 0))


@pytest.mark.parametrize("modes", ["none", "layer", ("none", "layer", "none", "layer")])
def test_a_limit_holds_for_given_recomputation_too(config, modes):
    """The least limit within which it fits is what it needs."""
    config = changed(config, elimination=changed(config.elimination, recompute=modes))

    def at(limit):
        return changed(config, memory_limit=limit / GIB)

    # What it needs with all heads at once; groups of heads may need less.
    most = planned(at(GIB)).plan.peak
    found = []
    for parts in range(850, 1001, 10):
        limit = round(most * parts / 1000)
        try:
            found.append(planned(at(limit)).plan.peak)
            assert found[-1] <= limit
        except DoesNotFitError:
            assert not found, "less memory was enough"
    assert 0 < len(found) < 16
    with pytest.raises(DoesNotFitError, match="what would fit: "):
        planned(at(0.85 * most))


def test_a_context_that_does_not_fit_is_refused_before_anything_runs(config, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("weights were loaded"))
    _, least = peaks(config)
    with pytest.raises(DoesNotFitError, match="^memory_limit: .* at least.*what would") as refused:
        finetune(changed(config, batch_size=8, memory_limit=1.5 * least))
    assert re.search(r"at most \d+ tokens", str(refused.value))
    assert "one sequence at a time" in str(refused.value)
    assert not Path(config.output, "config.yaml").exists()
    elimination = changed(config.elimination, recompute="none")
    with pytest.raises(DoesNotFitError, match="recompute as it is; .*; recompute auto;"):
        finetune(changed(config, memory_limit=least, elimination=elimination))
    # "layer" is what is asked for, and nothing less would fit.
    asked = changed(config, memory_limit=0.9 * least, gradient_checkpointing=True)
    with pytest.raises(DoesNotFitError) as refused:
        planned(asked)
    assert "recompute auto" not in str(refused.value)


def test_an_upper_bound_that_does_not_fit_is_no_refusal(config, caplog):
    """By thresholds scores decide how much is kept; only a limit that is set refuses."""
    layerwise = {"policy": "threshold", "thresholds": [0.0] * 4}
    elimination = LemoConfig(scorer="random", block_size=16, layerwise=layerwise)
    config = changed(config, elimination=elimination, memory_limit=None)
    limited = changed(config, memory_limit=1e-9)
    with pytest.raises(DoesNotFitError):
        planned(limited)
    arguments = load_config(config.model), torch.float32, torch.device("cpu"), 1
    found = plan_run(config, elimination.resolved(False), *arguments)
    assert set(found.plan.modes) == {"layer"}
    assert "scores may keep fewer rows" in caplog.text
    with pytest.raises(DoesNotFitError, match="^GPU memory: expected a step of"):
        plan_run(
            changed(config, elimination=LemoConfig()), LemoConfig().resolved(False), *arguments
        )


def test_what_is_free_may_be_a_little_less_than_what_is_predicted(config):
    """Where it is not known better what else could be stored, and no limit is set."""
    config = changed(config, elimination=changed(config.elimination, recompute="layer"))
    config = changed(config, elimination=changed(config.elimination, head_groups=1))
    peak = planned(changed(config, memory_limit=1.0)).plan.peak
    arguments = load_config(config.model), torch.float32, torch.device("cpu")
    for missing, fits in ((0.9 * MARGIN, True), (1.1 * MARGIN, False)):
        limit = round((1 - missing) * peak)
        with pytest.raises(DoesNotFitError, match="^memory_limit: "):
            planned(changed(config, memory_limit=limit / GIB))
        elimination = config.elimination.resolved(False)
        if fits:
            assert plan_run(config, elimination, *arguments, limit).plan.peak == peak
            continue
        with pytest.raises(DoesNotFitError, match="^GPU memory: "):
            plan_run(config, elimination, *arguments, limit)


@pytest.mark.parametrize("recompute", ["auto", "none"])
@pytest.mark.parametrize(
    "settings", [{"scorer": "pooled", "keep_relevance": 0.5}, {"scorer": "lexical"}]
)
def test_answers_may_keep_or_count_less_than_is_planned(config, settings, recompute, caplog):
    elimination = LemoConfig(recompute=recompute, **settings)
    config = changed(config, elimination=elimination)
    arguments = load_config(config.model), torch.float32, torch.device("cpu"), 1
    found = plan_run(config, elimination.resolved(True), *arguments)
    assert "scores may keep fewer rows" in caplog.text
    # What is given needs no plan to be followed.
    assert (found is None) == (recompute == "none")


@pytest.mark.parametrize(
    "elimination", [None, LemoConfig(visible_keys="computed"), LemoConfig(path="generic")]
)
def test_a_limit_where_memory_cannot_be_predicted(config, elimination):
    with pytest.raises(ValueError, match="memory_limit: memory cannot be predicted"):
        finetune(changed(config, memory_limit=1.0, elimination=elimination))


@pytest.fixture(scope="module")
def predictor(inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    windows = [Window("a", torch.arange(64)), Window("a", torch.arange(64, 128))]
    settings = PredictorSettings(block_size=16, search_rounds=0, steps=2)
    prepare(model, windows, windows, inputs / "predictor", settings)
    return str(inputs / "predictor")


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        # By thresholds, also those of the folder, layers keep all at most.
        ({"layerwise": {"policy": "threshold"}}, {96}),
        # Three of six blocks of 16, as predicted for, of six sixteenths: not two quarters of 24.
        ({"keep": 0.4}, {48}),
        ({"keep": 0.3}, {32}),
    ],
)
def test_predictors_say_what_is_left_to_them(config, predictor, settings, rows, monkeypatch):
    elimination = LemoConfig(scorer="predictor", predictor=predictor, **settings)
    config = changed(config, elimination=elimination, memory_limit=1.0, steps=1)
    assert set(planned(config).request.planner(96).rows) == rows
    lines = list(dry_run.planned(changed(config, memory_limit=None), GIB))
    assert lines[1] == f"step: 1 x 96 tokens, of which layers keep {max(rows)}"
    finetune(config)
    # The same in each pass of the library.
    asked = []
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 2**40)
    make = modes_module.step_of
    monkeypatch.setattr(
        modes_module, "step_of", lambda *a, **k: asked.append(a[2]) or make(*a, **k)
    )
    model = lora(AutoModelForCausalLM.from_pretrained(config.model)).train()
    lemo.enable(model, elimination)
    ids = make_ids(1, 96)
    model(input_ids=ids, labels=ids).loss.backward()
    assert {row for layer in asked[0] for row in layer} == rows


def test_predictors_of_other_blocks_are_refused(config, predictor):
    elimination = LemoConfig(scorer="predictor", predictor=predictor, block_size=32)
    config = changed(config, elimination=elimination)
    for run in (lambda: list(dry_run.planned(config, GIB)), lambda: finetune(config)):
        with pytest.raises(ValueError, match="block_size: the predictors .* for 16, got 32"):
            run()


def test_a_listed_plan_is_followed(config):
    modes = ("none", "layer", "selective", "layer")
    finetune(changed(config, elimination=changed(config.elimination, recompute=modes), steps=2))
    elimination = changed(config.elimination, recompute=("none",))
    with pytest.raises(ValueError, match="recompute: expected 4 entries"):
        finetune(changed(config, elimination=elimination, overwrite=True))


class Allocator(TorchDispatchMode):
    """Refuses tensors of so many elements."""

    def __init__(self, elements, error):
        super().__init__()
        self.elements, self.error = elements, error

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.elements:
            raise self.error
        return result


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize(("limit", "last"), [(None, 4), (1.0, 4), (1.0, 1), (None, 2), (None, 3)])
def test_out_of_memory_says_what_to_do_and_the_run_goes_on(config, monkeypatch, error, limit, last):
    config = changed(config, memory_limit=limit)
    step = module._Run._step

    def failing(self, number, batches):
        if number < last:
            return step(self, number, batches)
        # An activation of the MLP in the kept rows.
        with Allocator(48 * 64, error):
            return step(self, number, batches)

    monkeypatch.setattr(module._Run, "_step", failing)
    with pytest.raises(MemoryError) as raised:
        finetune(config)
    text = str(raised.value)
    assert text.startswith(f"step {last}: ")
    # Checkpoints come after steps 2 and 4.
    assert ("the checkpoint of step 2 are kept; to go on with less memory: " in text) == (last > 2)
    assert ("there is no checkpoint yet; to begin again with less memory" in text) == (last <= 2)
    assert (Path(config.output) / "checkpoints").is_dir() == (last > 2)
    assert "--resume --memory-limit" in text if limit else "--resume --recompute layer" in text
    assert ("plan: " in text) == (limit is not None)
    assert "keep" in text
    monkeypatch.setattr(module._Run, "_step", step)
    less = changed(config.elimination, recompute="layer")
    finetune(changed(config, resume=True, elimination=less))
    assert [record["step"] for record in read_log(Path(config.output) / "log.jsonl")] == [
        1,
        2,
        3,
        4,
    ]


def test_where_memory_runs_out_after_a_resume_its_checkpoint_is_named(config, monkeypatch):
    finetune(config)
    for checkpoint in (Path(config.output) / "checkpoints").iterdir():
        if "4" in checkpoint.name:
            shutil.rmtree(checkpoint)

    def failing(self, number, batches):
        raise MemoryError

    monkeypatch.setattr(module._Run, "_step", failing)
    with pytest.raises(MemoryError, match="step 3: .* the checkpoint of step 2 are kept; to go on"):
        finetune(changed(config, resume=True, save_every=100))


def test_an_error_of_another_kind_stays_as_it_is(config, monkeypatch):
    def failing(self, number, batches):
        raise RuntimeError("something else")

    monkeypatch.setattr(module._Run, "_step", failing)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        finetune(config)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (torch.OutOfMemoryError, torch.OutOfMemoryError("CUDA out of memory. Tried to get 2 GiB.")),
        (MemoryError, MemoryError("no memory")),
        (RuntimeError, RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        (RuntimeError, torch.AcceleratorError("CUDA error: out of memory")),
    ],
)
@pytest.mark.parametrize("phase", ["forward", "loss", "backward"])
def test_the_library_says_what_was_stored(phase, kind, error, monkeypatch):
    model = lora(make_model("llama", max_position_embeddings=128))
    lemo.enable(model, config_of(recompute="layer", keep=1.0, block_size=8, dense_layers=[]))
    ids = make_ids(1, 128)
    # The smallest activation of the MLP, which is larger than the embedded tokens.
    elements = 128 * 48

    def step():
        if phase == "loss":
            training_forward = sys.modules["lemo.models.training_forward"]
            monkeypatch.setattr(training_forward, "causal_lm_loss", raising)
        with Allocator(elements if phase == "forward" else 10**9, error):
            loss = model(input_ids=ids, labels=ids).loss
        with Allocator(elements, error):
            loss.backward()

    def raising(*_, **__):
        raise error

    with pytest.raises(kind, match=r"memory(.|\n)*lemo: ") as raised:
        step()
    assert type(raised.value) is kind
    assert ("backward pass of a layer with 128 kept rows" in str(raised.value)) == (
        phase == "backward"
    )
    assert "recompute='layer'" in str(raised.value)
    assert raised.value.__cause__ is error
