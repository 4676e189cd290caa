"""Kinds of LoRA in whole models: against the model's own forward, stored and recomputed."""

import pytest
import torch

import lemo
from lemo.models.projections import rows
from tiny_models import config_of, gradients, lora, make_model, padded_batch
from tolerances import assert_close_fp32

# The GPU's attention knows no fp32.
pytestmark = pytest.mark.cpu_only

KINDS = {
    "two adapters": {},
    "biases": {"lora_bias": True, "bias": "all"},
    "patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"fc1": 3}},
    "DoRA": {"use_dora": True},
}
DROPOUT = {"dropout": {"lora_dropout": 0.3}, "DoRA, dropout": {"lora_dropout": 0.3} | KINDS["DoRA"]}


def adapted(kind, architecture="qwen2", **overrides):
    model = lora(make_model(architecture, **overrides), **(KINDS | DROPOUT)[kind])
    if kind == "two adapters":
        torch.manual_seed(3)
        model.add_adapter("other", model.peft_config["default"])
        model.base_model.set_adapter(["default", "other"])
    return model.train()


def step(model, batch, how, autocast=False, **settings):
    """(loss, gradients); backward runs inside of autocast where that is asked for."""
    fixed = {"recompute": how, "block_size": 8, "dense_layers": []}
    handle = lemo.enable(model, config_of(**fixed | settings))
    assert handle.general_modules() == {}
    torch.manual_seed(7)
    loss = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    handle.remove()
    return loss.detach(), found


@pytest.mark.parametrize("architecture", ["qwen2", "opt"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_kept_it_is_the_models_own(kind, architecture):
    model, batch = adapted(kind, architecture), padded_batch([61, 45])
    plain = adapted(kind, architecture)
    lemo.enable(model, lemo.LemoConfig(keep=1.0)).verify(batch)
    loss, expected = model(**batch).loss, plain(**batch).loss
    loss.backward()
    expected.backward()
    assert_close_fp32(loss, expected)
    oracles, found = gradients(plain), gradients(model)
    assert found.keys() == oracles.keys()
    for name, oracle in oracles.items():
        # A key bias of OPT shifts all scores of a query alike: its gradient is rounding alone.
        if architecture != "opt" or "k_proj" not in name or not name.endswith("bias"):
            assert_close_fp32(found[name], oracle, name)


@pytest.mark.parametrize("how", ["layer", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_in_chunks(kind, how, monkeypatch):
    monkeypatch.setattr(rows, "chunk_rows", lambda rows, width: 24)
    model, batch = adapted(kind), padded_batch([61, 45])
    loss, expected = step(model, batch, "none", keep=0.5)
    got, found = step(model, batch, how, keep=0.5)
    assert_close_fp32(got, loss)
    assert found.keys() == expected.keys()
    for name, oracle in expected.items():
        assert_close_fp32(found[name], oracle, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, *DROPOUT])
def test_bits_of_one_chunk_are_those_of_stored_layers(kind, dtype):
    """With fp32 adapters over bf16, and with the same masks in both passes."""
    model, batch = adapted(kind, dtype=dtype), padded_batch([61, 45])
    loss, expected = step(model, batch, "none", keep=0.5)
    for how in ("layer", "selective"):
        got, found = step(model, batch, how, keep=0.5)
        assert torch.equal(got, loss)
        assert all(torch.equal(found[name], oracle) for name, oracle in expected.items())


@pytest.mark.parametrize("how", ["none", "layer"])
@pytest.mark.parametrize("kind", [*KINDS, *DROPOUT])
def test_autocast_that_is_on_in_backward_alone_changes_no_bits(kind, how):
    model, batch = adapted(kind), padded_batch([61, 45])
    _, expected = step(model, batch, how, keep=0.5)
    _, found = step(model, batch, how, autocast=True, keep=0.5)
    assert all(torch.equal(found[name], oracle) for name, oracle in expected.items())


@pytest.mark.parametrize("kind", ["dropout", "DoRA, dropout"])
def test_dropout_of_dense_steps_is_that_of_peft(kind):
    """On the CPU, where both draw the same masks if they draw them in the same order."""
    model, batch = adapted(kind), {"input_ids": padded_batch([64])["input_ids"]}
    batch["labels"] = batch["input_ids"]
    loss, found = step(model, batch, "none", keep=1.0)
    torch.manual_seed(7)
    expected = model(**batch).loss
    expected.backward()
    assert_close_fp32(loss, expected)
    for name, oracle in gradients(model).items():
        assert_close_fp32(found[name], oracle, name)
