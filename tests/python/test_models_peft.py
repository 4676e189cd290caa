"""Every kind of PEFT's adapters, in both paths: right, or refused by name."""

import copy
from functools import partial

import peft
import pytest
import torch

import lemo
from generic_cases import BLOCK, kept_mask, make, masked_batch
from lemo import LemoConfig
from tiny_models import gradients, make_ids, padded_batch
from tolerances import assert_close_fp32

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]

QV = ["q_proj", "v_proj"]
ALL = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEAD = ["embed_tokens", "lm_head"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def lora_of(modules=QV, **more):
    return peft.LoraConfig(target_modules=modules, r=4, task_type="CAUSAL_LM", **more)


def of(kind, modules=QV, **more):
    return getattr(peft, kind)(target_modules=modules, task_type="CAUSAL_LM", **more)


def prompts(kind, **more):
    return getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM", **more)


KINDS = {
    "LoRA of all linear layers": lora_of("all-linear"),
    "DoRA": lora_of(ALL, use_dora=True),
    "rsLoRA with biases": lora_of(use_rslora=True, lora_bias=True),
    "LoRA of embedding and head": lora_of(QV + HEAD),
    "embedding and head saved": lora_of(modules_to_save=HEAD),
    "final norm saved": lora_of(modules_to_save=["norm"]),
    "some tokens": lora_of(trainable_token_indices=[3, 4, 9]),
    "parameters": lora_of(["v_proj"], target_parameters=["q_proj.weight", "lm_head.weight"]),
    "one layer": lora_of(layers_to_transform=[1]),
    "patterns": lora_of(ALL, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 16}),
    "biases of the layers": lora_of(ALL, bias="all"),
    "PiSSA": lora_of(ALL, init_lora_weights="pissa"),
    "repeated layers": lora_of(layer_replication=[[0, 2], [1, 3]]),
    "LoHa": of("LoHaConfig", ALL, r=4),
    "LoKr": of("LoKrConfig", ALL, r=4),
    "AdaLoRA": of("AdaLoraConfig", ALL, init_r=4, target_r=2, total_step=100),
    "IA3": of("IA3Config", ["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": of("VeraConfig", ["q_proj"], r=4),
    "OFT": of("OFTConfig", oft_block_size=8, r=0),
    "BOFT": of("BOFTConfig", ["q_proj"], boft_block_size=8),
    "HRA": of("HRAConfig", r=2),
    "FourierFT": of("FourierFTConfig", n_frequency=20),
    "BEFT": of("BeftConfig", ["v_proj"]),
    "C3A": of("C3AConfig", block_size=8),
    "DEFT": of("DeftConfig", r=4),
    "FRoD": of("FrodConfig", ["q_proj"]),
    "GLoRA": of("GloraConfig", r=4),
    "GraLoRA": of("GraloraConfig", r=4, gralora_k=2),
    "HiRA": of("HiraConfig", r=4),
    "MiSS": of("MissConfig", r=4),
    "PEANuT": of("PeanutConfig", r=4, depth=2),
    "PSOFT": of("PsoftConfig", r=4),
    "RoAd": of("RoadConfig", group_size=16),
    "SHiRA": of("ShiraConfig", r=4),
    "SuperTuning": of("SupertuningConfig"),
    "TinyLoRA": of("TinyLoraConfig"),
    "trained tokens": of("TrainableTokensConfig", ["embed_tokens"], token_indices=[3, 4, 9]),
    "Uni-LoRA": of("UniLoraConfig"),
    "VB-LoRA": of("VBLoRAConfig", vector_length=8, num_vectors=16, r=4),
    "WaveFT": of("WaveFTConfig", n_frequency=20),
    "QALoRA": lora_of(use_qalora=True),
    "norms": of("LNTuningConfig", ["input_layernorm", "norm"]),
    "prompt tuning": prompts("PromptTuningConfig"),
    "P-tuning": prompts("PromptEncoderConfig", encoder_hidden_size=16),
}


def batch_of():
    ids = make_ids(2, 61)
    return {"input_ids": ids, "labels": ids}


def adapted(config, name="llama"):
    """A model with adapters that do something."""
    torch.manual_seed(0)
    model = peft.get_peft_model(make(name), copy.deepcopy(config)).train()
    return noisy(model)


def noisy(model):
    generator = torch.Generator("cpu").manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def train(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss


def check(model, keep, path, batch=None, **settings):
    """A step of lemo's beside one of the model's own on the kept rows."""
    batch = batch_of() if batch is None else batch
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, LemoConfig(keep=keep, block_size=BLOCK, path=path, **settings))
    calls = []
    forward = handle.causal_lm.forward
    handle.causal_lm.forward = lambda *a, **k: calls.append(k) or forward(*a, **k)
    loss, mine = train(model, batch), gradients(model)
    given = calls[0]
    if given.get("input_ids") is None:
        given["input_ids"] = given["inputs_embeds"][..., 0]
    rows = handle.statistics()[0].attention_rows
    assert rows <= keep * given["labels"].numel() + 2 * BLOCK
    oracle = masked_batch(given, kept_mask(handle, {"input_ids": given["input_ids"]}))
    own = next(m for m in dense.modules() if type(m) is type(handle.causal_lm))
    inner = own.forward
    said = {name: oracle[name] for name in ("labels", "attention_mask", "position_ids")}
    own.forward = lambda *a, **k: inner(*a, **(k | said))
    assert_close_fp32(loss, train(dense, batch), "loss")
    theirs = gradients(dense)
    assert mine
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_close_fp32(mine[name], expected, name)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_kind(kind, path, keep):
    check(adapted(KINDS[kind]), keep, path)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", lora_of(["c_attn", "c_proj"], fan_in_fan_out=True)),
        ("qwen3_moe", lora_of(target_parameters=EXPERTS)),
        ("gpt_oss", lora_of(target_parameters=EXPERTS)),
    ],
)
def test_adapters_of_other_weights(name, config, keep):
    check(adapted(config, name), keep, "generic")


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("kind", ["prompt tuning", "P-tuning"])
def test_prompt_tuning_on_answers_says_what_to_set(kind, path):
    batch = batch_of()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :45] = -100
    model = adapted(KINDS[kind])
    handle = lemo.enable(model, LemoConfig(path=path))
    with pytest.raises(ValueError, match=r"'lexical' \(auto .* scorer='random', and keep_first=1"):
        train(model, batch)
    handle.remove()
    check(model, 0.5, path, batch, scorer="random", keep_first=1)
    assert all(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("path", ["native", "generic"])
def test_prompt_tuning_needs_padding_on_the_right(path):
    model = adapted(KINDS["prompt tuning"])
    lemo.enable(model, LemoConfig(keep=0.5, block_size=BLOCK, scorer="random", path=path))
    assert train(model, padded_batch([61, 40])) > 0
    with pytest.raises(ValueError, match="contiguous .* 2 runs in row 1; .* pad on the right"):
        train(model, padded_batch([61, 40], side="left"))


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("what", ["two", "merged", "disabled"])
def test_adapters_that_are_changed_later(what, path):
    model = adapted(KINDS["DoRA"] if what == "merged" else lora_of())
    if what == "two":
        model.add_adapter("other", lora_of(["o_proj", "v_proj"]))
        model.base_model.set_adapter(["default", "other"])
        noisy(model)
    elif what == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    check(model, 0.5, path)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("is_trained", [True, False])
def test_scalings_that_are_tensors(is_trained, path, keep):
    """Learned ones, of each output, and those of PEFT's hotswap, which changes them in place."""
    model = adapted(lora_of(ALL))
    scalings = []
    for module in list(model.modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            scaling = torch.tensor(module.scaling["default"])
            if is_trained:
                scaling = torch.nn.Parameter(scaling.expand(module.out_features).clone())
                module.learned_scaling = scaling
            module.scaling["default"] = scaling
            scalings.append(scaling)
    check(model, keep, path)
    assert is_trained == all(scaling.grad is not None for scaling in scalings)


@pytest.mark.parametrize("path", ["native", "generic"])
def test_adapters_that_look_for_words_are_refused(path):
    model = adapted(lora_of(alora_invocation_tokens=[7]))
    refused = partial(pytest.raises, ValueError, match="alora_invocation_tokens: expected None")
    with refused():
        lemo.enable(model, LemoConfig(keep=0.5, path=path))
    # Nor may they come later.
    model = adapted(lora_of())
    lemo.enable(model, LemoConfig(keep=0.5, block_size=BLOCK, path=path))
    train(model, batch_of())
    model.add_adapter("words", lora_of(alora_invocation_tokens=[7]))
    model.set_adapter("words")
    with refused():
        train(model, batch_of())


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("kind", ["Poly", "XLora", "Lily"])
def test_adapters_that_know_the_batch_are_refused(kind, path, tmp_path):
    config = of("PolyConfig", QV, r=4, n_tasks=2, n_skills=2)
    base = make("llama")
    if kind == "XLora":
        adapted(lora_of()).save_pretrained(tmp_path)
        base.config.use_cache = False
        hidden, parts = base.config.hidden_size, {"0": str(tmp_path)}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden, adapters=parts)
    elif kind == "Lily":
        config = of("LilyConfig", r=4)
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=f"peft_type: expected .* got {kind}Config"):
        lemo.enable(model, LemoConfig(keep=0.5, path=path))


def test_wrappers_that_hold_the_forward_come_after_lemo():
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    settings = LemoConfig(keep=0.5, block_size=BLOCK, path="generic")
    with pytest.raises(ValueError, match="AdaptionPromptModel calls the forward that Llama"):
        lemo.enable(peft.get_peft_model(make("llama"), copy.deepcopy(config)), settings)
    model = make("llama")
    handle = lemo.enable(model, settings)
    model = noisy(peft.get_peft_model(model, config))
    loss, mine = train(model, batch_of()), gradients(model)
    kept = kept_mask(handle, batch_of())
    handle.remove()
    assert_close_fp32(loss, train(model, masked_batch(batch_of(), kept)))
    for name, expected in gradients(model).items():
        assert_close_fp32(mine[name], expected, name)
