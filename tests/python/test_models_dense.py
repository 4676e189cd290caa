"""keep = 1 computes what the dense model of Transformers computes: losses, states, gradients.

In fp32, which the GPU's attention does not know; test_models_low_precision.py runs on both.
"""

import pytest
import torch

import lemo
from lemo import LemoConfig
from lemo.models.calls.outputs import DeferredLogits
from lemo.models.layers.architectures import architecture_of
from lemo.packing.blocks import Selection
from lemo.selection.selector import Selector
from model_cases import DENSE_BATCHES, EVERYTHING, plain_batch
from model_checks import assert_same_gradients
from tiny_models import (
    ARCHITECTURES,
    LINEAR,
    as_padded,
    gradients,
    lora,
    make_ids,
    make_model,
    packed_batch,
    padded_batch,
)
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only


@pytest.fixture(params=["no index", "row index"])
def rows(request, monkeypatch):
    """All rows kept, once without an index and once by an explicit index of every row."""
    if request.param == "row index":

        def select(self, layer, kind, score):
            layout = self._pass.layout
            index = torch.arange(layout.num_tokens, dtype=torch.int32)
            positions = torch.cat([torch.arange(n) for n in layout.seqlens]).to(torch.int32)
            blocks = torch.arange(layout.num_blocks, dtype=torch.int32)
            chosen = Selection(layout, index, positions, layout.cu_seqlens, blocks)
            self._pass.selected[kind].append(chosen)
            return chosen

        monkeypatch.setattr(Selector, "select", select)


