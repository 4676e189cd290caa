"""What depends on the whole batch in the generic path: embeddings with hooks, dynamic rotations."""

import copy

import peft
import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

import lemo
from generic_cases import BLOCK, assert_same, kept_mask, make, masked_batch
from lemo import LemoConfig
from tiny_models import padded_batch

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::FutureWarning")]

HALF = LemoConfig(keep=0.5, block_size=BLOCK, scorer="random", path="generic")


def train(model, batch, seed=3):
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    return loss


def check(model, dense, batch):
    """A step on the kept rows beside the model's own on them."""
    handle = lemo.enable(model, HALF)
    loss = train(model, batch)
    kept = kept_mask(handle, batch)
    assert kept.sum() < 0.7 * batch["attention_mask"].sum()
    assert_same(model, dense, loss, train(dense, masked_batch(batch, kept)))


@pytest.mark.parametrize("name", ["phi3", "gemma2", "llama"])
def test_neftune_adds_the_noise_of_the_whole_batch(name):
    model = make(name)
    dense = copy.deepcopy(model)
    for one in (model, dense):
        one.get_input_embeddings().neftune_noise_alpha = 5.0
        one.get_input_embeddings().register_forward_hook(neftune_post_forward_hook)
    check(model, dense, padded_batch([61, 40]))


def test_a_hook_sees_all_tokens_and_all_of_their_kinds():
    """GPT-2 embeds both by the same weights."""
    model = make("gpt2")
    dense = copy.deepcopy(model)
    for one in (model, dense):
        one.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output - output.mean(1, keepdim=True)
        )
    batch = padded_batch([61, 40])
    batch["token_type_ids"] = 3 + batch["attention_mask"].cumsum(1) % 5
    check(model, dense, batch)


ADAPTERS = {
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA": {"target_modules": ["qkv_proj", "embed_tokens"]},
    "some tokens": {"trainable_token_indices": [3, 4, 9]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_of_the_embedding_take_padding_on_the_left(adapter):
    settings = {"target_modules": ["qkv_proj"], "task_type": "CAUSAL_LM"} | ADAPTERS[adapter]
    torch.manual_seed(0)
    model = peft.get_peft_model(make("phi3"), peft.LoraConfig(r=4, **settings)).train()
    generator = torch.Generator("cpu").manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    check(model, copy.deepcopy(model), padded_batch([61, 40], side="left"))


_LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROTATIONS = {
    "phi3": {"rope_type": "longrope", **_LONG, "factor": 2.0},
    "smollm3": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("given", [False, True])
def test_rotations_are_those_of_the_longest_sequence(name, given):
    """No row beyond the model's own context is kept, from which they change."""
    context = {"original_max_position_embeddings": 32}
    rotation = {**ROTATIONS[name], "rope_theta": 10000.0, **context}
    own = context if name == "phi3" else {}
    model = make(name, rope_parameters=rotation, max_position_embeddings=32, **own)
    dense = copy.deepcopy(model)
    batch = padded_batch([64, 40])
    if given:
        batch["position_ids"] = torch.arange(64)[None]
    config = LemoConfig(keep=0.25, block_size=BLOCK, scorer="given", keep_last=0)
    handle = lemo.enable(model, config)
    with handle.scored(torch.arange(64.0, 0, -1).expand(2, 64)):
        loss = train(model, batch)
    kept = kept_mask(handle, batch)
    assert kept.any(0).nonzero().max() < 32
    assert_same(model, dense, loss, train(dense, masked_batch(batch, kept)))
