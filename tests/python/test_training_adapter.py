"""Adapters that are not whole, or not for the model that they are put into."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lemo.training.adapter import (
    base_model_name,
    embedding_of,
    load_adapter,
    origin_of,
    trained_config,
)
from lemo.training.model import MODEL_CONFIG, load_config, load_model, write_adapter
from limits import largest_file
from tiny import save_tiny_llama

# Loading alone.
pytestmark = pytest.mark.cpu_only

WEIGHTS = "adapter_model.safetensors"


def base(folder):
    return load_model(str(folder), load_config(str(folder)), torch.float32)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model_folder, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["norm"],
        init_lora_weights=False,
    )
    get_peft_model(base(model_folder), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_all_of_an_adapter_is_loaded(model_folder, folder):
    ids = torch.arange(20)[None]
    expected = PeftModel.from_pretrained(base(model_folder), folder)
    loaded = load_adapter(base(model_folder), folder, str(model_folder))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    with loaded.disable_adapter():
        assert not torch.equal(loaded(ids).logits, expected(ids).logits)


def test_a_configuration_that_the_disk_does_not_take_is_named(model_folder, tmp_path):
    model = get_peft_model(base(model_folder), LoraConfig(target_modules=["q_proj"]))
    with largest_file(400), pytest.raises(OSError, match=r"adapter_config\.json"):
        write_adapter(model, {"one": torch.zeros(1)}, tmp_path)


def without(weights, part):
    return {name: tensor for name, tensor in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "1.self_attn.q_proj.lora_B"), "lacks .*1.self_attn.q_proj.lora_B"),
        (lambda w: without(w, "norm"), "norm.weight"),
        (
            lambda w: w | {"base_model.model.x.lora_A.weight": torch.ones(1)},
            "no place for .*x.lora",
        ),
        (lambda w: {n: t[:1].clone() for n, t in w.items()}, "size mismatch"),
    ],
)
def test_weights_that_are_not_those_of_the_adapter(model_folder, folder, change, message):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"^adapter: .* or does not fit .*{message}"):
        load_adapter(base(model_folder), folder, str(model_folder))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (WEIGHTS, b"", "is damaged, or does not fit"),
        (WEIGHTS, None, f"has no {WEIGHTS}"),
        ("adapter_config.json", b"{", "adapter_config.json cannot be used"),
        ("adapter_config.json", b"[]", "adapter_config.json cannot be used"),
        ("adapter_config.json", b'{"peft_type": "NONE"}', "adapter_config.json cannot be used"),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": "x"}', "does not fit"),
    ],
)
def test_damaged_files(model_folder, folder, file, content, message):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^adapter: .*{message}"):
        load_adapter(base(model_folder), folder, str(model_folder))


def test_an_adapter_of_another_model_is_refused(folder, model_folder, tmp_path):
    other = str(save_tiny_llama(tmp_path / "other", layers=3))
    with pytest.raises(ValueError, match="or does not fit .*other.*layers.2"):
        load_adapter(base(other), folder, other)
    config = load_config(other)
    assert trained_config(folder, config, other) is config
    load_config(str(model_folder)).to_json_file(folder / MODEL_CONFIG)
    with pytest.raises(ValueError, match="trained on a model with num_layers 2, but '.*' has 3"):
        trained_config(folder, config, other)
    (folder / MODEL_CONFIG).write_text("{")
    with pytest.raises(ValueError, match="model_config.json cannot be used"):
        trained_config(folder, config, other)


@pytest.fixture
def written(model_folder, folder):
    """An adapter as a run leaves it."""
    model = base(model_folder)
    content = model.config.to_dict() | origin_of(folder, embedding_of(model))
    (folder / MODEL_CONFIG).write_text(json.dumps(content))
    return folder


def test_a_number_of_an_adapter_that_was_changed_is_warned_of(model_folder, written, caplog):
    load_adapter(base(model_folder), written, str(model_folder))
    assert not caplog.text
    content = bytearray((written / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (written / WEIGHTS).write_bytes(content)
    load_adapter(base(model_folder), written, str(model_folder))
    assert f"adapter: {written / WEIGHTS} is not what the run wrote: it was changed" in caplog.text


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        (lambda model: model, False),
        (lambda model: model.bfloat16(), False),
        (lambda model: type(model)(model.config), True),  # other random weights
    ],
)
def test_another_model_of_the_same_shape_is_warned_of(
    model_folder, written, caplog, change, warned
):
    torch.manual_seed(1)
    load_adapter(change(base(model_folder)), written, str(model_folder))
    message = f"adapter: {written}: made for another model of this shape, or for this one before"
    assert (message in caplog.text) == warned


def test_prompts_that_were_learned_are_no_adapter(model_folder, tmp_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(base(model_folder), prompt).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of the kind PROMPT_TUNING, which puts tokens in fro"):
        load_adapter(base(model_folder), tmp_path, str(model_folder))


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_base_model_that_cannot_be_read(folder, content):
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="^adapter: .*adapter_config.json cannot be used"):
        base_model_name(folder)


@pytest.mark.parametrize("name", [None, 3, ""])
def test_a_base_model_that_is_not_named(folder, name):
    content = json.dumps({"base_model_name_or_path": name})
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="model: expected a name, because .* names no base model"):
        base_model_name(folder)
