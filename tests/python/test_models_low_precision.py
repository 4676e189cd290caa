"""Models in bf16, on the CPU and on a GPU: a step of lemo errs at most twice as much as plain bf16.

The oracle is the same mathematics in fp32 on the same rounded weights: with keep = 1 the dense
model of Transformers, with keep < 1 the eager reference of test_models_elimination, given the kept
sets that lemo chose.
"""

import pytest
import torch

import lemo
from devices import on_gpu
from elimination_oracle import reference_loss
from model_cases import BATCHES, DENSE_BATCHES, EVERYTHING, SETTINGS, preset
from model_checks import kept_blocks
from tiny_models import (
    ARCHITECTURES,
    all_of,
    as_padded,
    config_of,
    gradients,
    lora,
    make_model,
    packed_batch,
)
from tolerances import assert_close_fp32, assert_close_low_precision

RECOMPUTE = ["none", "layer", "selective"]
REPEATS = 100 if on_gpu() else 3


def models(architecture, weights=torch.bfloat16, adapted=True):
    """(lemo's model, the plain one, the fp32 oracle), of equal weights."""
    made = []
    for dtype in (weights, weights, torch.float32):
        model = make_model(architecture, dtype=torch.float32)
        model = lora(model) if adapted else model
        made.append(model.to(weights).to(dtype))
    return made


def step(model, forward):
    """Gradients of one step."""
    loss = forward(model)
    loss.backward()
    assert loss.dtype == torch.float32
    return gradients(model)


