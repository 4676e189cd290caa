"""What the generic path leaves as it was, what it refuses, and how models are found out."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    MllamaForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.phi3 import modeling_phi3

import lemo
from generic_cases import (
    BLOCK,
    assert_same,
    batch_of,
    kept_mask,
    make,
    masked_batch,
    settings,
    train,
)
from lemo import ops
from lemo.models.generic.path import GenericPath
from lemo.models.native import NativePath
from tiny_models import flat_config, gradients, padded_batch
from tolerances import assert_close_fp32

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::FutureWarning")]


# Which path


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("llama", "auto", NativePath),
        ("llama", "native", NativePath),
        ("llama", "generic", GenericPath),
        ("own_llama", "auto", GenericPath),
        ("phi3", "auto", GenericPath),
    ],
)
def test_the_path_follows_the_class_and_the_settings(name, path, expected):
    handle = lemo.enable(make(name), settings(path=path))
    assert type(handle.path) is expected


def test_the_native_path_knows_its_classes_only():
    with pytest.raises(TypeError, match="expected one of LlamaForCausalLM, .* got Phi3ForCausalLM"):
        lemo.enable(make("phi3"), settings(path="native"))


# What stays as it was


def state_of(model):
    """Everything of a model that lemo may have touched."""
    found = [model.config._attn_implementation, model.model.config._attn_implementation]
    for name, module in model.named_modules():
        names = [key for key in vars(module) if not key.startswith("_") or "lemo" in key]
        found.append(
            (name, sorted(names), len(module._forward_pre_hooks), len(module._forward_hooks))
        )
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_removal_restores_the_model(attention):
    model = make("gemma3_text")
    model.set_attn_implementation(attention)
    before = state_of(model)
    handle = lemo.enable(model, settings())
    train(model, batch_of())
    assert state_of(model) != before
    handle.remove()
    assert state_of(model) == before
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_training_the_model_is_its_own(attention):
    model = make("gemma3_text")
    model.set_attn_implementation(attention)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings())
    batch = padded_batch([40, 30], side="left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**inputs).logits, dense(**inputs).logits)
    assert torch.equal(model.model(**inputs)[0], dense.model(**inputs)[0])
    model.eval(), dense.eval()
    texts = [one.generate(**inputs, max_new_tokens=5, do_sample=False) for one in (model, dense)]
    assert torch.equal(*texts)
    handle.remove()


def test_calls_without_labels_give_the_whole_models_logits():
    model = make("phi3")
    dense = copy.deepcopy(model)
    lemo.enable(model, settings())
    batch = batch_of()
    with pytest.warns(UserWarning, match="nothing is eliminated"):
        logits = model(batch["input_ids"]).logits
    expected = dense(batch["input_ids"]).logits
    assert_close_fp32(logits, expected)
    logits.square().sum().backward(), expected.square().sum().backward()
    assert_same(model, dense, logits, expected)


def test_checkpoints_of_the_whole_model_are_computed_as_it_computes():
    """Calls that lemo does not answer are computed again in backward, after the call."""
    model = make("mistral")
    dense = copy.deepcopy(model)
    lemo.enable(model, settings())
    for one in (model, dense):
        one.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [one(batch_of()["input_ids"]).logits.logsumexp(-1).sum() for one in (model, dense)]
    for loss in losses:
        loss.backward()
    assert_same(model, dense, *losses)


def test_logits_of_an_output_are_the_whole_models():
    model = make("granite")
    dense = copy.deepcopy(model)
    lemo.enable(model, settings())
    output = model(**batch_of())
    assert_close_fp32(output.logits, dense(**batch_of()).logits)


def test_copies_and_pickles_train_alike():
    model = make("phi3")
    handle = lemo.enable(model, settings())
    handle.begin_step(3, 10)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    loss = train(model, batch_of())
    for other in others:
        assert_same(other, model, train(other, batch_of()), loss)
    handle.remove()
    assert others[0].config._attn_implementation != model.config._attn_implementation == "eager"


def test_saved_models_know_nothing_of_lemo(tmp_path):
    model = make("phi3")
    lemo.enable(model, settings())
    model.save_pretrained(tmp_path)
    assert "lemo" not in (tmp_path / "config.json").read_text()


def test_hooks_and_forwards_of_the_users_run_on_kept_rows():
    model = make("phi3")
    rows, scaled = [], copy.deepcopy(model)
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(
        lambda m, args, kwargs, out: rows.append(out[0].shape[1]), with_kwargs=True
    )
    for one in (model, scaled):
        mlp = one.model.layers[0].mlp
        mlp.register_forward_hook(lambda m, args, out: 1.5 * out)
        one.model.norm.forward = lambda x, norm=one.model.norm: 2 * type(norm).forward(norm, x)
    handle = lemo.enable(model, settings())
    batch = batch_of()
    loss = train(model, batch)
    kept = kept_mask(handle, batch)
    # The norm's forward is a user's, so a look at how tokens are treated comes before the pass.
    assert rows == [16, 11, 32, int(kept.sum())]
    assert_same(model, scaled, loss, train(scaled, masked_batch(batch, kept)))


def test_routers_see_kept_rows_only():
    model = make("qwen3_moe")
    handle = lemo.enable(model, settings())
    seen = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    output = model(**batch_of())
    assert [len(x) for x in seen] == [handle.statistics()[0].attention_rows]
    assert output.aux_loss > 0


def test_losses_over_several_micro_batches():
    model = make("qwen3_moe")
    dense = copy.deepcopy(model)
    lemo.enable(model, settings(1.0))
    for items in (300, torch.tensor(77)):
        losses = [one(**batch_of(), num_items_in_batch=items).loss for one in (model, dense)]
        assert_close_fp32(*losses)


def test_the_loss_outside_of_training():
    model = make("phi3").eval()
    handle = lemo.enable(model, settings())
    with torch.no_grad():
        loss = handle.loss(**batch_of())
    handle.remove()
    oracle = model(**masked_batch(batch_of(), kept_mask(handle, batch_of()))).loss
    assert_close_fp32(loss, oracle)


def test_schedules_keep_the_same_set_in_all_layers():
    model = make("phi3")
    config = settings(layerwise={"keep_schedule": [[0.0, 0.25], [0.5, 1.0]]})
    handle = lemo.enable(model, config)
    shares = []
    for step in (0, 1):
        handle.begin_step(step, 2)
        train(model, batch_of())
        shares.append(handle.statistics()[2].attention_rows / 122)
    assert shares[0] < 0.4
    assert shares[1] == 1


# The head


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", ["granite", "cohere2", "capped"])
def test_logits_that_are_not_the_heads(name, chunk):
    overrides = {"final_logit_softcapping": 1.5, "attn_logit_softcapping": None}
    model = make("gemma2", **overrides) if name == "capped" else make(name)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings(loss_chunk=chunk))
    loss = train(model, batch_of())
    oracle = train(dense, masked_batch(batch_of(), kept_mask(handle, batch_of())))
    assert_same(model, dense, loss, oracle)


def test_small_logits_do_not_hide_a_cap():
    model = make("gemma2", attn_logit_softcapping=None)  # caps logits at 30
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    handle = lemo.enable(model, settings())
    train(model, batch_of())
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    dense = copy.deepcopy(model)
    dense._lemo_handle.remove()
    model.zero_grad(), dense.zero_grad()
    loss = train(model, batch_of())
    oracle = train(dense, masked_batch(batch_of(), kept_mask(handle, batch_of())))
    assert_same(model, dense, loss, oracle)


def fused_forward(self, input_ids=None, labels=None, use_cache=None, return_dict=None, **kwargs):
    """A library's forward of a causal LM: the loss without logits."""
    items = kwargs.pop("num_items_in_batch", None)
    states = self.model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
    labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = nn.functional.cross_entropy(
        self.lm_head(states).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    items = (labels != -100).sum() if items is None else items
    return modeling_phi3.CausalLMOutputWithPast(loss=loss / items, logits=None)


def test_forwards_of_other_libraries(monkeypatch):
    monkeypatch.setattr(modeling_phi3.Phi3ForCausalLM, "forward", fused_forward)
    model = make("phi3")
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings())
    loss = train(model, batch_of())
    oracle = train(dense, masked_batch(batch_of(), kept_mask(handle, batch_of())))
    assert_same(model, dense, loss, oracle)


