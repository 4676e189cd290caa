"""The benchmark of fine-tuning steps, as far as it goes without a GPU."""

import json

import pytest

import gpu_finetune
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


def test_the_defaults_are_valid():
    for chosen in (options(), options("--peers-script", "peers.py")):
        for variant in chosen.variants:
            settings = gpu_finetune.settings_of(gpu_finetune.at(variant)[0])
            if settings["scorer"] == "predictor":
                settings["predictor"] = "folder"
            assert LemoConfig(**settings).layerwise.dense_layers == ()
    # Without a scorer nothing but the share and recomputation is set.
    defaults = LemoConfig(keep=0.25, recompute="none")
    assert LemoConfig(**gpu_finetune.settings_of("0.25-none")) == defaults


def test_scorers_of_variants():
    def chosen(variant):
        settings = gpu_finetune.settings_of(variant)
        layerwise = settings["layerwise"]
        return settings["scorer"], layerwise["select_at"], layerwise["keep_mlp"]

    assert chosen("0.5-layer") == ("random", "first", None)
    assert chosen("0.5-layer-outside") == chosen("0.5-layer")
    assert chosen("0.5-layer-pooled") == ("pooled", "first", None)
    assert chosen("0.5-layer-random") == ("random", "all", None)
    assert chosen("0.5-layer-predictor") == ("predictor", "all", None)
    assert chosen("0.5-layer-predictors") == ("predictor", "all", 0.5)
    assert chosen("0.5-layer-computed") == ("random", "first", None)
    assert gpu_finetune.settings_of("0.5-layer-computed")["visible_keys"] == "computed"


@pytest.mark.parametrize("variant", ["0.5", "0.5-all", "half-layer", "0.5-layer-best"])
def test_bad_variants(variant, capsys):
    with pytest.raises(SystemExit):
        options("--variants", variant)
    assert f"variant '{variant}'" in capsys.readouterr().err


def test_figures_pair_variants_with_the_peers_of_their_length():
    chosen = options("--peers-script", "peers.py", "--commit", "abc")
    ours = {
        "step_ms": 50.0, "step_ms_range": [49.0, 51.0], "peak_gib": 20.0, "weights_gib": 15.0,
        "after_forward_gib": 18.0, "gpu": "H200", "torch": "2.11",
    }  # fmt: skip
    peer = {"step_ms": 100.0, "step_ms_range": [99.0, 101.0], "peak_gib": 40.0}
    results = [
        ({"name": "0.5-layer", "tokens": 1024, "ours": True}, ours),
        ({"name": "liger", "tokens": 1024, "ours": False}, peer),
        ({"name": "liger", "tokens": 2048, "ours": False}, peer),
    ]
    time, memory = json.loads(json.dumps(gpu_finetune.records(chosen, results)))
    assert (time["ours"], time["peer"], time["ratio"], time["unit"]) == (50.0, "liger", 0.5, "ms")
    assert (memory["ours"], memory["ratio"], memory["unit"]) == (20.0, 0.5, "GiB")
    for record in (time, memory):
        assert record["shape"]["tokens"] == 1024
        assert (record["shape"]["keep"], record["shape"]["recompute"]) == (0.5, "layer")
        assert (record["gpu"], record["commit"]) == ("H200", "abc")


def test_a_variant_without_a_peer_has_figures_of_its_own():
    ours = {
        "step_ms": 50.0, "step_ms_range": [49.0, 51.0], "peak_gib": 20.0, "weights_gib": 15.0,
        "after_forward_gib": 18.0, "gpu": "H200", "torch": "2.11",
    }  # fmt: skip
    results = [({"name": "0.25-layer", "tokens": 1 << 20, "ours": True}, ours)]
    time, memory = gpu_finetune.records(options("--reps", "1"), results)
    assert (time["ours"], time["peer"], time["ratio"], time["reps"]) == (50.0, None, None, 1)
    assert (memory["ours"], memory["peer"], memory["ratio"]) == (20.0, None, None)
    assert time["shape"]["scorer"] == "random"


def test_random_predictors_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_finetune.SHAPE, "hidden_size", 128)
    folder = gpu_finetune.write_predictors(tmp_path / "predictors", layers=2)
    loaded = predictors.load(folder)
    assert (loaded.num_layers, loaded.hidden_size, loaded.block_size) == (2, 128, 64)
