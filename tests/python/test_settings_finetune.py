"""FinetuneConfig: defaults, round trips, and the message for every field that does not fit."""

import json
import re

import pytest
import yaml

from lemo import LemoConfig
from lemo.settings.base import expected, fields_of, read_yaml
from lemo.settings.finetune import FinetuneConfig, compared, differences

# Settings alone.
pytestmark = pytest.mark.cpu_only

NEEDED = {"model": "m", "documents": "d.jsonl", "output": "run"}


@pytest.mark.parametrize(
    "elimination", [LemoConfig(keep=0.25, layerwise={"keep_schedule": [[0.8, 1.0]]}), None]
)
def test_round_trip_through_yaml(elimination):
    config = FinetuneConfig(**NEEDED, lora_targets="q_proj, v_proj", elimination=elimination)
    text = yaml.safe_dump(config.to_dict())
    assert FinetuneConfig.from_dict(yaml.safe_load(text)) == config
    assert config.lora_targets == ("q_proj", "v_proj")


def test_elimination_is_on_by_default_and_null_turns_it_off():
    assert FinetuneConfig.from_dict(NEEDED).elimination == LemoConfig()
    assert FinetuneConfig.from_dict(NEEDED | {"elimination": None}).elimination is None


def test_a_float_that_yaml_takes_for_a_string():
    values = yaml.safe_load("learning_rate: 2e-4")
    assert isinstance(values["learning_rate"], str)
    assert FinetuneConfig.from_dict(NEEDED | values).learning_rate == 2e-4


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "an integer in [1, 2147483647]"),
        ("steps", True, "an integer in [1, 2147483647]"),
        ("context_length", 1, "an integer in [2, 2147483647]"),
        ("batch_size", 1.5, "an integer in [1, 1048576]"),
        ("warmup_steps", -1, "an integer in [0, 2147483647]"),
        ("learning_rate", "fast", "a number in [0, 1e+30]"),
        ("learning_rate", float("nan"), "a number in [0, 1e+30]"),
        ("lora_dropout", 1.0, "a number in [0, 1)"),
        ("max_grad_norm", -1, "a number >= 0"),
        ("rope_scaling", "longrope", "one of linear, yarn, dynamic, none"),
        ("lr_schedule", "linear", "one of cosine, constant"),
        ("dtype", "int8", "one of auto, float32, bfloat16, float16"),
        ("device", "gpu", "one of auto, cpu, cuda"),
        ("train_norms", "yes", "true or false"),
        ("model", "", "a text in UTF-8, not empty"),
        ("seed", 2**31, "an integer in [0, 2147483647]"),
        ("output", "run\udcff", "a text in UTF-8"),
        ("lora_targets", [], "a list of texts in UTF-8 or null, not empty"),
        ("lora_targets", [1], "a list of texts in UTF-8 or null"),
    ],
)
def test_a_bad_value_is_named(name, value, expected):
    message = re.escape(f"{name}: expected {expected}, got {value!r}")
    with pytest.raises(ValueError, match=f"^{message}"):
        FinetuneConfig.from_dict(NEEDED | {name: value})


# Numbers of layers are compared with the model's.
OF_LAYERS = ("elimination.layerwise.dense_layers", "elimination.layerwise.select_at")