def mean_forward(self, num_items_in_batch=None, **arguments):
    return fused_forward(self, **arguments)


def test_losses_that_are_no_sums_are_refused(monkeypatch):
    monkeypatch.setattr(modeling_phi3.Phi3ForCausalLM, "forward", mean_forward)
    model = make("phi3")
    lemo.enable(model, settings())
    with pytest.raises(ValueError, match="Phi3ForCausalLM to compute its loss as a sum"):
        model(**batch_of())


# What is refused


def tiny(name, kind=AutoModelForCausalLM, **settings):
    small = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config = AutoConfig.for_model(name)
    known = {key: value for key, value in (small | settings).items() if hasattr(config, key)}
    return kind.from_config(type(config)(**known)).train()


_PAD = {"pad_token_id": 0}
_NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
_FULL = {"layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 1, 0]}


@pytest.mark.parametrize(
    ("name", "more", "error", "message"),
    [
        ("mamba", {}, ValueError, "MambaForCausalLM has layers .* other than full and sliding"),
        ("lfm2", {"full_attn_idxs": [1]}, ValueError, r"Lfm2ForCausalLM has layers \(conv\)"),
        ("jamba", {"num_experts": 2}, ValueError, "JambaForCausalLM has layers"),
        ("rwkv", {}, ValueError, "RwkvForCausalLM has layers"),
        ("bloom", {}, ValueError, "BloomForCausalLM does not call Transformers' attention"),
        ("falcon", {}, ValueError, "FalconForCausalLM does not call Transformers' attention"),
        ("llama4_text", _FULL, ValueError, "Llama4TextAttention of Llama4For.* counts rows"),
        ("t5", {"kind": AutoModelForSeq2SeqLM}, TypeError, "got T5ForConditionalGeneration"),
        (
            "llama",
            {"kind": AutoModelForSequenceClassification},
            TypeError,
            "a head over its vocabulary, got LlamaForSequenceClassification",
        ),
    ],
)
def test_models_for_which_nothing_is_defined_are_named(name, more, error, message):
    with pytest.raises(error, match=message):
        lemo.enable(tiny(name, **more), settings())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "BertLMHeadModel masks attention by a rule of its own"),
        ("doge", "DogeForCausalLM reads its attention mask"),
    ],
)
def test_models_that_attend_in_another_way_are_named(name, message):
    model = tiny(name, attention_probs_dropout_prob=0.0)
    lemo.enable(model, settings())
    with pytest.raises((ValueError, NotImplementedError), match=message):
        model(**batch_of())


