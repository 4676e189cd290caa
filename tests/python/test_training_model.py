"""Context extension, loading models and adapters."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, OPTConfig

from lemo import _C
from lemo.ops import supports_device
from lemo.settings.finetune import FinetuneConfig
from lemo.training import model as module
from lemo.training.model import (
    add_lora,
    extend_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    reach,
)
from tiny import save_tiny_llama

# Loading, and the choice of a device, simulated.
pytestmark = pytest.mark.cpu_only


def llama(**rope) -> LlamaConfig:
    parameters = {"rope_type": "default", "rope_theta": 10000.0} | rope
    return LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=64,
        rope_parameters=parameters,
    )


def frequencies(config: LlamaConfig, tokens: int) -> torch.Tensor:
    """Rotary frequencies after the model has seen ``tokens`` positions."""
    rotary = LlamaForCausalLM(config).model.rotary_emb
    rotary(torch.zeros(1), torch.arange(tokens)[None])
    return rotary.inv_freq.clone()


def test_linear_scaling_interpolates_positions():
    config = llama()
    base = frequencies(config, 64)
    extend_context(config, 256, "linear")
    torch.testing.assert_close(frequencies(config, 256), base / 4)
    assert config.max_position_embeddings == 256


def test_rotations_of_sliding_windows_stay():
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=64)
    before = copy.deepcopy(config.rope_parameters)
    extend_context(config, 256, "linear")
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    scaled = {"rope_type": "linear", "factor": 4.0}
    assert config.rope_parameters["full_attention"] == before["full_attention"] | scaled
    assert config.max_position_embeddings == 256


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_models_without_a_limit_reach_every_length(name):
    config = AutoConfig.for_model(name)
    before = config.to_dict()
    extend_context(config, 2**20, "linear")
    assert config.to_dict() == before


def test_yarn_keeps_fast_and_interpolates_slow_frequencies():
    config = llama()
    base = frequencies(config, 64)
    extend_context(config, 256, "yarn")
    ratio = base / frequencies(config, 256)
    assert ratio[0].item() == pytest.approx(1.0)
    assert ratio[-1].item() == pytest.approx(4.0)


def test_dynamic_scaling_acts_beyond_the_original_context_only():
    config = llama()
    base = frequencies(config, 64)
    extend_context(config, 256, "dynamic")
    torch.testing.assert_close(frequencies(config, 64), base)
    # NTK: theta * ((factor * length / original) - (factor - 1)) ** (d / (d - 2)), d = 8.
    theta = 10000.0 * (4 * 4 - 3) ** (8 / 6)
    expected = 1 / theta ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(frequencies(config, 256), expected)


@pytest.mark.parametrize(("length", "scaling"), [(64, "linear"), (16, "yarn"), (256, "none")])
def test_nothing_changes(length, scaling):
    config = llama()
    before = config.to_dict()
    extend_context(config, length, scaling)
    assert config.to_dict() == before


@pytest.mark.parametrize("scaling", ["linear", "none"])
def test_learned_positions_cannot_be_extended(scaling):
    config = OPTConfig(max_position_embeddings=64)
    extend_context(config, 64, scaling)
    with pytest.raises(ValueError, match="^context_length: expected at most 64, got 65.*opt has l"):
        extend_context(config, 65, scaling)
    with pytest.raises(ValueError, match="^lengths: expected at most 64, got 65: a model of type"):
        extend_context(config, 65, scaling, "lengths")


@pytest.mark.parametrize("scaling", ["linear", "yarn", "dynamic"])
def test_a_scaled_model_reaches_what_it_was_scaled_to(scaling):
    config = llama()
    assert reach(config) == 64
    extend_context(config, 200, scaling)
    assert reach(config) == 200
    assert reach(AutoConfig.for_model("bloom")) is None


def test_a_scaled_model_is_not_scaled_again():
    config = llama(rope_type="linear", factor=2.0)
    with pytest.raises(ValueError, match="rope_scaling: .* 'linear' for 64 tokens"):
        extend_context(config, 128, "yarn")


def test_dtypes():
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype: float16 needs a GPU"):
        pick_dtype("float16", cpu)
    gpu = torch.device("cuda")
    assert pick_dtype("float32", cpu, elimination=True) == torch.float32
    assert pick_dtype("float32", gpu) == torch.float32
    with pytest.raises(ValueError, match="dtype: elimination on a GPU computes in bfloat16 or"):
        pick_dtype("float32", gpu, elimination=True)


@pytest.mark.parametrize(
    ("name", "elimination", "gpu", "kernels", "expected"),
    [
        ("auto", True, True, True, "cuda"),
        ("auto", True, True, False, "cpu"),
        ("auto", True, False, True, "cpu"),
        ("auto", False, True, False, "cuda"),
        ("auto", False, False, False, "cpu"),
        ("cpu", False, True, True, "cpu"),
        ("cuda", True, True, True, "cuda"),
        ("cuda", False, True, False, "cuda"),
        ("cuda", True, True, False, "because elimination needs a lemo that was built with CUDA"),
        ("cuda", True, False, True, "because torch finds no CUDA GPU, got 'cuda'"),
        ("cuda", False, False, False, "because torch finds no CUDA GPU, got 'cuda'"),
        ("gpu", False, True, True, "device: expected one of auto, cpu, cuda, got 'gpu'"),
    ],
)
def test_devices(monkeypatch, name, elimination, gpu, kernels, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(module, "supports_device", lambda kind: kind == "cpu" or kernels)
    if expected in ("cpu", "cuda"):
        assert pick_device(name, elimination) == torch.device(expected)
    else:
        with pytest.raises(ValueError, match=f"^device: .*{expected.removeprefix('device: ')}"):
            pick_device(name, elimination)


@pytest.mark.parametrize(
    ("built", "gpu", "capability", "expected"),
    [
        (True, True, (8, 0), True),
        (True, True, (12, 0), True),
        (True, True, (7, 5), False),
        (False, True, (9, 0), False),
        (True, False, None, False),
    ],
)
def test_what_the_ops_need_of_a_gpu(monkeypatch, built, gpu, capability, expected):
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": built})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert [supports_device(kind) for kind in ("cpu", "cuda", "meta")] == [True, expected, False]


def test_models_that_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="'no/model' is neither a folder nor a model of"):
        load_config("no/model")
    with pytest.raises(FileNotFoundError, match="not a model folder: it has no config.json"):
        load_config(str(tmp_path))
    folder = save_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="the weights of '.*' are damaged"):
        load_model(str(folder), load_config(str(folder)), torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model: '.*' cannot be read"):
        load_model(str(folder), load_config(str(folder)), torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="expected a causal language model, got .* of type vit"):
        load_config(str(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def load(folder) -> LlamaForCausalLM:
    return load_model(str(folder), load_config(str(folder)), torch.float32)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


HEAD = "lm_head.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(HEAD), f"the checkpoint lacks {HEAD}"),
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            "the checkpoint lacks model.layers.1",
        ),
        (lambda w: w.update({BIAS: torch.ones(32)}), f"the model has no place for {BIAS}"),
        (
            lambda w: w.update({HEAD: torch.ones(9, 32)}),
            r"lm_head.weight is \[9, 32\], .*\[257, 32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    change_weights(folder, lambda weights: [change(weights), weights][1])
    with pytest.raises(
        ValueError, match=f"the weights of '.*' do not fit its config.json: {message}"
    ):
        load(folder)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_named(folder, number, dtype):
    def change(weights):
        weights[HEAD][5, 7] = float(number)
        return weights

    change_weights(folder, change)
    message = f"hold nan or infinity: {HEAD}; expected finite numbers in {str(dtype)[6:]}"
    with pytest.raises(ValueError, match=f"the weights of '.*' {message}"):
        load_model(str(folder), load_config(str(folder)), dtype)


def test_layers_that_the_config_does_not_count_are_named(folder):
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match="the model has no place for model.layers.1.*and 6 more"):
        load(folder)


def test_what_is_no_part_of_the_model_is_left_out(folder, caplog):
    change_weights(folder, lambda weights: weights | {"score.weight": torch.ones(3)})
    load(folder)
    assert "are no part of a causal language model and are not used: score.weight" in caplog.text


def test_tied_weights_are_not_missing(folder):
    change_weights(folder, lambda weights: {n: w for n, w in weights.items() if n != HEAD})
    change_config(folder, tie_word_embeddings=True)
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b"[]"),
        ("pytorch_model.bin", b"hello"),
        ("pytorch_model.bin", b""),
    ],
)
def test_damaged_weights(folder, name, content):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="model: the weights of '.*' are damaged"):
        load(folder)


def test_a_shard_that_is_not_there(folder):
    model = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert torch.equal(load(folder).lm_head.weight, model.lm_head.weight)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(OSError, match="model: '.*' cannot be read: .*model-00002-of-00004"):
        load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "none"},
        {"num_attention_heads": 0},
        {"hidden_size": "large"},
        {"vocab_size": -1},
        {"pad_token_id": 999},
        {"rope_parameters": {"rope_type": "none"}},
        {"model_type": "none"},
    ],
)
def test_a_config_that_makes_no_model(folder, fields):
    change_config(folder, **fields)
    with pytest.raises(
        ValueError, match="model: the config.json of '.*' (cannot be used|makes no)"
    ):
        load_config(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}"])
def test_files_of_the_tokenizer_that_are_damaged(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="model: '.*' has no tokenizer that can be loaded: ."):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_settings_for_generating_are_not_read(folder, content):
    (folder / "generation_config.json").write_text(content)
    load(folder)


def test_a_model_with_an_adapter_beside_it_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="model: '.*' holds an adapter .*; expected a model"):
        load_config(str(folder))


@pytest.mark.parametrize("train_norms", [False, True])
def test_lora_is_float32_on_every_linear_layer_but_the_head(tmp_path, train_norms):
    folder = save_tiny_llama(tmp_path / "model", layers=1)
    config = FinetuneConfig(
        model=str(folder), documents="d", output="o", lora_rank=4, train_norms=train_norms
    )
    model = add_lora(load_model(str(folder), load_config(str(folder)), torch.bfloat16), config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n in trained if ".lora_" in n}
    norms = {n.split(".modules_to_save")[0].rpartition(".")[2] for n in trained if "norm" in n}
    assert adapted == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert norms == (
        {"input_layernorm", "post_attention_layernorm", "norm"} if train_norms else set()
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.base_model.model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("w_query", "'w_query' is no module of the model; expected some of down_proj, gate_proj"),
        ("q_proj,w_query", "'w_query' is no module of the model"),
        ("q_proj,q_pro", "'q_pro' is no module of the model"),
        ("q_proj,mlp", "'mlp' is a LlamaMLP, which holds other modules"),
        ("q_proj,norm", "Target module LlamaRMSNorm.* is not supported"),
    ],
)
def test_lora_targets_that_are_not_there(whole, targets, message):
    config = FinetuneConfig(model="m", documents="d", output="o", lora_targets=targets)
    with pytest.raises(ValueError, match=f"lora_targets: .*{message}"):
        add_lora(load(whole), config)


def test_layers_that_are_not_linear_ones_of_torch_have_to_be_named(whole):
    """As those of GPTQ, in whose place the test puts modules of its own."""

    class Packed(torch.nn.Module):
        pass

    model = load(whole)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, _ in list(part.named_children()):
                if name.endswith("_proj"):
                    setattr(part, name, Packed())
    config = FinetuneConfig(model="m", documents="d", output="o")
    with pytest.raises(ValueError, match="lora_targets: expected names of modules, such as q_proj"):
        add_lora(model, config)


@pytest.mark.parametrize("targets", ["q_proj", "self_attn.q_proj,layers.1.mlp.up_proj"])
def test_lora_targets_by_the_end_of_their_names(whole, targets):
    config = FinetuneConfig(model="m", documents="d", output="o", lora_targets=targets)
    names = [
        name for name, p in add_lora(load(whole), config).named_parameters() if p.requires_grad
    ]
    assert len(names) == 2 * (targets.count("q_proj") * 2 + targets.count("up_proj"))
