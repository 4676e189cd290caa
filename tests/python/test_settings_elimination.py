"""LemoConfig: defaults, normal forms, files, and what it refuses."""

import json
import pickle

import pytest
import yaml

import lemo
from lemo import LemoConfig
from lemo.settings.elimination import LayerwiseConfig

# Settings alone.
pytestmark = pytest.mark.cpu_only

FULL = {
    "block_size": 32,
    "keep": 0.25,
    "keep_relevance": 0.5,
    "keep_least": 0.125,
    "keep_tokens": 256,
    "scorer": "predictor",
    "predictor": "some/folder",
    "heads": None,
    "scores": "scored",
    "keep_first": 2,
    "keep_last": 0,
    "visible_keys": "all",
    "mask_loss": False,
    "burn_in": 16,
    "loss_chunk": 4096,
    "recompute": "selective",
    "offload": [0.5, 1.0],
    "host_memory": 8.0,
    "cuda_graphs": "auto",
    "head_groups": 4,
    "products": "fp8",
    "path": "native",
    "seed": 7,
    "layerwise": {
        "policy": "threshold",
        "keep": [0.5, 1.0],
        "keep_mlp": 0.25,
        "thresholds": [0.1, -2.0],
        "mlp_thresholds": [0.0, 1e-3],
        "dense_layers": [],
        "select_at": [0, -1],
        "keep_schedule": [[0.0, 0.25], [0.85, 1.0]],
        "group_size": 128,
    },
}


def test_package_exports():
    assert lemo.__version__
    assert set(lemo.__all__) <= set(dir(lemo))
    assert lemo.LemoConfig is LemoConfig
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lemo.nothing


def test_defaults():
    config = LemoConfig()
    assert (config.block_size, config.keep, config.scorer) == (None, None, "auto")
    assert (config.keep_first, config.keep_last, config.visible_keys) == (0, 1, "kept")
    assert (config.mask_loss, config.loss_chunk) == (True, None)
    layerwise = config.layerwise
    assert (layerwise.policy, layerwise.keep, layerwise.keep_mlp) == ("ratio", None, None)
    assert (layerwise.dense_layers, layerwise.select_at) == ((), "first")
    assert layerwise.keep_schedule == ()


@pytest.mark.parametrize(
    ("values", "text", "answers"),
    [
        ({}, (0.25, 0.5, "random"), (64, 0.25, "lexical")),
        ({"keep": 0.75}, (0.25, 0.75, "random"), (64, 0.75, "lexical")),
        ({"block_size": 32}, (32, 0.5, "random"), (32, 0.25, "lexical")),
        ({"scorer": "given"}, (0.25, 0.5, "given"), (64, 0.25, "given")),
        ({"scorer": "random"}, (0.25, 0.5, "random"), (0.25, 0.5, "random")),
        ({"scorer": "lexical"}, (0.25, 0.5, "lexical"), (64, 0.25, "lexical")),
        ({"scorer": "pooled", "block_size": 8}, (8, 0.5, "pooled"), (8, 0.5, "pooled")),
    ],
)
def test_what_is_left_open_follows_the_batch(values, text, answers):
    config = LemoConfig(**values, seed=3)
    for expected, kind in ((text, False), (answers, True)):
        resolved = config.resolved(answers=kind)
        assert (resolved.block_size, resolved.keep, resolved.scorer) == expected
        assert resolved.seed == 3
        assert resolved.resolved(answers=not kind) == resolved


@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "every field"])
def test_round_trips(values, tmp_path):
    config = LemoConfig.from_dict(values)
    assert LemoConfig.from_dict(config.to_dict()) == config
    assert LemoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert LemoConfig.from_yaml(path) == config
    assert hash(config) == hash(LemoConfig.from_yaml(str(path)))
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_yaml_reads_on_and_off_as_booleans(value, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"cuda_graphs: {value}\n")
    config = LemoConfig.from_yaml(path)
    assert config.cuda_graphs == value
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert LemoConfig.from_yaml(path) == config


