"""The benchmark of one to eight GPUs, as far as it goes on the CPU."""

import argparse
import time

import pytest
import torch

import multi_gpu
import processes
import ring_attention
import scaling
import scaling_page
from common import records, traces
from common.traces import Span
from tiny_models import lora, make_ids, make_model
from tolerances import FP32_RELATIVE_ERROR, assert_close_fp32

pytestmark = pytest.mark.cpu_only

CONTEXT = "context llama-3-8b 131072 keep 0.5 layer"
SMALL = ["--device", "cpu", "--shrink", "32", "--layers", "2", "--shorten", "1024"]


def small(tmp_path, *more):
    return scaling.parse_arguments([*SMALL, "--output", str(tmp_path / "rows.jsonl"), *more])


def row(gpus, step, loss=12.0, bench="context", **more):
    known = {"bench": bench, "shape": "Llama-3-8B", "tokens": 8, "keep": 0.5, "recompute": "layer"}
    return known | {"gpus": gpus, "step_s": step, "loss": loss} | more


@pytest.mark.parametrize(
    ("counts", "here", "expected"),
    [
        ([1, 2, 4, 8], 8, [[1, 2, 4], [8]]),
        ([1, 2, 4], 4, [[1, 2], [4]]),
        ([1, 2], 2, [[1], [2]]),
        ([8], 8, [[8]]),
    ],
)
def test_groups_that_fit_together_run_side_by_side(counts, here, expected):
    assert scaling.side_by_side(counts, here) == expected


def test_a_phase_leaves_time_to_those_behind_it(tmp_path):
    options = small(tmp_path, "--seconds", "500", "--only", CONTEXT)
    now = time.time()
    ends = scaling.deadline(options, [[1, 2], [4]], 0, now) - now
    assert ends == pytest.approx(500 - scaling.START - 5, abs=2)
    assert scaling.deadline(options, [[1, 2], [4]], 1, now) - now == pytest.approx(500, abs=2)
    # Half of the time, where the later ones need more than that.
    options.seconds = 50.0
    assert scaling.deadline(options, [[1], [2]], 0, now) - now == pytest.approx(25, abs=2)


def test_settings_of_a_number_of_gpus():
    names = {count: [s.name for s in scaling.wanted([], count)] for count in (1, 4, 6, 8)}
    assert not any("1048576" in name for name in names[1])
    assert sum("1048576" in name for name in names[4]) == 2
    assert names[6] == names[4]
    assert sum("1048576" in name for name in names[8]) == 4
    assert [s.name for s in scaling.wanted([CONTEXT], 2)] == [CONTEXT]
    limited = scaling.wanted([CONTEXT, "fsdp"], 2, [0, 8])
    assert [(s.bench, s.max_ctas) for s in limited] == [("context", 0), ("context", 8), ("fsdp", 0)]
    assert limited[1].name == f"{CONTEXT} ctas 8"
    assert [s.name for s in scaling.wanted([CONTEXT], 1, [0, 8])] == [CONTEXT]


def test_a_text_that_names_no_setting_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        small(tmp_path, "--only", "nothing")
    assert "--only: expected texts of these names" in capsys.readouterr().err


def test_efficiency_and_losses():
    rows = [row(2, 5.0), row(1, 8.0), row(4, 2.5, loss=12.1), row(1, 8.0, bench="data")]
    [group, alone] = scaling.by_setting(rows).values()
    assert [each["gpus"] for each in group] == [1, 2, 4]
    assert len(alone) == 1
    assert [scaling.efficiency(each, group[0]) for each in group] == [1.0, 0.8, 0.8]
    assert scaling.efficiency(row(2, 10.0, bench="data"), row(1, 8.0, bench="data")) == 0.8
    [line] = scaling.differing(rows)
    assert line == "context Llama-3-8B 8 keep 0.5 layer: losses [12.0, 12.0, 12.1]"
    assert scaling.differing(rows[:2]) == []


