"""Modules with code of the user's own in the native path, which gives them rows, not sequences."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import lemo
from model_checks import assert_same_gradients
from tiny_models import config_of, lora, make_model, padded_batch
from tolerances import assert_close_fp32

# The GPU's attention knows no fp32.
pytestmark = pytest.mark.cpu_only

CONFIG = config_of(keep=1.0, dense_layers=[], block_size=8)
BATCH = padded_batch([61, 40])


class CenteringNorm(LlamaRMSNorm):
    """Takes off the mean over the tokens, which in rows would be that over features."""

    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(1, keepdim=True))


class CenteringHeads(Qwen3RMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(1, keepdim=True))


class ShiftingMLP(LlamaMLP):
    """Mixes each token with the one before, in sequences and in rows."""

    def forward(self, x):
        return super().forward(x + 0.1 * pad(x.transpose(-1, -2), (1, 0))[..., :-1].mT)


class SplittingMLP(LlamaMLP):
    """Does with each token the same, but names the dimension of features from the first."""

    def forward(self, x):
        return super().forward(torch.cat(x.chunk(2, dim=2)[::-1], 2))


class CenteringLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(-2, keepdim=True))


class DoublingMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(2 * x)


class DoublingLinear(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    ("architecture", "place", "cls", "message"),
    [
        ("llama", "model.norm", CenteringNorm, "rows among others differ by"),
        ("llama", "model.layers.1.input_layernorm", CenteringNorm, "differ by"),
        ("qwen3", "model.layers.1.self_attn.q_norm", CenteringHeads, "differ by"),
        ("llama", "model.layers.1.mlp", ShiftingMLP, "differ by"),
        ("llama", "model.layers.0.mlp", SplittingMLP, "rows give IndexError"),
        ("llama", "model.layers.0.mlp.down_proj", CenteringLinear, r"mlp \(.*CenteringLinear\)"),
        ("llama", "model.layers.1.self_attn.v_proj", CenteringLinear, "differ by"),
        ("llama", "model.layers.1.self_attn.o_proj", CenteringLinear, "differ by"),
        ("opt", "model.decoder.layers.1.fc2", CenteringLinear, "differ by"),
        ("llama", "lm_head", CenteringLinear, "differ by"),
    ],
)
def test_modules_to_which_rows_are_no_sequences_are_named(architecture, place, cls, message):
    model = make_model(architecture)
    model.get_submodule(place).__class__ = cls
    lemo.enable(model, CONFIG)
    with pytest.raises(ValueError, match=message) as error:
        model(**BATCH)
    assert "to treat each token by itself" in str(error.value)
    assert "LemoConfig(path='generic')" in str(error.value)


@pytest.mark.parametrize(
    ("place", "cls"),
    [
        ("model.layers.1.mlp", DoublingMLP),
        ("model.layers.1.mlp.gate_proj", DoublingLinear),
        ("model.layers.0.self_attn.o_proj", DoublingLinear),
        ("lm_head", DoublingLinear),
    ],
)
def test_modules_that_treat_each_token_by_itself_run(place, cls):
    model = make_model("llama")
    model.get_submodule(place).__class__ = cls
    model = lora(model)
    dense = copy.deepcopy(model)
    lemo.enable(model, CONFIG)
    losses = [one(**BATCH).loss for one in (model, dense)]
    assert_close_fp32(*losses)
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, dense)


def test_the_generic_path_gives_sequences_to_modules():
    model = make_model("llama")
    model.model.layers[0].mlp.__class__ = SplittingMLP
    dense = copy.deepcopy(model)
    lemo.enable(model, lemo.LemoConfig(keep=1.0, block_size=8, path="generic"))
    assert_close_fp32(model(**BATCH).loss, dense(**BATCH).loss)
