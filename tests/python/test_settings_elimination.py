"""LemoConfig: defaults, normal forms, files, and what it refuses."""

import dataclasses
import json

import pytest
import yaml

import lemo
from lemo import LemoConfig

# Settings alone.
pytestmark = pytest.mark.cpu_only

FULL = {
    "block_size": 32,
    "policy": "threshold",
    "keep": [0.5, 1],
    "keep_mlp": 0.25,
    "thresholds": [0.1, -2],
    "mlp_thresholds": [0.0, 1e-3],
    "dense_layers": [],
    "select_at": [0, -1],
    "scorer": "predictor",
    "predictor": "some/folder",
    "keep_first": 2,
    "keep_last": 0,
    "visible_keys": "all",
    "group_size": 128,
    "schedule": [[0.0, 0.25], [0.85, 1.0]],
    "mask_loss": False,
    "burn_in": 16,
    "loss_chunk": 4096,
    "recompute": "selective",
    "seed": 7,
}


def test_package_exports():
    assert lemo.__version__
    assert set(lemo.__all__) <= set(dir(lemo))
    assert lemo.LemoConfig is LemoConfig
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lemo.nothing


def test_defaults():
    config = LemoConfig()
    assert (config.block_size, config.policy, config.keep, config.keep_mlp) == (
        0.25,
        "ratio",
        0.5,
        None,
    )
    assert (config.dense_layers, config.select_at, config.scorer) == ((), "first", "random")
    assert (config.keep_first, config.keep_last, config.visible_keys) == (0, 1, "kept")
    assert (config.schedule, config.mask_loss, config.loss_chunk) == ((), True, None)


@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "every field"])
def test_round_trips(values, tmp_path):
    config = LemoConfig.from_dict(values)
    assert set(values) <= {field.name for field in dataclasses.fields(config)}
    assert LemoConfig.from_dict(config.to_dict()) == config
    assert LemoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert LemoConfig.from_yaml(path) == config
    assert hash(config) == hash(LemoConfig.from_yaml(str(path)))


def test_to_dict_keeps_every_value():
    assert LemoConfig.from_dict(FULL).to_dict() == FULL


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LemoConfig().keep = 0.1


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size: expected at least 1, got 0"),
        ({"block_size": 64.0}, ValueError, "block_size: expected .* a share in .*, got 64.0"),
        ({"block_size": 0.0}, ValueError, "block_size: expected .* a share in .*, got 0.0"),
        ({"block_size": "big"}, TypeError, "block_size: expected an int, got 'big'"),
        ({"block_size": True}, TypeError, "block_size: expected an int, got True"),
        ({"policy": "top"}, ValueError, "policy: expected one of ratio, threshold, got 'top'"),
        ({"keep": 1.5}, ValueError, "keep: expected shares between 0 and 1, got 1.5"),
        ({"keep": "half"}, TypeError, "keep: expected a number or a list"),
        ({"keep": [0.5, "x"]}, TypeError, "keep: expected a list of finite numbers"),
        ({"keep": float("nan")}, TypeError, "keep: expected a number"),
        ({"keep": None}, TypeError, "keep: expected a number"),
        ({"keep_mlp": [0.5, -1]}, ValueError, "keep_mlp: expected shares between 0 and 1"),
        ({"thresholds": 0.5}, TypeError, "thresholds: expected a list"),
        ({"policy": "threshold"}, ValueError, "thresholds: policy 'threshold' needs one for each"),
        ({"dense_layers": 3}, TypeError, "dense_layers: expected a list of layer indices, got 3"),
        ({"dense_layers": [0.5]}, TypeError, "dense_layers: expected a list of layer indices"),
        ({"select_at": "last"}, ValueError, "select_at: expected 'first', 'all' or a list"),
        ({"select_at": []}, ValueError, "select_at: expected at least one layer"),
        ({"scorer": "magic"}, ValueError, "scorer: expected one of pooled, .*, got 'magic'"),
        ({"scorer": "predictor"}, ValueError, "predictor: scorer 'predictor' needs the folder"),
        ({"predictor": 3}, TypeError, "predictor: expected a path, got 3"),
        ({"keep_first": -1}, ValueError, "keep_first: expected at least 0, got -1"),
        ({"keep_last": None}, TypeError, "keep_last: expected an int, got None"),
        ({"visible_keys": "some"}, ValueError, "visible_keys: expected one of kept, all, computed"),
        ({"group_size": 1}, ValueError, "group_size: expected at least 2, got 1"),
        ({"schedule": [0.5, 1.0]}, TypeError, r"schedule: expected a list of \[progress, keep\]"),
        ({"schedule": [[0.5, 2.0]]}, ValueError, r"schedule: expected .* got \[0.5, 2.0\]"),
        ({"schedule": [[0.5, 1], [0.5, 0]]}, ValueError, "schedule: expected ascending progress"),
        ({"mask_loss": "yes"}, TypeError, "mask_loss: expected a bool or a share, got 'yes'"),
        ({"mask_loss": 0}, ValueError, r"mask_loss: expected a bool or a share in \(0, 1\], got 0"),
        ({"burn_in": -1}, ValueError, "burn_in: expected at least 0, got -1"),
        ({"burn_in": 1.5}, ValueError, r"burn_in: expected .* a share in \[0, 1\), got 1.5"),
        ({"burn_in": 1.0}, ValueError, r"burn_in: expected .* a share in \[0, 1\), got 1.0"),
        ({"burn_in": 8, "block_size": 8}, ValueError, "burn_in: .* a block of 8, got 8"),
        ({"burn_in": None}, TypeError, "burn_in: expected an int, got None"),
        ({"loss_chunk": 0}, ValueError, "loss_chunk: expected at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
    ],
)
def test_bad_values_are_named(values, error, message):
    with pytest.raises(error, match=message):
        LemoConfig(**values)


def test_unknown_fields_get_a_hint():
    with pytest.raises(ValueError, match="no field 'keeps'; did you mean 'keep'"):
        LemoConfig.from_dict({"keeps": 0.5})
    with pytest.raises(ValueError, match="no field 'xyz'; known: block_size, policy"):
        LemoConfig.from_dict({"xyz": 0.5})
    with pytest.raises(TypeError, match="values: expected a mapping"):
        LemoConfig.from_dict([1])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        LemoConfig.from_yaml(tmp_path / "none.yaml")
    for content, message in [
        ("keep: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("keep: 2", "keep: expected shares between 0 and 1, got 2"),
    ]:
        path = tmp_path / "config.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            LemoConfig.from_yaml(path)
        assert "config.yaml" in str(caught.value)
