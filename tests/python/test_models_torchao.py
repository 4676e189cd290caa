"""Bases that torchao has quantised: what lemo trains is what PEFT trains on them, in both paths."""

import copy

import pytest
import torch

import lemo
from generic_cases import BLOCK, kept_mask, make, masked_batch
from lemo import LemoConfig
from tiny_models import gradients, lora, make_ids
from tolerances import assert_close_fp32

quantization = pytest.importorskip("torchao.quantization")

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]

KINDS = {
    "float8": lambda: quantization.Float8WeightOnlyConfig(),
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
}


def train(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_over_quantised_layers(kind, path, keep):
    base = make("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    quantization.quantize_(base.model.layers, KINDS[kind]())
    model = lora(base.requires_grad_(False))
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, LemoConfig(keep=keep, block_size=BLOCK, path=path))
    ids = make_ids(2, 61)
    batch = {"input_ids": ids, "labels": ids}
    loss = train(model, batch)
    assert_close_fp32(loss, train(dense, masked_batch(batch, kept_mask(handle, batch))))
    mine, theirs = gradients(model), gradients(dense)
    assert mine.keys() == theirs.keys()
    assert theirs
    for name, expected in theirs.items():
        assert_close_fp32(mine[name], expected, name)
    handle.verify(batch)
