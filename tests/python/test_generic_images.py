"""The generic path on models that read images beside text; see generic_cases.py."""

import copy
from functools import partial

import pytest
import torch

import lemo
from generic_cases import (
    BLOCK,
    IMAGE,
    IMAGE_MODELS,
    assert_same,
    kept_mask,
    make_gemma3,
    make_image_model,
    make_llava,
    make_qwen_vl,
    masked_batch,
    train,
)
from lemo import LemoConfig
from lemo.models.generic.parts import Parts
from tiny_models import make_ids

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::FutureWarning")]


def settings(keep=0.5, **more):
    return LemoConfig(**{"keep": keep, "block_size": BLOCK} | more)


def padded(batch):
    """The batch with padding behind its second sequence."""
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 50:] = 0
    labels = batch["labels"].where(mask.bool(), torch.tensor(-100))
    return {**batch, "attention_mask": mask, "labels": labels}


def own_positions(model, batch):
    """Those that the model itself gives its decoder for a batch, in one dimension or three."""
    seen = []
    hook = Parts.of(model).decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return {} if seen[0] is None else {"position_ids": seen[0]}


BUILDERS = {name: partial(make_image_model, name) for name in IMAGE_MODELS}
BUILDERS |= {"llava": make_llava, "qwen2_5_vl": make_qwen_vl, "gemma3": make_gemma3}


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("name", BUILDERS)
def test_prompts_with_images(name, keep, pad):
    model, batch = BUILDERS[name]()
    batch = padded(batch) if pad else batch
    dense = copy.deepcopy(model)
    positions = own_positions(dense, batch)
    handle = lemo.enable(model, settings(keep))
    loss = train(model, batch)
    oracle = masked_batch(batch, kept_mask(handle, batch)) if keep < 1 else batch
    assert_same(model, dense, loss, train(dense, {**oracle, **positions}))
    handle.verify(batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_images_that_see_each_other_both_ways(reentrant, attention):
    model, batch = make_gemma3()
    model.set_attn_implementation({"text_config": attention})
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    handle = lemo.enable(model, settings())
    with pytest.warns(UserWarning, match="masks attention by a rule of its own, such as images"):
        loss = train(model, batch)
    assert_same(model, dense, loss, train(dense, masked_batch(batch, kept_mask(handle, batch))))


def test_groups_of_attention_are_refused_beside_a_rule_of_the_model():
    model, batch = make_gemma3()
    lemo.enable(model, settings(layerwise={"group_size": 16}))
    with pytest.raises(NotImplementedError, match="layerwise.group_size: Gemma3For.* by a rule of"):
        model(**batch)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_prompts_without_images_of_a_model_that_masks_them_otherwise(keep):
    model, _ = make_gemma3()
    ids = make_ids(2, 64)
    batch = {"input_ids": ids, "labels": ids, "token_type_ids": torch.zeros_like(ids)}
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings(keep))
    loss = train(model, batch)
    assert_same(model, dense, loss, train(dense, masked_batch(batch, kept_mask(handle, batch))))
    handle.verify(batch)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("prefix", [0, 40, 64])
def test_prompts_whose_tokens_see_each_other_both_ways(prefix, images, keep):
    """PaliGemma's, of any length, with an image or without one."""
    model, batch = make_image_model("paligemma")
    ids = batch["input_ids"]
    batch["token_type_ids"] = (torch.arange(64) >= prefix).expand(2, 64).long()
    if not images:
        del batch["pixel_values"]
        batch["input_ids"] = make_ids(2, 64).clamp(max=IMAGE - 1)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings(keep))
    loss = train(model, batch)
    oracle = masked_batch(batch, kept_mask(handle, batch)) if keep < 1 else batch
    assert_same(model, dense, loss, train(dense, oracle))
    handle.verify(batch)
    # What the test would not see otherwise: that the rule changes the loss.
    causal = {**oracle, "token_type_ids": torch.ones_like(ids)}
    assert prefix == 0 or abs(dense(**causal).loss - loss) > 1e-3


def test_verify_compares_images():
    model, batch = make_llava()
    handle = lemo.enable(model, settings(0.5))
    handle.verify(batch)
    # Of a fault that images alone show.
    own, passes = model.model.multi_modal_projector.forward, []
    model.model.multi_modal_projector.forward = lambda x: own(x) * (passes.append(x) or len(passes))
    with pytest.raises(ValueError, match="lemo does not compute what .* computes"):
        handle.verify(batch)
    handle.verify({name: batch[name] for name in ("input_ids", "labels")})