def assert_close(value, plain, oracle):
    """All gradients together; those that only lemo has, of sub-blocks without a row, are zeros."""
    assert oracle
    assert oracle.keys() == plain.keys() <= value.keys()
    assert not any(value[name].any() for name in value.keys() - oracle.keys())
    value, plain, oracle = (
        all_of({name: found[name] for name in oracle}) for found in (value, plain, oracle)
    )
    assert_close_low_precision(value.bfloat16(), plain, oracle, "gradients")


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "every parameter"])
@pytest.mark.parametrize("batch", [*DENSE_BATCHES, "packed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keep_1_is_the_dense_model(architecture, batch, adapted):
    if batch == "packed":
        batch = packed_batch([20, 9, 1, 33])
        dense_batch = as_padded(batch)
    else:
        batch = dense_batch = DENSE_BATCHES[batch]()
    model, plain, oracle = models(architecture, adapted=adapted)
    lemo.enable(model, EVERYTHING)
    value = step(model, lambda model: model(**batch).loss)
    expected, exact = (
        step(each, lambda each: each(**dense_batch, use_cache=False).loss.float())
        for each in (plain, oracle)
    )
    assert_close(value, expected, exact)


def test_layers_that_torch_compiles_are_the_dense_models():
    """By Inductor, torch.compile's default."""
    torch.compiler.reset()
    batch = BATCHES["right"]()
    model, plain, oracle = models("llama")
    lemo.enable(model, EVERYTHING.replace(path="generic", scorer="random"))
    for layer in model.get_base_model().model.layers:
        layer.compile()
    value = step(model, lambda model: model(**batch).loss)
    expected, exact = (
        step(each, lambda each: each(**batch, use_cache=False).loss.float())
        for each in (plain, oracle)
    )
    assert_close(value, expected, exact)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast(architecture, keep):
    batch = BATCHES["right"]()
    model, plain, oracle = models(architecture, torch.float32)
    config = EVERYTHING.replace(keep=keep)
    handle = lemo.enable(model, config)

    def half(forward):
        def run(model):
            with torch.autocast(torch.get_default_device().type, torch.bfloat16):
                return forward(model)

        return run

    value = step(model, half(lambda model: model(**batch).loss))
    kept = kept_blocks(handle)

    def reference(model):
        return reference_loss(model, batch, kept, config).float()

    expected, exact = step(plain, half(reference)), step(oracle, reference)
    assert_close(value, expected, exact)


def with_low_embedding():
    """LoRA on an fp32 model whose embedding is in bf16."""
    model = lora(make_model("llama", dtype=torch.float32))
    model.get_input_embeddings().to(torch.bfloat16)
    return model


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_an_embedding_in_bf16_under_fp32_layers_is_refused(keep, recompute):
    """Transformers adds in fp32 behind it; a residual in bf16 is 2% off in the gradients."""
    model, batch = with_low_embedding(), BATCHES["right"]()
    handle = lemo.enable(model, config_of(keep=keep, block_size=8, recompute=recompute))
    expected = "model: expected embedded tokens in float32, .* got bfloat16.*path='generic'"
    for call in (lambda: model(**batch), lambda: handle.verify(batch)):
        with pytest.raises(ValueError, match=expected):
            call()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert model(**batch).loss.isfinite()
    model.get_input_embeddings().float()
    assert model(**batch).loss.isfinite()


@pytest.mark.cpu_only  # where attention knows fp32
def test_an_embedding_in_bf16_under_fp32_layers_trains_in_the_generic_path():
    model, plain, batch = with_low_embedding(), with_low_embedding(), BATCHES["right"]()
    lemo.enable(model, EVERYTHING.replace(path="generic", scorer="random"))
    value = step(model, lambda model: model(**batch).loss)
    expected = step(plain, lambda model: model(**batch, use_cache=False).loss)
    assert value.keys() == expected.keys()
    assert_close_fp32(all_of(value), all_of(expected), "gradients")


@pytest.mark.cpu_only  # where torch's LayerNorm knows two dtypes
def test_norms_in_fp32_that_give_the_dtype_of_their_rows_are_the_dense_models():
    """Those of OPT: it adds in bf16."""
    made = models("opt")
    for model in made[:2]:
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()
    batch = BATCHES["right"]()
    lemo.enable(made[0], EVERYTHING)
    value, plain, oracle = (step(each, lambda each: each(**batch).loss.float()) for each in made)
    assert_close(value, plain, oracle)


@pytest.mark.parametrize("batch", DENSE_BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits(architecture, batch):
    batch = DENSE_BATCHES[batch]()
    del batch["labels"]
    model, plain, oracle = models(architecture)
    lemo.enable(model, EVERYTHING)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    value, expected, exact = (each(**batch).logits[mask] for each in (model, plain, oracle))
    assert_close_low_precision(value, expected, exact, "logits")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keep_below_1_is_the_eager_reference(architecture, name):
    # Every batch and every way to recompute, spread over the settings and architectures.
    number, batches = list(SETTINGS).index(name), list(BATCHES)
    batch = BATCHES[batches[number % len(batches)]]()
    recompute = RECOMPUTE[(number + ARCHITECTURES.index(architecture)) % len(RECOMPUTE)]
    config = preset(name).replace(recompute=recompute)
    model, plain, oracle = models(architecture)
    if name == "threshold":
        # Whatever the scale of the scores: attention keeps the two ends, the MLP everything.
        at = {"thresholds": [1e9] * 3, "mlp_thresholds": [-1e9] * 3}
        config = config.replace(layerwise=config.layerwise.replace(**at))
    handle = lemo.enable(model, config)
    value = step(model, lambda model: model(**batch).loss)
    assert any(layer.attention_rows < layer.tokens for layer in handle.statistics())
    kept = kept_blocks(handle)
    expected, exact = (
        step(each, lambda each: reference_loss(each, batch, kept, config).float())
        for each in (plain, oracle)
    )
    assert_close(value, expected, exact)


def test_labels_of_a_padded_batch_may_be_on_the_cpu():
    model, batch = models("llama")[0], BATCHES["right"]()
    lemo.enable(model, config_of(keep=0.5, block_size=8))
    expected = model(**batch).loss
    assert torch.equal(model(**batch | {"labels": batch["labels"].cpu()}).loss, expected)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_step_has_the_same_bits_every_time(keep, recompute):
    model = models("llama")[0]
    config = config_of(keep=keep, block_size=8, dense_layers=[0], recompute=recompute)
    lemo.enable(model, config)
    batch = BATCHES["right"]()

    def results():
        model.zero_grad()
        found = step(model, lambda model: model(**batch).loss)
        return all_of({name: gradient.clone() for name, gradient in found.items()})

    first = results()
    assert first.any()
    for _ in range(REPEATS):
        assert torch.equal(results(), first)


@pytest.mark.parametrize("name", ["shared set", "own sets", "groups"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_a_training_forward_are_the_dense_models(architecture, name):
    """Whatever is eliminated: those of rows that are not kept, too."""
    batch = BATCHES["right"]()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    present = batch["attention_mask"].bool()
    model, plain, oracle = models(architecture)
    handle = lemo.enable(model, preset(name))
    value = model(**inputs).logits[present]
    assert any(layer.attention_rows < layer.tokens for layer in handle.statistics())
    with torch.no_grad():
        expected, exact = (each(**inputs, use_cache=False).logits for each in (plain, oracle))
    assert_close_low_precision(value, expected[present], exact[present], "logits")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_in_bf16_is_verified(architecture):
    model, *_ = models(architecture)
    lemo.enable(model, config_of(keep=0.5, block_size=8)).verify(BATCHES["right"]())