def test_every_field_is_in_the_round_trip():
    assert set(FULL) == set(LemoConfig.model_fields)
    assert set(FULL["layerwise"]) == set(LayerwiseConfig.model_fields)
    assert LemoConfig.from_dict(FULL).to_dict() == FULL


def test_configs_are_frozen_and_replaced():
    config = LemoConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.keep = 0.1
    changed = config.replace(keep=0.25, layerwise=config.layerwise.replace(dense_layers=[0]))
    assert (config.keep, changed.keep, changed.layerwise.dense_layers) == (None, 0.25, (0,))
    with pytest.raises(ValueError, match=r"keep: expected a number in \[0, 1\] or null, got 3"):
        config.replace(keep=3)


TOKENS = r"an integer in \[1, 2147483647\]"
GROUP = r"an integer in \[2, 2147483647\] or null"
TOKENS_OR_SHARE = rf"{TOKENS} or a number in \(0, 1\] or null"
SHARES = r"a list of numbers in \[0, 1\]"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, f"block_size: expected {TOKENS_OR_SHARE}, got 0"),
        ({"block_size": 64.0}, f"block_size: expected {TOKENS_OR_SHARE}, got 64.0"),
        ({"block_size": "big"}, f"block_size: expected {TOKENS_OR_SHARE}, got 'big'"),
        ({"block_size": True}, f"block_size: expected {TOKENS_OR_SHARE}, got True"),
        ({"keep": 1.5}, r"keep: expected a number in \[0, 1\] or null, got 1.5"),
        ({"keep": "half"}, r"keep: expected a number in \[0, 1\] or null, got 'half'"),
        ({"keep": float("nan")}, r"keep: expected a number in \[0, 1\] or null, got nan"),
        ({"keep": True}, r"keep: expected a number in \[0, 1\] or null, got True"),
        ({"keep": [0.5]}, r"keep: expected a number in \[0, 1\] or null, got \[0.5\]"),
        (
            {"scorer": "magic"},
            "scorer: expected one of auto, random, lexical, attention, given, pool",
        ),
        ({"scorer": "predictor"}, "predictor: scorer 'predictor' needs the folder"),
        ({"scorer": "attention"}, "heads: scorer 'attention' needs the file"),
        ({"heads": "file"}, "heads: is for scorer 'attention', got scorer 'auto'"),
        ({"predictor": "folder"}, "predictor: is for scorer 'predictor', got scorer 'auto'"),
        (
            {"scorer": "lexical", "heads": "file"},
            "heads: is for scorer 'attention', got scorer 'lexical'",
        ),
        (
            {"scorer": "random", "predictor": "folder"},
            "predictor: is for scorer 'predictor', got scorer 'random'",
        ),
        ({"predictor": 3}, "predictor: expected a text in UTF-8 or null, got 3"),
        ({"keep_first": -1}, r"keep_first: expected an integer in \[0, 2147483647\], got -1"),
        ({"keep_last": None}, r"keep_last: expected an integer in \[0, 2147483647\], got None"),
        ({"visible_keys": "some"}, "visible_keys: expected one of kept, all, computed, got 'some'"),
        ({"mask_loss": "yes"}, r"mask_loss: expected true or false or a number in .* got 'yes'"),
        ({"mask_loss": 0}, r"mask_loss: expected true or false or a number in \(0, 1\], got 0"),
        (
            {"burn_in": -1},
            r"burn_in: expected an integer in .* or a number in \[0, 1\), got -1",
        ),
        (
            {"burn_in": 1.0},
            r"burn_in: expected an integer in .* or a number in \[0, 1\), got 1.0",
        ),
        ({"burn_in": 8, "block_size": 8}, "burn_in: .* a block of 8, got 8"),
        ({"loss_chunk": 0}, f"loss_chunk: expected {TOKENS} or null, got 0"),
        # The operators count in 32 bits.
        ({"loss_chunk": 2**31}, f"loss_chunk: expected {TOKENS} or null, got 2147483648"),
        ({"block_size": 2**31}, f"block_size: expected {TOKENS_OR_SHARE}, got 2147483648"),
        ({"layerwise": {"group_size": 2**31}}, f"layerwise.group_size: expected {GROUP}, got 21"),
        ({"seed": 1.0}, r"seed: expected an integer in \[0, 2147483647\], got 1.0"),
        ({"seed": 2**31}, r"seed: expected an integer in \[0, 2147483647\], got 2147483648"),
        ({"recompute": "layer,all"}, "recompute: expected one of auto, .* got 'layer,all'"),
        ({"heads": ""}, "heads: expected a text in UTF-8 or null, not empty, got ''"),
        ({"layerwise": 3}, "layerwise: expected a group of settings, got 3"),
        ({"layerwise": {"policy": "top"}}, "layerwise.policy: expected one of ratio, threshold"),
        ({"layerwise": {"keep": [2]}}, rf"layerwise.keep: expected {SHARES} or null, got \[2\]"),
        ({"layerwise": {"keep": 0.5}}, f"layerwise.keep: expected {SHARES} or null, got 0.5"),
        ({"layerwise": {"keep_mlp": -1}}, r"layerwise.keep_mlp: expected a number in \[0, 1\] or"),
        ({"layerwise": {"thresholds": 1}}, "layerwise.thresholds: expected a list of numbers"),
        (
            {"layerwise": {"policy": "threshold"}},
            r"layerwise.thresholds: policy 'threshold' needs one for each layer, got null \(scorer",
        ),
        ({"layerwise": {"dense_layers": 3}}, "layerwise.dense_layers: expected a list of integers"),
        ({"layerwise": {"dense_layers": [0.5]}}, r"layerwise.dense_layers: .* got \[0.5\]"),
        ({"layerwise": {"select_at": "last"}}, "layerwise.select_at: expected one of first, all"),
        ({"layerwise": {"select_at": []}}, "layerwise.select_at: expected at least one layer"),
        ({"layerwise": {"group_size": 1}}, f"layerwise.group_size: expected {GROUP}, got 1"),
        ({"layerwise": {"keep_schedule": [0.5, 1.0]}}, r"layerwise.keep_schedule: .* got \[0.5,"),
        ({"layerwise": {"keep_schedule": [[0.5, 2]]}}, r"layerwise.keep_schedule: .* got \[\[0.5,"),
        (
            {"layerwise": {"keep_schedule": [[0.5, 1], [0.5, 0]]}},
            "layerwise.keep_schedule: expected ascending progress",
        ),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LemoConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keeps": 0.5}, "unknown setting 'keeps'; did you mean keep"),
        (
            {"dense_layers": [0]},
            r"unknown setting 'dense_layers'; did you mean layerwise.dense",
        ),
        ({"schedule": []}, r"unknown setting 'schedule'; did you mean layerwise\.keep_schedule"),
        ({"xyz": 0.5}, "unknown setting 'xyz'; known: block_size, keep, keep_relevance"),
        ({"layerwise": {"kep": 1}}, "layerwise: unknown setting 'kep'; did you mean keep"),
        ([1], r"values: expected a mapping of settings, got \[1\]"),
    ],
)
def test_unknown_names_get_a_hint(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LemoConfig.from_dict(values)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        LemoConfig.from_yaml(tmp_path / "none.yaml")
    for content, message in [
        ("keep: [", "not YAML"),
        ("- 1", "expected a mapping of settings, got list"),
        ("keep: 2", r"keep: expected a number in \[0, 1\] or null, got 2"),
    ]:
        path = tmp_path / "config.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            LemoConfig.from_yaml(path)
        assert "config.yaml" in str(caught.value)


def test_modes_of_layers():
    assert LemoConfig().recompute_modes(2) == ("auto", "auto")
    assert LemoConfig(recompute="layer").recompute_modes(2) == ("layer", "layer")
    # As an option gives it.
    config = LemoConfig(recompute="layer, none")
    assert config.recompute_modes(2) == ("layer", "none")
    with pytest.raises(ValueError, match="recompute: expected 3 entries, one for each layer, got"):
        config.recompute_modes(3)