@pytest.mark.parametrize("size", [10**12, 10**24])
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, field in fields_of(FinetuneConfig)
        if "an integer" in expected(field) and name not in OF_LAYERS
    ],
)
def test_sizes_that_nothing_has_are_named_before_anything_is_read(name, size):
    group, _, last = name.rpartition(".")
    values = {last: size}
    for outer in reversed(group.split(".") if group else []):
        values = {outer: values}
    with pytest.raises(ValueError, match=f"^{name}: expected an integer"):
        FinetuneConfig.from_dict(NEEDED | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"batch_size": 2**18},
            "batch_size: expected at most 262143 times 8192 tokens, since a step has 2147483647 at "
            "most, got 262144",
        ),
        (
            {"batch_size": 512, "gradient_accumulation": 512},
            "gradient_accumulation: expected at most 511 times 4194304 tokens",
        ),
        ({"memory_limit": 1e300}, r"memory_limit: expected a number in \(0, 1073741824\] or null"),
        ({"elimination": {"host_memory": 1e300}}, r"host_memory: expected .* \[0, 1073741824\]"),
        (
            {"learning_rate": 1e300},
            r"learning_rate: expected .* in \[0, 1e\+30\], got 1e\+300",
        ),
        ({"lora_alpha": 1e300}, r"lora_alpha: expected .* in \[0, 1e\+30\], got 1e\+300"),
    ],
)
def test_steps_that_no_memory_holds_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.from_dict(NEEDED | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "unknown setting 'stepz'; did you mean steps"),
        ({3: 3}, "unknown setting '3'; known: model, "),
        ({"elimination": {3: 3}}, "elimination: unknown setting '3'; known: block_size, "),
        (
            {"elimination": {"layerwise": {None: 3}}},
            r"elimination\.layerwise: unknown setting 'None'; known: policy, ",
        ),
        ({"output": "a\0b"}, r"output: expected a text in UTF-8, got 'a\\x00b'"),
        ({"zzz": 3}, "unknown setting 'zzz'; known: model, documents"),
        ({"elimination": {"kep": 0.5}}, "elimination: unknown setting 'kep'; did you mean keep"),
        ({"elimination": {"keep": 2}}, r"elimination\.keep: expected"),
        ({"elimination": 0.5}, "elimination: expected a group of settings or null, got 0.5"),
        ({"model": None}, "model: expected a text in UTF-8, got None"),
        ({"resume": True, "overwrite": True}, "resume, overwrite: expected at most one"),
        (
            {"shard": True, "elimination": {"host_memory": 8}},
            "shard: expected false beside elimination.host_memory, got true",
        ),
        (
            {"context_parallel": 2, "elimination": {"host_memory": 8}},
            "context_parallel: expected 1 beside elimination.host_memory, got 2",
        ),
    ],
)
def test_settings_that_do_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.from_dict(NEEDED | values)


def test_differences_name_what_decides_the_losses_only():
    schedule = {"keep_schedule": [[0.8, 1.0]]}
    config = FinetuneConfig(**NEEDED, elimination=LemoConfig(keep=0.5, layerwise=schedule))
    watched = config.replace(resume=True, log_every=5, save_every=7, output="x")
    # As a checkpoint has them.
    saved = json.loads(json.dumps(compared(config)))
    assert differences(saved, watched) == []
    other = config.replace(steps=7, elimination=LemoConfig(keep=0.25, layerwise=schedule))
    assert differences(saved, other) == [
        "steps was 100, now 7",
        "elimination.keep was 0.5, now 0.25",
    ]
    assert differences(saved, config.replace(device="cpu")) == ["device was 'auto', now 'cpu'"]
    dense = config.replace(elimination=None)
    # Its settings differ with it: nothing more to say.
    assert differences(saved, dense) == ["elimination was 'on', now 'off'"]
    assert differences(compared(dense), config) == ["elimination was 'off', now 'on'"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", r"c\.yaml:2: not YAML"),
        ("a: 1\nb: 2\na: 3", r"c\.yaml:3: not YAML: the key 'a' stands twice"),
        ("a:\n  b: 1\n  b: 2", r"c\.yaml:3: not YAML: the key 'b' stands twice"),
        ("a: 1\nseed: 2026-13-45", r"c\.yaml:2: not YAML: month must be in 1\.\.12"),
        ("a: 1\nseed: " + "9" * 5000, r"c\.yaml:2: not YAML: Exceeds the limit"),
        ("a: 1\nseed: 0x" + "f" * 5000, r"c\.yaml:2: not YAML: Exceeds the limit"),
        ("seed: " + "[" * 10_000, r"c\.yaml: not YAML: "),
        ("- 1", r"c\.yaml: expected a mapping of settings, got list"),
    ],
)
def test_broken_yaml(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "c.yaml")


def test_yaml_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.yaml' does not exist"):
        read_yaml(tmp_path / "no.yaml")
    with pytest.raises(IsADirectoryError, match="config: expected a YAML file, but .* is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "c.yaml").write_text("")
    assert read_yaml(tmp_path / "c.yaml") == {}
