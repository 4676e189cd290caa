"""Plans with a share of activations on the host: bytes, times, the best of all, refusals."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import lemo
from lemo import LemoConfig
from lemo.cli.main import main
from lemo.models.layers import modes
from lemo.models.memory import host_pool, offload
from lemo.planner.memory import HOST_ALIGNMENT, StepMemory
from lemo.planner.plan import MARGIN, DoesNotFitError, HostRules, Planner
from lemo.planner.shape import Adapters, LayerRows, ModelShape, shape_of, step_of
from lemo.planner.timing import Rates, StepTime
from lemo.report import load_run, write_report
from lemo.settings.finetune import FinetuneConfig
from lemo.training import calibration
from lemo.training.calibration import stored_rates
from lemo.training.finetune import finetune
from lemo.training.model import load_config
from lemo.training.planning import plan_run
from lemo.training.run_log import read_log
from planner_cases import CASES, PeakOfTensors, model_of
from tiny import save_tiny_llama, write_documents
from tiny_models import config_of, lora, make_ids, make_model

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]

GIB = 2**30
RATES = Rates(1e11, 2e10, 2e10, 2e10, 2e-5, 1e9)
SHAPE = ModelShape(3, 512, 1024, 8, 4, 64, 1024)


def planner(rows, host=None, cuda=True, link=2e9, launch=1e-9):
    kept = [LayerRows(count, count) for count in rows]
    shape = replace(SHAPE, layers=len(rows))
    step = step_of(shape, [4096], kept, cuda=cuda, head_groups=1)
    memory = StepMemory(shape, Adapters(8), step)
    rates = Rates(1e12, 1e12, 1e12, 1e12, launch, link)
    time = StepTime(shape, Adapters(8), step, rates)
    return Planner(memory, time, host=host or HostRules())


@pytest.mark.parametrize("mode", ["none", "layer"])
@pytest.mark.parametrize("shares", [[1.0] * 4, [0.5, 1.0, 0.0, 0.25]], ids=str)
def test_the_highest_bytes_of_a_step(mode, shares, monkeypatch):
    """As without the host (tests of the planner's memory), of all tensors but the pool."""
    monkeypatch.setattr(offload, "SMALLEST", 256)
    tokens, (adapters, settings) = 1024, CASES["all"]
    model = model_of("llama", len(shares), adapters, 2, tokens, width=384).to(torch.bfloat16)
    config = {"recompute": mode, "keep": 1.0, "block_size": 8}
    handle = lemo.enable(model, LemoConfig(offload=shares, host_memory=0.125, **config))
    ids = make_ids(1, tokens)
    with PeakOfTensors(model) as tensors:
        model(input_ids=ids, labels=ids).loss.backward()
    pool = handle.path.forward.offload.pool
    shape = shape_of(model.get_base_model().config)
    step = step_of(shape, [tokens], [LayerRows(tokens, tokens)] * 4, cuda=False, **settings)
    memory = StepMemory(shape, adapters, step)
    layers = [memory.layer(index, mode, share) for index, share in enumerate(shares)]
    # What is rounded up, and the norm of embedded tokens, which have no gradient.
    slack = 4 * 64 * HOST_ALIGNMENT + tokens * (2 * shape.hidden + 4)
    assert 0 <= sum(layer.host for layer in layers) - pool.most <= slack
    predicted = memory.peak([mode] * 4, shares)
    predicted -= 2 * adapters.size * adapters.parameters(shape)
    found = tensors.peak - pool.capacity
    sums, cut = 4 * tokens * shape.queries, 2 * tokens * 384 * 2
    assert found <= 1.01 * predicted
    assert predicted - sums - (cut if mode == "none" else 0) < 1.05 * found


def test_the_fastest_of_all_plans():
    """Against every mode and share of three layers, with several bounds of both memories."""
    rows = [4096, 1024, 2048]
    everything = planner(rows).of(["none"] * 3, 1)
    whole = sum(layer.kept for layer in everything.layers)
    every = []
    made = planner(rows, HostRules(whole))
    for chosen in product(*made._options(None)[0]):
        plan = made.of([mode for mode, _ in chosen], 1, 1, [share for _, share in chosen])
        every.append((plan.peak, plan.host, plan.seconds))
    kinds = set()
    for limit, host in product((0.5, 0.65, 0.8), (0.0, 0.1, 0.3, 2.0)):
        device, room = round(limit * everything.peak), round(host * whole)
        best = []
        # What is rounded up may rule out what just fits.
        for usable, free in ((0.95 * device, room), (0.949 * device, 0.994 * room)):
            fitting = [s for peak, taken, s in every if peak <= usable and taken <= free]
            best.append(min(fitting, default=float("inf")))
        plan = planner(rows, HostRules(room)).plan(device)
        if plan is None or best[1] == float("inf"):
            assert plan is None or plan.peak <= device
            continue
        kinds |= {*plan.modes, *(share > 0 for share in plan.shares)}
        assert plan.peak <= 0.95 * device
        assert plan.host <= room
        assert best[0] * (1 - 1e-6) <= plan.seconds <= best[1] * (1 + 1e-6)
    assert {True, False} < kinds


def test_bytes_that_hide_behind_the_next_layer_come_first():
    made = planner([1024, 4096, 1024], link=2e8)
    sizes = [layer.kept for layer in made.of(["selective"] * 3, 1).layers]
    hidden = [made._time.hidden(index) for index in range(3)]
    assert hidden[2] == 0
    assert 0 < hidden[1] < hidden[0]
    shares = made.sensitive_shares("selective", hidden[1])
    assert sum(s * size for s, size in zip(shares, sizes)) == pytest.approx(hidden[1])
    assert all(s * size <= h * (1 + 1e-9) for s, size, h in zip(shares, sizes, hidden))
    assert made.sensitive_shares("selective", sum(sizes)) == (1.0, 1.0, 1.0)
    uniform = [0.5] * 3
    fitting = made.sensitive_shares("selective", sum(sizes) // 2)
    seconds = [made.of(["selective"] * 3, 1, 1, each).seconds for each in (fitting, uniform)]
    assert seconds[0] < seconds[1]


@pytest.mark.parametrize("launch", [1e-9, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("link", [2e8, 1e9, 1e11])
def test_what_is_chosen_is_predicted_to_be_no_slower_than_one_share_of_all(launch, link):
    faster = 0
    for rows in ([4096, 1024] * 4, [1024, 4096] * 4, [2048] * 8, [4096] * 4 + [512] * 4):
        made = planner(rows, link=link, launch=launch)
        modes = ["none"] * 8
        sizes = [layer.kept for layer in made.of(modes, 1).layers]
        for part in (0.05, 0.3, 0.6, 0.9):
            chosen = made.sensitive_shares("none", round(part * sum(sizes)))
            moved = sum(share * size for share, size in zip(chosen, sizes))
            assert moved == pytest.approx(part * sum(sizes), rel=1e-3)
            seconds = [made.of(modes, 1, 1, each).seconds for each in (chosen, [part] * 8)]
            assert seconds[0] <= seconds[1] * (1 + 1e-6)
            faster += seconds[0] < 0.95 * seconds[1]
        peak = made.of(modes, 1).peak
        for limit in (0.6, 0.8, 0.9):
            with_host = planner(rows, HostRules(2 * sum(sizes)), link=link, launch=launch)
            plan = with_host.plan(round(limit * peak))
            share = with_host._alike(plan.modes, plan.shares)
            alike = with_host.of(plan.modes, 1, plan.head_groups, share)
            if alike.peak <= (1 - MARGIN) * limit * peak:
                assert plan.seconds <= alike.seconds * (1 + 1e-9)
    assert faster or link == 1e11 or launch == 1e-3


def test_the_hosts_time_may_make_one_share_the_better_choice():
    """A step that the host bounds waits for no copies: fewer tensors that move are faster."""
    rows = [4096, 1024] * 4
    sizes = [layer.kept for layer in planner(rows).of(["none"] * 8, 1).layers]
    chosen = {}
    for launch in (1e-9, 1e-3):
        made = planner(rows, link=2e9, launch=launch)
        chosen[launch] = made.sensitive_shares("none", sum(sizes) // 4)
        parts = [
            sum(layer.parts for layer in made.of(["none"] * 8, 1, 1, each).layers)
            for each in (chosen[launch], [0.25] * 8)
        ]
        assert launch == 1e-9 or parts[0] <= parts[1]
    assert chosen[1e-9] != chosen[1e-3]


def test_what_the_device_waits_for():
    time = planner([1024, 4096, 1024], link=1e9)._time
    forward, backward = time._beside(0)
    assert 0 < forward < backward
    assert time.waiting(0, round(0.9e9 * forward)) == 0
    assert time.waiting(0, round(1e9 * (forward + backward))) == pytest.approx(forward + backward)
    # Behind the last layer there is none; on the CPU nothing runs beside.
    assert time.waiting(2, 10**9) == 2
    assert planner([1024] * 3, cuda=False, link=1e9)._time.waiting(0, 10**9) == 2


def test_nothing_goes_there_that_need_not():
    made = planner([4096] * 3, HostRules(GIB))
    plan = made.plan(64 * GIB)
    assert plan.modes == ("none",) * 3
    assert not any(plan.shares)
    assert plan.host == 0


def test_bytes_that_were_measured_count_where_the_host_helps():
    """All would fit without it beside those that are predicted."""
    made = planner([4096] * 3)
    memory, peak = made._memory, made.of(["none"] * 3, 1).peak
    limit, more = round(1.1 * peak), peak // 4
    plan = Planner(memory, made._time, memory.fixed + more, HostRules(GIB)).plan(limit)
    assert plan.peak == memory.peak(plan.modes, plan.shares) + more
    assert plan.peak <= limit


def test_shares_that_are_given_are_those_of_the_plan():
    shares = (0.5, 1.0, 0.0)
    plan = planner([4096, 1024, 2048], HostRules(GIB, shares)).plan(64 * GIB)
    assert plan.shares == shares
    assert [layer.host > 0 for layer in plan.layers] == [True, True, False]


def test_layers_without_a_backward_pass_send_nothing():
    """They come before the first layer that is trained, and keep nothing."""
    made = planner([4096] * 3)
    memory = StepMemory(replace(SHAPE, layers=3), Adapters(8), made._memory.step, first=1)
    least = Planner(memory, made._time).least()
    plan = Planner(memory, made._time, host=HostRules(GIB)).plan(least - 1)
    assert plan.shares[0] == 0
    assert max(plan.shares) > 0


def test_the_smallest_plan_takes_the_host_as_far_as_it_goes():
    rows = [4096, 1024, 2048]
    whole = planner(rows).of(["layer"] * 3, 1, 1, [1.0] * 3).host
    for host in (whole // 3, whole, 4 * whole):
        plan = planner(rows, HostRules(host)).smallest(1)
        assert plan.modes == ("layer",) * 3
        assert plan.shares == (pytest.approx(min(1.0, host / whole)),) * 3
        assert plan.peak == planner(rows).of(plan.modes, 1, 1, plan.shares).peak


def test_what_fits_with_the_host_fits():
    rows = [4096] * 3
    without = planner(rows).least()
    made = planner(rows, HostRules(GIB))
    least = made.least()
    assert least < without
    assert made.fits(least)
    assert made.plan(least).peak <= least
    assert not made.fits(least - 1)
    assert not planner(rows).fits(least)
    assert planner(rows, HostRules(1, (1.0,) * 3)).least() == -1


# --- the library: recompute and offload "auto"


def test_auto_moves_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 256)
    monkeypatch.setattr(host_pool, "HOST_ALIGNMENT", 64)
    model = lora(make_model("llama", num_hidden_layers=4, max_position_embeddings=256))
    ids = make_ids(1, 256)
    batch = {"input_ids": ids, "labels": ids}
    settings = {"keep": 0.5, "block_size": 8, "dense_layers": [], "scorer": "random"}
    used, losses = [], []
    for free, host in ((2**40, 0.05), (1, 0.05), (1, 0.0)):
        monkeypatch.setattr(modes, "free_bytes", lambda device, held, free=free: free)
        for recompute in ("auto", "selective"):
            handle = lemo.enable(
                model, config_of(recompute=recompute, host_memory=host, **settings)
            )
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
            pool = handle.path.forward.offload.pool
            used.append(0 if pool is None else pool.most)
            handle.remove()
    assert used[0] == used[1] == used[4] == used[5] == 0
    # All that is saved is less than there is room for on the host.
    assert used[3] > used[2] > 0
    assert len(set(losses)) == 1


# --- lemo finetune, lemo plan


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(calibration, "measure", lambda *_: RATES)
    monkeypatch.setattr(offload, "SMALLEST", 256)
    save_tiny_llama(tmp_path / "model", layers=4)
    write_documents(tmp_path / "documents.jsonl")
    return FinetuneConfig(
        model=str(tmp_path / "model"),
        documents=str(tmp_path / "documents.jsonl"),
        output=str(tmp_path / "run"),
        context_length=96,
        steps=4,
        lora_rank=4,
        save_every=2,
        device="cpu",
        elimination=LemoConfig(keep=1.0, block_size=16),
    )


def changed(config, memory=None, **elimination):
    made = config.elimination.model_copy(update=elimination)
    return config.model_copy(update={"memory_limit": memory, "elimination": made})


def planned(config):
    return planned_by_free_memory(config, round(config.memory_limit * GIB))


def planned_by_free_memory(config, limit=GIB):
    arguments = load_config(config.model), torch.float32, torch.device("cpu"), limit
    return plan_run(config, config.elimination.resolved(False), *arguments)


def test_a_run_that_fits_with_the_host_only(config, tmp_path):
    # Groups of heads would make it fit, too.
    config = changed(config, head_groups=1)
    least = planned(changed(config, 1.0, recompute="layer")).plan.peak / GIB
    with pytest.raises(DoesNotFitError, match="at least"):
        planned(changed(config, 0.97 * least))
    with_host = changed(config, 0.97 * least, host_memory=0.01)
    result = finetune(with_host)
    content = json.loads((result.folder / "plan.json").read_text())
    assert sum(content["host_bytes"]) <= round(0.01 * GIB)
    assert len(content["shares"]) == 4
    assert max(content["shares"]) > 0
    page = write_report([load_run(result.folder)], tmp_path / "report").read_text()
    for text in ("to the host", "host memory (predicted)"):
        assert text in page
    losses = [record["loss"] for record in read_log(result.folder / "log.jsonl")]
    other = config.model_copy(update={"output": str(tmp_path / "other")})
    plain = finetune(changed(other, recompute=content["modes"]))
    assert losses == [record["loss"] for record in read_log(plain.folder / "log.jsonl")]
    # A resumed run keeps its plan, and may have another memory.
    again = with_host.model_copy(update={"resume": True})
    kept = planned(again)
    assert kept.plan.shares == kept.settings["offload"] == tuple(content["shares"])
    # But not one that the host has no room for, or of another share than is asked for now.
    content |= {"modes": ["none"] * 4, "shares": [1.0] * 4}
    for room, asked, share in ((1.0, "auto", 1.0), (1e-5, "auto", 0.0), (1.0, 0.5, 0.5)):
        content["asked"] |= {"memory_limit": 1.0, "host_memory": room}
        (result.folder / "plan.json").write_text(json.dumps(content))
        resumed = changed(again, 1.0, host_memory=room, head_groups=1, offload=asked)
        assert planned(resumed).plan.shares == (share,) * 4


def test_what_goes_to_the_host_is_planned_where_recomputation_is_given(config):
    config = changed(config, head_groups=1)
    peak = planned(changed(config, 1.0, recompute="none")).plan.peak / GIB
    found = planned(changed(config, 0.97 * peak, recompute="none", host_memory=0.01)).plan
    assert found.modes == ("none",) * 4
    assert max(found.shares) > 0


def test_too_little_host_memory_is_refused_before_training(config):
    for settings in ({"offload": 1.0, "recompute": "none"}, {"offload": (1.0,) * 4}):
        with pytest.raises(
            DoesNotFitError, match=r"elimination.host_memory: expected .* or more for offload"
        ):
            finetune(changed(config, 1.0, host_memory=1e-4, **settings))
    assert not Path(config.output, "config.yaml").exists()
    with pytest.raises(ValueError, match="memory_limit: expected GiB beside elimination.host_"):
        finetune(changed(config, None, host_memory=0.01))
    with pytest.raises(ValueError, match="elimination.host_memory: memory cannot be predicted"):
        planned_by_free_memory(changed(config, None, host_memory=0.01, visible_keys="computed"))
    with pytest.raises(ValueError, match="offload: expected 4 entries, one for each layer, got 1"):
        finetune(changed(config, 1.0, host_memory=0.01, offload=(1.0,)))


def test_a_run_that_moves_nothing_needs_no_limit_on_the_cpu(config):
    for shares in (0.0, (0.0,) * 4):
        nothing = changed(config, None, host_memory=0.01, offload=shares)
        assert planned_by_free_memory(nothing, limit=None) is None


def test_a_plan_with_the_host(tmp_path, capsys):
    shape = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    folder = tmp_path / "model"
    folder.mkdir()
    heads = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shape, **heads}))
    arguments = [
        "plan",
        str(folder),
        "--tokens",
        "1024K",
        "--keep",
        "0.25",
        "--gpu-memory",
        "80GiB",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--dtype", "bfloat16"])
    assert ended.value.code == 1
    assert "GiB of the host for activations (host_memory " in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--dtype", "bfloat16", "--host-memory", "64GiB"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "to the host" in out
    assert "host memory: " in out
    assert "of 64.0 GiB" in out


@pytest.mark.parametrize(
    "change",
    [
        lambda rates: rates.pop("link"),  # as an earlier version wrote it
        lambda rates: rates.update(bytes=0),
        lambda rates: rates.update(launch=-1e-5),
        lambda rates: rates.update(products=math.inf),
        lambda rates: rates.update(attention=None),
        lambda rates: rates.update(attention="1e9"),
        lambda rates: rates.update(link=True),
    ],
)
def test_rates_that_are_not_whole_are_measured_again(monkeypatch, tmp_path, change):
    monkeypatch.setattr(calibration, "FOLDER", tmp_path)
    device = torch.device("cpu")
    monkeypatch.setattr(calibration, "measure", lambda *_: RATES)
    calibration.calibrated(SHAPE, device, torch.float32)
    assert stored_rates(SHAPE, device, torch.float32) == RATES
    path = tmp_path / "rates.json"
    content = json.loads(path.read_text())
    for rates in content.values():
        change(rates)
    path.write_text(json.dumps(content))
    assert stored_rates(SHAPE, device, torch.float32) is None


def test_the_link_is_measured():
    assert 1e8 < calibration._link(torch.device("cpu")) < 1e12