def test_layers_that_attend_to_images_alone_are_named():
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = MllamaTextConfig(**sizes, num_hidden_layers=2, cross_attention_layers=[1], **_PAD)
    with pytest.raises(ValueError, match="MllamaForCausalLM has layers that attend to images"):
        lemo.enable(MllamaForCausalLM(config), settings())


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_positions_that_do_not_begin_with_0_are_asked_for(keep):
    """RoBERTa's learned positions begin behind that of padding."""
    model = tiny("roberta", is_decoder=True, **_NO_DROPOUT)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings(keep))
    with pytest.raises(ValueError, match="position_ids: expected, since RobertaForCausalLM does"):
        model(**batch_of())
    with pytest.raises(ValueError, match="even with every token kept"):
        handle.verify(batch_of())
    batch = {**batch_of(), "position_ids": torch.arange(1, 62).expand(2, 61)}
    loss = train(model, batch)
    assert_same(
        model, dense, loss, train(dense, masked_batch(batch, kept_mask(handle, batch_of())))
    )


def test_hybrids_whose_layers_are_all_attention_are_none():
    names = {"layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"}
    names |= {"mamba_n_heads": 8, "mamba_d_head": 8, "shared_intermediate_size": 48}
    model = tiny("granitemoehybrid", num_local_experts=0, **names)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings())
    loss = train(model, batch_of())
    oracle = train(dense, masked_batch(batch_of(), kept_mask(handle, batch_of())))
    assert_same(model, dense, loss, oracle)