def assert_same(model, dense, batch, dense_batch=None):
    """Losses and gradients of one step agree."""
    expected = dense(**(dense_batch or batch), use_cache=False)
    expected.loss.backward()
    outputs = model(**batch)
    outputs.loss.backward()
    assert isinstance(vars(outputs)["logits"], DeferredLogits), "computed though nobody reads them"
    assert_close_fp32(outputs.loss, expected.loss, "loss")
    assert_same_gradients(model, dense)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("batch", DENSE_BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients(architecture, batch):
    model, dense = make_model(architecture), make_model(architecture, attn_implementation="sdpa")
    lemo.enable(model, EVERYTHING)
    assert_same(model, dense, DENSE_BATCHES[batch]())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_sequences(architecture):
    batch = packed_batch([20, 9, 1, 13])
    model, dense = make_model(architecture), make_model(architecture)
    lemo.enable(model, EVERYTHING)
    assert_same(model, dense, batch, as_padded(batch))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_packed_sequences_as_transformers_packs_them(architecture):
    # OPT ignores positions that restart. Here even the boundary's label counts, as there.
    batch = {**packed_batch([20, 9, 13]), "labels": make_ids(1, 42)}
    model, dense = make_model(architecture), make_model(architecture)
    lemo.enable(model, EVERYTHING)
    assert_same(model, dense, batch)


@pytest.mark.parametrize("batch", DENSE_BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_and_logits(architecture, batch):
    model, dense = make_model(architecture), make_model(architecture)
    lemo.enable(model, EVERYTHING)
    arguments = {**DENSE_BATCHES[batch](), "output_hidden_states": True}
    mask = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
    expected, with_loss = dense(**arguments), model(**arguments)
    del arguments["labels"]
    outputs = model(**arguments)
    assert_close_fp32(outputs.logits[mask], expected.logits[mask], "logits")
    for hidden in (outputs.hidden_states, with_loss.hidden_states):
        assert len(hidden) == len(expected.hidden_states)
        for index, (value, oracle) in enumerate(zip(hidden, expected.hidden_states)):
            assert_close_fp32(value[mask], oracle[mask], f"hidden state {index}")
            assert not value[~mask].any()


def test_gradients_flow_through_hidden_states():
    model, dense = make_model("llama"), make_model("llama")
    lemo.enable(model, EVERYTHING)
    for each in (model, dense):
        states = each(**plain_batch(), output_hidden_states=True).hidden_states
        sum(state.square().mean() for state in states).backward()
    assert_same_gradients(model, dense)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("batch", ["plain", "padded right"])
def test_embeddings_given_instead_of_ids(batch, requires_grad):
    model, dense = make_model("qwen3"), make_model("qwen3")
    lemo.enable(model, EVERYTHING)
    batch = DENSE_BATCHES[batch]()
    embed = model.get_input_embeddings()
    ids = batch.pop("input_ids")
    inputs = [embed(ids).detach().requires_grad_(requires_grad) for _ in range(2)]
    before = inputs[0].detach().clone()
    model(**batch, inputs_embeds=inputs[0]).loss.backward()
    dense(**batch, inputs_embeds=inputs[1]).loss.backward()
    if requires_grad:
        assert_close_fp32(inputs[0].grad, inputs[1].grad, "inputs_embeds")
    assert_same_gradients(model, dense)
    assert torch.equal(inputs[0], before), "the caller's tensor was overwritten"


def test_position_ids_and_rope_scaling_are_the_models_own():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model, dense = (make_model("llama", rope_parameters=rope) for _ in range(2))
    lemo.enable(model, EVERYTHING)
    batch = {**plain_batch(), "position_ids": torch.arange(37).expand(2, -1) + 50}
    assert_same(model, dense, batch)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_on_every_projection(architecture, order):
    model, dense = make_model(architecture), lora(make_model(architecture))
    if order == "before":
        lemo.enable(model, EVERYTHING)
    model = lora(model)
    if order == "after":
        lemo.enable(model, EVERYTHING)
    per_layer = 6 if architecture == "opt" else 7
    assert_same(model, dense, padded_batch([37, 20]))
    assert len(gradients(model)) == 2 * 3 * per_layer


NORMS = ["input_layernorm", "post_attention_layernorm", "norm", "q_norm"]
NORMS += ["self_attn_layer_norm", "final_layer_norm"]


@pytest.mark.parametrize("architecture", ["qwen3", "opt"])
def test_trained_norms(architecture):
    names = {name.split(".")[-1] for name, _ in make_model(architecture).named_modules()}
    saved = [name for name in NORMS if name in names]
    model, dense = (lora(make_model(architecture), modules_to_save=saved) for _ in range(2))
    for each in (model, dense):
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.3)  # so that the wrapper's copy differs from the original
    lemo.enable(model, EVERYTHING)
    assert_same(model, dense, padded_batch([37, 20]))
    assert any("modules_to_save" in name for name in gradients(model))
    with model.disable_adapter(), dense.disable_adapter():
        losses = [each(**padded_batch([37, 20])).loss for each in (model, dense)]
    assert_close_fp32(*losses, "loss with the adapter off")


@pytest.mark.parametrize("loss_chunk", [None, 7])
@pytest.mark.parametrize("head", ["lora", "modules_to_save", "untied", "bias"])
def test_heads(head, loss_chunk):
    def prepare(model):
        if head == "lora":
            return lora(model, target_modules=[*LINEAR, "lm_head"])
        if head == "modules_to_save":
            return lora(model, modules_to_save=["lm_head"])
        if head == "bias":
            torch.manual_seed(2)
            model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
        return model

    model, dense = (
        prepare(make_model("llama", tie_word_embeddings=head == "bias")) for _ in range(2)
    )
    settings = {**EVERYTHING.to_dict(), "loss_chunk": loss_chunk}
    lemo.enable(model, LemoConfig.from_dict(settings))
    assert_same(model, dense, padded_batch([37, 20]))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing(architecture):
    model, dense = make_model(architecture), make_model(architecture)
    lemo.enable(model, EVERYTHING)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    architecture_of(model).layer(
        1
    ).gradient_checkpointing = False  # some layers, as every_n_layers does
    assert_same(model, dense, padded_batch([37, 20]))


def test_reentrant_checkpointing_of_a_frozen_model_with_lora():
    model, dense = lora(make_model("llama")), lora(make_model("llama"))
    lemo.enable(model, EVERYTHING)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_same(model, dense, padded_batch([37, 20]))


class OtherMLP(torch.nn.Module):
    """The parts of Llama's, put together in another way."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def replace_mlp(model):
    model.model.layers[1].mlp = OtherMLP(model.model.layers[1].mlp)


def hook_activation(model):
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda module, args, result: 2 * result)


def hook_mlp(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, result: 2 * result)


@pytest.mark.parametrize(
    ("activation", "change"),
    [
        ("gelu", None),
        ("silu", replace_mlp),
        ("silu", hook_activation),
        ("silu", hook_mlp),
    ],
)
def test_mlps_that_are_no_plain_swiglu_run_as_they_are(activation, change):
    model, dense = (make_model("llama", hidden_act=activation) for _ in range(2))
    for each in (model, dense):
        if change is not None:
            change(each)
    lemo.enable(model, EVERYTHING)
    assert_same(model, dense, plain_batch())