def test_what_communication_hides_behind():
    gather = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    spans = [
        Span(0, 100e3, "void attention(float*)"),
        Span(20e3, 60e3, gather),  # hidden
        Span(90e3, 140e3, "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL()"),  # 10 of 50 hidden
        Span(150e3, 200e3, "mlp"),
    ]
    found = traces.overlap(spans)
    assert found == {
        "profiled_ms": 200.0,
        "compute_ms": 150.0,
        "communication_ms": 90.0,
        "exposed_ms": 40.0,
        "idle_ms": 10.0,
        "hidden": round(1 - 40 / 90, 4),
        "kinds": {"AllGather": [40.0, 1], "ReduceScatter": [50.0, 1]},
        "kernels": {"attention": [100.0, 1], "mlp": [50.0, 1]},
    }
    assert traces.overlap(spans[:1])["hidden"] is None


def member(settings):
    """A process of the benchmark's; its group is there already."""
    options = argparse.Namespace(**settings)
    scaling.measure_all(options, multi_gpu.torch.device("cpu"))


def test_one_and_two_processes_have_the_same_losses(tmp_path):
    options = small(tmp_path)
    left = [CONTEXT, "data llama-3-8b 32768 keep 0.5 layer"]
    left += ["context llama-3-8b 131072 keep 1 auto"]
    settings = vars(options) | {"run": "now", "beside": [], "ends": time.time() + 3600}
    for count in (1, 2):
        log = tmp_path / f"{count}.jsonl"
        done = settings | {"left": left[:2], "log": str(log)}
        processes.run(count, member, tmp_path, done)
        assert [e["state"] for e in records.read(log)] == [scaling.BEGUN, scaling.DONE] * 2
    rows = records.read(options.output)
    assert [(each["bench"], each["gpus"]) for each in rows] == [
        ("context", 1),
        ("data", 1),
        ("context", 2),
        ("data", 2),
    ]
    assert scaling.differing(rows) == []
    assert rows[2]["one_gpu_s"] == rows[0]["step_s"]
    assert rows[0]["one_gpu_s"] is None
    assert rows[2]["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=0.02)
    # What cannot end in time, or does not fit, is not begun.
    log = tmp_path / "late.jsonl"
    processes.run(1, member, tmp_path, settings | {"left": left[:1], "log": str(log), "ends": 0.0})
    small_memory = {"left": left[2:], "log": str(log), "memory": 1e-3}
    processes.run(1, member, tmp_path, settings | small_memory)
    states = [entry["state"] for entry in records.read(log)]
    assert states == ["not reached", "does not fit into 0.001 GiB, as planned"]


def test_the_page_is_what_the_results_and_the_planner_say():
    rows = records.read(scaling_page.RESULTS)
    text = scaling_page.PAGE.read_text(encoding="utf-8")
    assert scaling_page.updated(text, rows) == text, "run benchmarks/scaling_page.py"
    drawn = scaling_page.FIGURE.read_text(encoding="utf-8")
    assert scaling_page.figure(rows) == drawn, "run benchmarks/scaling_page.py"


def test_the_latest_rows_are_shown():
    known = {"one_gpu_s": None, "one_gpu_gib": None, "one_gpu_loss": None, "shrink": 1}
    known |= {"layers": 32, "peak_gib": 20.0}
    rows = [row(2, 6.0, **known), row(2, 5.0, **known | {"one_gpu_s": 9.0, "one_gpu_gib": None})]
    rows += [row(8, 1.5, **known), row(4, 9.9, **known | {"shrink": 2})]
    [line] = scaling_page.measured_table(rows).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[5:] == ["9.000", "5.000", "", "1.500", "? to 20.0", "0.750"]


def test_the_loss_of_the_peer_is_that_of_the_model():
    model = lora(make_model("llama"))
    model.get_base_model().set_attn_implementation("sdpa")  # causal without a mask
    ids = make_ids(1, 40)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    positions = torch.arange(40)[None]
    loss = ring_attention.loss_of_rows(model, ids, positions, targets) / 39
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in parameters]
    model.zero_grad()
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=FP32_RELATIVE_ERROR)
    for found, parameter in zip(gradients, parameters):
        assert_close_fp32(found, parameter.grad, "gradient")
