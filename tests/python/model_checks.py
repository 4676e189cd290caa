"""What several tests of models compare and measure."""

import torch

import lemo
from tiny_models import gradients
from tolerances import assert_close_fp32


def assert_same_gradients(model, dense, frozen_keys=False):
    mine, theirs = gradients(model), gradients(dense)
    assert theirs
    assert mine.keys() >= theirs.keys()
    # A sub-block that keeps no row still has a gradient: zeros.
    assert not any(mine[name].any() for name in mine.keys() - theirs.keys())
    for name, oracle in theirs.items():
        if name.endswith("k_proj.bias") and dense.config.model_type == "opt":
            # A key bias without rotation shifts every score of a query alike: no gradient at all,
            # unless some of the keys are frozen.
            scale = theirs[name.replace("k_proj", "v_proj")].norm()
            if max(mine[name].norm(), oracle.norm()) <= 1e-5 * scale:
                continue
            assert frozen_keys, name
        assert_close_fp32(mine[name], oracle, name)


def one_step(model, batch, config, autocast=False, seed=5):
    """(loss, gradients) of a step with lemo; equal seeds draw the same numbers for dropout."""
    handle = lemo.enable(model, config)
    torch.manual_seed(seed)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    handle.remove()
    return loss.detach(), found


def assert_equal_steps(result, expected):
    """Bit for bit, of what `one_step` gave."""
    assert torch.equal(result[0], expected[0])
    assert result[1].keys() == expected[1].keys()
    for name, oracle in expected[1].items():
        assert torch.equal(result[1][name], oracle), name


def kept_blocks(handle):
    return [(layer.attention_blocks, layer.mlp_blocks) for layer in handle.statistics()]


def saved_bytes(model, batch):
    """Bytes of distinct storages that autograd keeps for backward, parameters left out."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(size for _, size in storages.values())
