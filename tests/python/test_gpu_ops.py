"""The benchmark of the operators on a GPU, on the CPU with small sizes."""

import json

import pytest
import torch

import gpu_ops
from gpu.bench import Bench

pytestmark = pytest.mark.cpu_only


# Attention has two dozen cases; one stem with a peer, bandwidths and backward is like another.
@pytest.mark.parametrize("stem", sorted({*gpu_ops.STEMS} - {"segment_attention", "block_scores"}))
def test_every_operator_runs_and_agrees_with_its_peers(stem, tmp_path):
    output = tmp_path / "figures.jsonl"
    small = ["--device", "cpu", "--shrink", "1024", "--commit", "abc"]
    assert gpu_ops.main(["--only", stem, "--output", str(output), *small]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows
    for row in rows:
        fields = {"bench", "shape", "ours", "peer", "peer_value", "ratio", "unit"}
        assert fields | {"gpu", "torch", "commit", "date"} <= set(row)
        assert (row["gpu"], row["commit"]) == (None, "abc")
    times = [row for row in rows if row["unit"] == "ms"]
    assert times
    assert all(row["range"][0] <= row["ours"] <= row["range"][1] for row in times)


def test_an_operator_that_differs_from_its_peer_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gpu.rope.by_formula", lambda x, cos, sin: x)
    output = tmp_path / "figures.jsonl"
    small = ["--device", "cpu", "--shrink", "1024"]
    assert gpu_ops.main(["--only", "rope", "--output", str(output), *small]) == 1
    assert not output.exists()
    assert "rope: relative error" in capsys.readouterr().err


def test_bandwidth_is_a_share_of_the_copy():
    bench = Bench("cpu", shrink=2**20)
    x = torch.zeros(1000)
    time, share = bench.compare(
        "copy", {"n": 1000}, x.clone, {"clone": x.clone}, moved=8000, tera=1e-9
    )
    assert (time["bench"], time["peer"], time["unit"]) == ("copy", "clone", "ms")
    assert time["tflops"] == round(1e-9 / time["ours"] * 1e3, 1)
    assert (share["bench"], share["peer"], share["unit"]) == (
        "copy bandwidth",
        "device copy",
        "TB/s",
    )