def test_heads_of_a_size_that_no_kernel_has_are_named(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("segment_attention: argument 'q': no kernel for heads of 8")

    monkeypatch.setattr(ops, "segment_attention", refuse)
    model = make("phi3")
    lemo.enable(model, settings())
    with pytest.raises(NotImplementedError, match="Phi3ForCausalLM needs more: .* heads of 8"):
        model(**batch_of())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scorer": "pooled"}, "scorer: expected auto, random, lexical or given"),
        ({"scorer": "exact"}, "scorer: expected"),
        ({"visible_keys": "computed"}, "visible_keys: expected kept"),
        ({"mask_loss": False}, "mask_loss: expected true"),
        ({"recompute": "layer"}, r"recompute: expected auto; model.gradient_checkpointing_enable"),
        ({"dense_layers": [0]}, r"layerwise.dense_layers: expected \(\), one kept set"),
        ({"keep": [0.5, 0.5, 1.0]}, "layerwise.keep: expected None, one kept set"),
        ({"select_at": "all"}, "layerwise.select_at"),
    ],
)
def test_settings_that_need_the_inside_of_layers_are_named(more, message):
    config = flat_config(**{"block_size": BLOCK, "path": "generic"} | more)
    with pytest.raises(ValueError, match=message) as error:
        lemo.enable(make("phi3"), config)
    assert "Phi3ForCausalLM" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_hidden_states": True}, "output_hidden_states: not available with labels"),
        ({"output_attentions": True}, "output_attentions: not available"),
        ({"position_ids": torch.arange(60)[None]}, r"position_ids: expected .*, got \[1, 60\]"),
        ({"token_weights": torch.ones(2, 61)}, "token_weights: Phi3ForCausalLM gives it to its"),
    ],
)
def test_arguments_whose_rows_are_unknown_are_named(arguments, message):
    model = make("phi3")
    lemo.enable(model, settings())
    with pytest.raises(ValueError, match=message):
        model(**batch_of(), **arguments)


def test_dropout_of_attention_is_named():
    model = make("phi3", attention_dropout=0.1)
    lemo.enable(model, settings())
    with pytest.raises(ValueError, match="attention_dropout: .* Phi3ForCausalLM has 0.1"):
        model(**batch_of())


def own_attention(module, query, key, value, attention_mask, **kwargs):
    return torch.zeros_like(query).transpose(1, 2), None


