"""Eval mode: for a while, after which each module is as it was, and of whoever calls a model."""

import functools
from contextlib import nullcontext
from itertools import product

import pytest
from torch import nn

import lemo
from lemo import LemoConfig
from lemo.models.calls.eval_mode import evaluating
from tiny_models import all_of, gradients, lora, make_model, padded_batch
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only


class Noting(nn.Linear):
    """Does more than a mode asks for where it is told one, as layers that merge weights do."""

    told = 0

    def train(self, mode=True):
        self.told += 1
        return super().train(mode)


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_comes_back_in_its_own_mode(fails):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), Noting(2, 2)))
    model[1][0].eval()
    before = modes(model)
    assert {*before} == {True, False}
    try:
        with evaluating(model):
            assert not any(modes(model))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert modes(model) == before
    assert model[1][1].told == 0


class Wrapped(nn.Module):
    """Somebody's module around a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


def base_in_train():
    """A causal LM in eval mode with its decoder in training."""
    model = make_model("llama").eval()
    model.model.train()
    return model


def peft_around():
    """The same of PEFT's model and the causal LM in it."""
    model = lora(make_model("llama")).eval()
    model.get_base_model().train()
    return model


def wrapped():
    model = Wrapped(make_model("llama")).eval()
    model.model.train()
    return model


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("make", [base_in_train, peft_around, wrapped])
def test_who_is_called_in_eval_mode_is_dense_whatever_is_inside(make, path):
    batch, found = padded_batch([61, 40]), []
    model, dense = make(), make()
    handle = lemo.enable(model, LemoConfig(keep=0.5, block_size=8, scorer="random", path=path))
    for each in (model, dense):
        outputs = each(**batch)
        (outputs.loss + outputs.logits.square().mean()).backward()
        found.append((outputs.loss, all_of(gradients(each))))
    assert handle.statistics() == []
    for value, expected in zip(*found):
        assert_close_fp32(value, expected)


def test_a_call_in_training_eliminates_after_one_in_eval_mode_that_failed():
    model, batch = peft_around(), padded_batch([61, 40])
    handle = lemo.enable(model, LemoConfig(keep=0.5, block_size=8, scorer="random"))
    with pytest.raises(ValueError, match="input_ids"):
        model()
    model.get_base_model()(**batch)
    assert all(layer.attention_rows < layer.tokens for layer in handle.statistics())
    assert handle.statistics()


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("path", ["native", "generic"])
def test_a_call_that_was_interrupted_leaves_nothing(path, is_wrapped):
    """torch runs no hooks for Ctrl-C in a notebook; training was dense ever after."""
    model, batch = lora(make_model("llama")), padded_batch([61, 40])
    if is_wrapped:
        base = model.get_base_model()
        own = base.forward
        # In which labels are named once more, around the decoder.
        base.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    config = LemoConfig(keep=0.5, block_size=8, scorer="random", path=path)
    handle = lemo.enable(model, config)

    def interrupt(*_):
        raise KeyboardInterrupt

    mlp = model.get_base_model().model.layers[1].mlp
    for mode, outer in product((False, True), (None, batch["labels"] > 0)):
        hook = mlp.register_forward_pre_hook(interrupt)
        model.train(mode)
        names = nullcontext() if outer is None else handle.naming(outer)
        with pytest.raises(KeyboardInterrupt), names:
            model(**batch)
        hook.remove()
        assert handle.row_labels is None
    model(**batch).loss.backward()
    # The generic path leaves forwards of somebody else as they are.
    assert bool(handle.statistics()) != (is_wrapped and path == "generic")
    assert all(layer.attention_rows < layer.tokens for layer in handle.statistics())
