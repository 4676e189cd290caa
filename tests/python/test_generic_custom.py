"""The generic path on models with code of the user's own: layers, decoders, losses."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import conv1d, pad
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

import lemo
from generic_cases import (
    assert_same,
    batch_of,
    kept_mask,
    make,
    masked_batch,
    settings,
    train,
)
from tiny_models import gradients, padded_batch
from tolerances import assert_close_fp32

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::FutureWarning")]


def assert_trains(model):
    """With all rows and with half of them, as the model does with left-out tokens masked."""
    dense = copy.deepcopy(model)
    for keep in (1.0, 0.5):
        handle = lemo.enable(model, settings(keep))
        for batch in (batch_of(), padded_batch([61, 8, 45])):
            model.zero_grad(), dense.zero_grad()
            loss = train(model, batch)
            oracle = masked_batch(batch, kept_mask(handle, batch))
            assert_same(model, dense, loss, train(dense, oracle))
        handle.remove()


# Code that treats each token by itself


class ParallelLayer(LlamaDecoderLayer):
    """Attention and MLP of the same states, as in GPT-J."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=normed,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
        )
        return hidden_states + attended + self.mlp(normed)


def test_layers_of_the_users_own():
    model = make("llama")
    for layer in model.model.layers:
        layer.__class__ = ParallelLayer
    assert_trains(model)


def test_layers_that_stand_in_several_places():
    model = make("llama", use_cache=False)
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    assert_trains(model)


class DifferentialAttention(LlamaAttention):
    """The difference of two attentions, as in DiffLlama."""

    def forward(self, hidden_states, **kwargs):
        one, weights = super().forward(hidden_states, **kwargs)
        other, _ = super().forward(hidden_states.flip(-1), **kwargs)
        return one - 0.5 * other, weights


def test_layers_that_attend_twice():
    model = make("llama", use_cache=False)
    for layer in model.model.layers[:2]:
        layer.self_attn.__class__ = DifferentialAttention
    assert_trains(model)


class LoopingModel(LlamaModel):
    """Its layers run twice, one after another."""

    def forward(self, *args, inputs_embeds=None, **kwargs):
        states = super().forward(*args, inputs_embeds=inputs_embeds, **kwargs).last_hidden_state
        kwargs.pop("input_ids", None)
        return super().forward(inputs_embeds=states, **kwargs)


def test_layers_that_run_more_than_once():
    model = make("llama", use_cache=False)
    model.model.__class__ = LoopingModel
    assert_trains(model)


def test_layers_that_run_more_than_once_are_not_moved_to_the_host():
    model = make("llama", use_cache=False)
    model.model.__class__ = LoopingModel
    lemo.enable(model, settings(offload=0.5, host_memory=1))
    with pytest.raises(NotImplementedError, match="host_memory: .* layers more than once, 6 times"):
        model(**batch_of())


def test_layers_that_run_less_often_than_before_are_named():
    model = make("llama", use_cache=False)
    model.model.__class__ = LoopingModel
    lemo.enable(model, settings())
    train(model, batch_of())
    model.model.__class__ = LlamaModel
    with pytest.raises(ValueError, match="every layer .* to attend .* 6 calls in all, got 3"):
        model(**batch_of())


class PassingModel(LlamaModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_decoders_that_pass_their_arguments_on():
    model = make("llama")
    model.model.__class__ = PassingModel
    assert_trains(model)


CODE = """
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP
from transformers.models.llama.configuration_llama import LlamaConfig


class SquaringMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).square())


class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = SquaringMLP(config)
        self.post_init()
"""


def test_models_of_a_folder_with_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    model = make("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text(CODE)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, attn_implementation="eager"
    )
    assert type(model).__module__.startswith("transformers_modules")
    assert_trains(model.train())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_mixing(dtype):
    model = make("llama", num_hidden_layers=8).to(dtype)
    for layer in model.model.layers:
        layer.__class__ = ParallelLayer
    lemo.enable(model, settings())
    assert train(model, batch_of()).isfinite()


def test_no_graphs_are_compiled_to_look_at_code():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = make("llama")
    model.model.layers[0].__class__ = ParallelLayer
    eager = copy.deepcopy(model)
    for one in (model, eager):
        lemo.enable(one, settings())
    model.model.layers[0].compile(backend=counter)
    losses = train(model, batch_of()), train(eager, batch_of())
    assert_same(model, eager, *losses)
    assert counter.frame_count == 1


def test_code_of_transformers_is_not_looked_at():
    model = make("llama")
    counts = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: counts.append(out.shape[1]))
    handle = lemo.enable(model, settings())
    train(model, batch_of())
    assert counts == [int(kept_mask(handle, batch_of()).sum())]


# Code that mixes rows or counts them


class MixingMLP(LlamaMLP):
    """Takes a little from the row before."""

    def forward(self, x):
        return super().forward(x + 0.1 * pad(x, (0, 0, 1, 0))[:, :-1])


class ConvolvingAttention(LlamaAttention):
    """A short convolution by a parameter that no module of torch's shows."""

    def forward(self, hidden_states, **kwargs):
        kernel = torch.full((hidden_states.shape[-1], 1, 3), 0.2)
        before = pad(hidden_states.transpose(1, 2), (2, 0))
        mixed = conv1d(before, kernel, groups=len(kernel)).transpose(1, 2)
        return super().forward(hidden_states + mixed, **kwargs)


class ScalingAttention(LlamaAttention):
    """Scores by the logarithm of the number of tokens."""

    def forward(self, hidden_states, **kwargs):
        self.scaling = self.head_dim**-0.5 * math.log(hidden_states.shape[1])
        return super().forward(hidden_states, **kwargs)


class CenteringNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(1, keepdim=True))


class CountingRotary(LlamaRotaryEmbedding):
    """Reads no positions: what comes in counts from 0."""

    def forward(self, x, position_ids):
        return super().forward(x, torch.arange(x.shape[1])[None])


class SkippingLayer(LlamaDecoderLayer):
    """Of half of the tokens alone, as mixtures of depths."""

    def forward(self, hidden_states, **kwargs):
        scores = hidden_states.mean(-1)
        chosen = scores >= scores.median(1, keepdim=True).values
        return hidden_states.where(~chosen[..., None], super().forward(hidden_states, **kwargs))


class BigramModel(LlamaModel):
    """Embeds each token with the one before it."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            before = self.embed_tokens(pad(input_ids, (1, 0))[:, :-1])
            inputs_embeds = self.embed_tokens(input_ids) + 0.5 * before
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class ColumnModel(LlamaModel):
    """Scales states by their columns."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        columns = torch.arange(output.last_hidden_state.shape[1])
        output.last_hidden_state = output.last_hidden_state * (1 + columns / 50)[None, :, None]
        return output


PLACES = {
    MixingMLP: "layers.1.mlp",
    ConvolvingAttention: "layers.1.self_attn",
    ScalingAttention: "layers.0.self_attn",
    CenteringNorm: "norm",
    CountingRotary: "rotary_emb",
    SkippingLayer: "layers.1",
    BigramModel: "",
    ColumnModel: "",
}


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("cls", PLACES)
def test_code_that_mixes_or_counts_rows_is_named_in_the_first_pass(cls, keep):
    """Also with all rows: those of several sequences are one sequence to the layers."""
    model = make("llama")
    model.model.get_submodule(PLACES[cls]).__class__ = cls
    lemo.enable(model, settings(keep))
    message = f"LlamaForCausalLM to treat each token by itself .*{cls.__name__}"
    with pytest.raises(ValueError, match=message):
        model(**batch_of())
    assert not gradients(model)


def test_a_forward_of_an_instance_is_code_of_the_users_too():
    model = make("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: MixingMLP.forward(mlp, x)
    mlp.__class__ = type("Own", (MixingMLP,), {"__module__": modeling_llama.__name__})
    lemo.enable(model, settings())
    with pytest.raises(ValueError, match="LlamaForCausalLM to treat each token by itself"):
        model(**batch_of())


# Losses


class KeepingMLP(LlamaMLP):
    """Keeps what it adds to the loss, as routers of some models do."""

    def forward(self, x):
        result = super().forward(x)
        self.added = self.down_proj.weight.square().sum() + result.square().mean()
        return result


class AddingLlama(LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 0.01 * sum(x.mlp.added for x in self.model.layers)
        return output


def changed(cls):
    model = make("llama")
    model.__class__ = cls
    return model


def test_parts_of_a_loss_that_modules_keep():
    """Such as those of routers, which come of the kept rows."""
    model = changed(AddingLlama)
    for layer in model.model.layers:
        layer.mlp.__class__ = KeepingMLP
    dense = copy.deepcopy(model)
    lemo.enable(model, settings(1.0))
    assert_same(model, dense, train(model, batch_of()), train(dense, batch_of()))
    model._lemo_handle.remove()
    # Of the kept rows alone, not of all that the oracle computes.
    handle = lemo.enable(model, settings(0.5))
    model.zero_grad()
    loss = train(model, batch_of())
    added = sum(layer.mlp.added for layer in model.model.layers)
    plain = masked_batch(batch_of(), kept_mask(handle, batch_of()))
    dense.__class__ = LlamaForCausalLM
    assert_close_fp32(loss, dense(**plain).loss + 0.01 * added)


class StatesLlama(LlamaForCausalLM):
    """A loss with one more part, of logits."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 1e-5 * output.logits.logsumexp(-1).square().mean()
        return output


class DoublingLlama(AddingLlama):
    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = 2.0 * output.loss
        return output


class BigramLlama(LlamaForCausalLM):
    """Logits of the token itself are added."""

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        kwargs.pop("return_dict", None)
        states = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(states + self.model.embed_tokens(input_ids))
        size, items = self.config.vocab_size, num_items_in_batch
        loss = self.loss_function(logits, labels, vocab_size=size, num_items_in_batch=items)
        return modeling_llama.CausalLMOutputWithPast(loss=loss, logits=logits)


class TupleLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return tuple(super().forward(*args, **kwargs).values())


class TupleModel(LlamaModel):
    def forward(self, **kwargs):
        return tuple(super().forward(**kwargs).values())


def test_a_decoder_that_returns_a_tuple_is_named():
    model = make("llama")
    model.model.__class__ = TupleModel
    lemo.enable(model, settings())
    with pytest.raises(ValueError, match="decoder of LlamaForCausalLM .*, got tuple"):
        model(**batch_of())


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (StatesLlama, "StatesLlama adds to its loss what it makes of hidden states"),
        (DoublingLlama, "DoublingLlama adds .* to a loss that is not the cross entropy"),
        (BigramLlama, "BigramLlama makes its loss of more than hidden states and labels"),
        (TupleLlama, "TupleLlama to return an output with a loss, .* got tuple"),
    ],
)
def test_losses_that_lemo_cannot_tell_apart_are_named(cls, message):
    model = changed(cls)
    for layer in model.model.layers:
        layer.mlp.__class__ = KeepingMLP
    lemo.enable(model, settings())
    with pytest.raises(ValueError, match=message):
        model(**batch_of())
