"""The generic path on models that lemo has no architecture for; see generic_cases.py."""

import copy
import inspect

import pytest
import torch

import lemo
from generic_cases import (
    BLOCK,
    assert_same,
    kept_mask,
    make,
    masked_batch,
)
from lemo import LemoConfig, ops
from lemo.models.generic.path import GenericPath
from tiny_models import make_ids, padded_batch

# Kernels of a GPU know no fp32; benchmarks/models.py compares models there.
pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::FutureWarning")]

# What the attention of some models needs; refused by name until the operator has it.
EXTENDED = {"softcap", "sinks"} <= inspect.signature(ops.segment_attention).parameters.keys()
NEEDS = {"gemma2": "soft-capped scores", "gpt_oss": "sinks", "deepseek_v3": "values of 8"}
PLAIN = ["own_llama", "llama", "mistral", "qwen2", "qwen3", "opt", "gemma3_text", "phi3", "mixtral"]
PLAIN += ["qwen3_moe", "gpt_neox", "gpt2", "smollm3", "granite", "glm4", "cohere2"]
MODELS = [*PLAIN, *NEEDS] if EXTENDED else PLAIN


def settings(keep=0.5, **more):
    return LemoConfig(**{"keep": keep, "block_size": BLOCK, "path": "generic"} | more)


def plain_batch():
    ids = make_ids(2, 61)
    return {"input_ids": ids, "labels": ids}


def train(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("name", MODELS)
def test_everything_kept_is_the_model_itself(name):
    model = make(name)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings(1.0))
    for batch in (plain_batch(), padded_batch([61, 1, 30])):
        assert_same(model, dense, train(model, batch), train(dense, batch))
        model.zero_grad(), dense.zero_grad()
    assert isinstance(handle.path, GenericPath)


@pytest.mark.parametrize("name", MODELS)
def test_kept_rows_are_what_the_model_makes_of_them_alone(name):
    model = make(name)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings())
    for batch in (plain_batch(), padded_batch([61, 8, 45])):
        loss = train(model, batch)
        kept = kept_mask(handle, batch)
        present = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()
        assert 0.4 < kept.sum() / present < 0.7
        assert_same(model, dense, loss, train(dense, masked_batch(batch, kept)))
        model.zero_grad(), dense.zero_grad()