def test_attention_of_the_users_is_not_replaced(monkeypatch):
    AttentionInterface.register("own", own_attention)
    AttentionMaskInterface.register("own", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = make("phi3")
    model.set_attn_implementation("own")
    with pytest.raises(
        ValueError, match="attn_implementation: .* got 'own' from test_generic_path"
    ):
        lemo.enable(model, settings())
    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", own_attention)
    with pytest.raises(ValueError, match="attn_implementation: .* got 'eager' from"):
        lemo.enable(make("gemma3_text"), settings())


# Models that would be wrong


class CountingModel(modeling_phi3.Phi3Model):
    def forward(self, *args, position_ids=None, **kwargs):
        count = kwargs["input_ids"].shape[1]
        return super().forward(*args, position_ids=torch.arange(count)[None], **kwargs)


class ForgetfulModel(modeling_phi3.Phi3Model):
    """Takes positions, and its layers get none."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, position_ids=torch.zeros(1, 1).long(), **kwargs)


class SkippingLayer(modeling_phi3.Phi3DecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (CountingModel, "of Phi3ForCausalLM counts the kept rows"),
        (ForgetfulModel, "Phi3ForCausalLM was given the positions .* no part of it reads"),
        (SkippingLayer, "every layer of Phi3ForCausalLM to attend .* no call of it by layer 1"),
    ],
)
def test_rows_that_are_used_in_another_way_are_found_in_the_first_pass(change, message):
    model = make("phi3")
    (model.model.layers[1] if change is SkippingLayer else model.model).__class__ = change
    lemo.enable(model, settings())
    with pytest.raises(ValueError, match=message):
        model(**batch_of())


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("keep", [0.5, 1])
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_tokens_that_follow_one_another_are_no_count_of_rows(name, keep, first):
    """As in a first try with torch.arange, or where few rows happen to be so."""
    model, dense = make(name), make(name)
    handle = lemo.enable(model, settings(keep=keep, keep_first=1, keep_last=0))
    ids = torch.arange(first, first + 2 * BLOCK)[None]
    batch = {"input_ids": ids, "labels": ids}
    loss = train(model, batch)
    assert_same(model, dense, loss, train(dense, masked_batch(batch, kept_mask(handle, batch))))


@pytest.mark.parametrize("name", ["phi3", "opt", "qwen3_moe", "gemma3_text", "granite", "gpt2"])
def test_verify_passes_where_nothing_is_wrong(name):
    model = make(name)
    handle = lemo.enable(model, settings())
    before = torch.get_rng_state()
    handle.verify(batch_of())
    handle.verify(padded_batch([30, 61]))
    assert not gradients(model)
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in model.modules())


def mix_rows(module, args):
    """Takes something from the row before, as convolutions do."""
    return args[0] + 0.5 * nn.functional.pad(args[0], (0, 0, 1, 0))[:, :-1]


def test_verify_finds_what_rows_cannot_show():
    model = make("phi3")
    model.model.layers[1].mlp.register_forward_pre_hook(mix_rows)
    handle = lemo.enable(model, settings())
    with pytest.raises(ValueError, match="Phi3ForCausalLM computes, with half of the tokens kept"):
        handle.verify(batch_of())


# Shifted groups


def grouped_mask(mask, size, heads):
    """[B, heads, S, S] fp32, what to add to scores: kept tokens of a query's own group.

    Half of the heads have groups that are shifted by half of one. Positions are columns here.
    """
    i = torch.arange(mask.shape[1])
    group = torch.stack([i // size] * (heads // 2) + [(i + size // 2) // size] * (heads // 2))
    seen = (i[:, None] >= i)[None] & (group[:, :, None] == group[:, None, :])
    # A row that is left out sees itself, so that its softmax has a sum.
    seen = seen[None] & mask[:, None, None, :].bool() | torch.eye(len(i), dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("name", ["phi3", "glm4"])
def test_shifted_groups_are_those_of_the_sequence(name, keep):
    """Against eager attention with a mask of every head."""
    model = make(name)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings(keep=keep, layerwise={"group_size": 12}))
    batch = batch_of()
    loss = train(model, batch)
    kept = masked_batch(batch, kept_mask(handle, batch))
    mask = grouped_mask(kept["attention_mask"], 12, model.config.num_attention_heads)
    oracle = train(dense, {**kept, "attention_mask": mask})
    assert_same(model, dense, loss, oracle)
    without = train(copy.deepcopy(dense), kept)
    assert abs(without - oracle) > 1e-3 * oracle


@pytest.mark.parametrize("path", ["native", "generic"])
def test_verify_compares_without_shifted_groups(path):
    model = make("llama")
    handle = lemo.enable(model, settings(path=path, layerwise={"group_size": 12}))
    handle.verify(batch_of())


def test_logits_have_no_shifted_groups_and_say_so():
    model = make("llama")
    dense = copy.deepcopy(model)
    lemo.enable(model, settings(keep=1.0, path="native", layerwise={"group_size": 12}))
    ids = batch_of()["input_ids"]
    with pytest.warns(UserWarning, match="layerwise.group_size: without effect"):
        logits = model(ids).logits
    assert_close_fp32(logits, dense(ids).logits)
