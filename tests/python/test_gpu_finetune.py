"""The benchmark of fine-tuning steps, as far as it goes without a GPU."""

import json

import pytest

import gpu_finetune
from common.models import llama_config, write_random_predictors
from lemo import LemoConfig, predictors


def options(*arguments):
    return gpu_finetune.parse_arguments(["--output", "figures.jsonl", *arguments])


def test_measurements_take_turns_and_keep_to_their_lengths():
    chosen = options(
        *("--tokens", "16384", "32768", "--peers-script", "peers.py", "--layers", "4"),
        *("--variants", "1-none@16384", "0.5-layer", "--peers", "a", "b@32768"),
    )
    plan = [(s["name"], s["tokens"], s["ours"]) for s in gpu_finetune.plan(chosen)]
    assert plan == [
        ("a", 16384, False),
        ("1-none", 16384, True),
        ("0.5-layer", 16384, True),
        ("a", 32768, False),
        ("0.5-layer", 32768, True),
        ("b", 32768, False),
    ]
    assert all(s["layers"] == 4 and s["reps"] == 3 for s in gpu_finetune.plan(chosen))


def config_of(variant):
    return gpu_finetune.config_of(variant, "folder")


def test_the_defaults_are_valid():
    for chosen in (options(), options("--peers-script", "peers.py")):
        for variant in chosen.variants:
            assert config_of(gpu_finetune.at(variant)[0]).layerwise.dense_layers == ()
    # Without a scorer nothing but the share and recomputation is set.
    assert config_of("0.25-none") == LemoConfig(keep=0.25, recompute="none")


def test_scorers_of_variants():
    def chosen(variant):
        config = config_of(variant)
        return config.scorer, config.layerwise.select_at, config.layerwise.keep_mlp

    assert chosen("0.5-layer") == ("auto", "first", None)
    assert chosen("0.5-layer-outside") == chosen("0.5-layer")
    assert chosen("0.5-layer-pooled") == ("pooled", "first", None)
    assert chosen("0.5-layer-random") == ("random", "all", None)
    assert chosen("0.5-layer-predictor") == ("predictor", "all", None)
    assert chosen("0.5-layer-predictors") == ("predictor", "all", 0.5)
    assert chosen("0.5-layer-computed") == ("random", "first", None)
    assert config_of("0.5-layer-computed").visible_keys == "computed"
    assert config_of("0.5-layer-predictor").predictor == "folder"
    assert {config_of(f"0.5-layer-{name}").block_size for name in ("pooled", "random")} == {64}


def test_records_state_settings_in_one_group():
    shape = gpu_finetune.recorded("0.5-layer-predictors")
    assert (shape["keep"], shape["keep_mlp"], shape["select_at"]) == (0.5, 0.5, "all")
    assert "layerwise" not in shape
    assert "loss" not in shape
    assert gpu_finetune.recorded("0.5-layer-outside")["loss"] == "outside"


@pytest.mark.parametrize("variant", ["0.5", "0.5-all", "half-layer", "0.5-layer-best"])
def test_bad_variants(variant, capsys):
    with pytest.raises(SystemExit):
        options("--variants", variant)
    assert f"variant '{variant}'" in capsys.readouterr().err


def test_figures_pair_variants_with_the_peers_of_their_length():
    chosen = options("--peers-script", "peers.py")
    ours = {
        "step_ms": 50.0, "step_ms_range": [49.0, 51.0], "peak_gib": 20.0, "weights_gib": 15.0,
        "after_forward_gib": 18.0,
    }  # fmt: skip
    peer = {"step_ms": 100.0, "step_ms_range": [99.0, 101.0], "peak_gib": 40.0}
    results = [
        ({"name": "0.5-layer", "tokens": 1024, "ours": True}, ours),
        ({"name": "liger", "tokens": 1024, "ours": False}, peer),
        ({"name": "liger", "tokens": 2048, "ours": False}, peer),
    ]
    time, memory = json.loads(json.dumps(gpu_finetune.rows(chosen, results)))
    assert (time["ours"], time["peer"], time["ratio"], time["unit"]) == (50.0, "liger", 0.5, "ms")
    assert (memory["ours"], memory["ratio"], memory["unit"]) == (20.0, 0.5, "GiB")
    for record in (time, memory):
        assert record["shape"]["tokens"] == 1024
        assert (record["shape"]["keep"], record["shape"]["recompute"]) == (0.5, "layer")


def test_a_variant_without_a_peer_has_figures_of_its_own():
    ours = {
        "step_ms": 50.0, "step_ms_range": [49.0, 51.0], "peak_gib": 20.0, "weights_gib": 15.0,
        "after_forward_gib": 18.0,
    }  # fmt: skip
    results = [({"name": "0.25-layer", "tokens": 1 << 20, "ours": True}, ours)]
    time, memory = gpu_finetune.rows(options("--reps", "1"), results)
    assert (time["ours"], time["peer"], time["ratio"], time["reps"]) == (50.0, None, None, 1)
    assert (memory["ours"], memory["peer"], memory["ratio"]) == (20.0, None, None)
    assert time["shape"]["scorer"] == "random"


def test_random_predictors_can_be_loaded(tmp_path):
    config = llama_config(tokens=64, layers=2, shrink=32)
    folder = write_random_predictors(tmp_path / "predictors", config, block_size=64)
    loaded = predictors.load(folder)
    assert (loaded.num_layers, loaded.hidden_size, loaded.block_size) == (2, 128, 64)


@pytest.mark.cpu_only
def test_a_step_of_a_small_model(capsys, monkeypatch, tmp_path):
    small = ["--device", "cpu", "--shrink", "128", "--layers", "1", "--tokens", "256"]
    few = ["--reps", "1", "--warmup", "0", "--variants", "0.5-layer", "--commit", "abc"]
    output = tmp_path / "figures.jsonl"
    argv = ["gpu_finetune.py", *small, *few, "--output", str(output)]
    monkeypatch.setattr("sys.argv", argv)
    assert gpu_finetune.main() == 0
    time, memory = map(json.loads, output.read_text().splitlines())
    assert (time["bench"], time["peer"], time["commit"]) == (
        "finetune step",
        "checkpointing",
        "abc",
    )
    assert time["ours"] > 0
    assert time["ratio"] == round(time["ours"] / time["peer_value"], 4)
    assert (memory["bench"], memory["gpu"]) == ("finetune peak memory", None)
