"""What is changed after lemo.enable in the generic path, and calls past the causal LM's forward."""

import copy
import pickle
import threading
from types import MethodType

import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.loss import loss_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast

import lemo
from generic_cases import BLOCK, assert_same, kept_mask, make, masked_batch
from lemo import LemoConfig
from tiny_models import make_ids
from tolerances import assert_close_fp32

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::FutureWarning")]

HALF = LemoConfig(keep=0.5, block_size=BLOCK, scorer="random")
WHOLE = "the whole model runs on every row, and nothing is eliminated"


def batch_of():
    ids = make_ids(2, 61)
    return {"input_ids": ids, "labels": ids}


def own_forward(self, input_ids, labels):
    """As Liger's: it takes the place of a model's forward on the instance."""
    states = self.model(input_ids).last_hidden_state
    loss = self.loss_function(self.lm_head(states), labels, self.config.vocab_size)
    return CausalLMOutputWithPast(loss=loss)


def test_a_forward_that_takes_the_place_of_lemos_is_named():
    model = make("phi3")
    dense = copy.deepcopy(model)
    lemo.enable(model, HALF)
    model.forward = MethodType(own_forward, model)
    with pytest.warns(UserWarning, match=WHOLE):
        loss = model(**batch_of()).loss
    oracle = dense(**batch_of()).loss
    loss.backward(), oracle.backward()
    assert_same(model, dense, loss, oracle)


def doubled(forward):
    """A library's patch of a class."""

    def patch(self, **kwargs):
        output = forward(self, **kwargs)
        if output.loss is not None:
            output.loss = 2 * output.loss
        return output

    return patch


@pytest.mark.parametrize("change", ["class", "configuration", "part of the loss"])
def test_a_loss_that_is_changed_later_is_the_models_own(change, monkeypatch):
    model = make("gemma2", final_logit_softcapping=None, attn_logit_softcapping=None)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, HALF)
    before = model(**batch_of()).loss
    for each in {model, dense}:
        each.zero_grad()
        if change == "configuration":
            each.config.final_logit_softcapping = 1.5
    if change == "class":
        monkeypatch.setattr(type(model), "forward", doubled(type(model).forward))
    elif change == "part of the loss":
        part = loss_utils.fixed_cross_entropy
        monkeypatch.setattr(loss_utils, "fixed_cross_entropy", lambda *a, **k: 2 * part(*a, **k))
    handle.begin_step(0, 1)
    loss = model(**batch_of()).loss
    oracle = dense(**masked_batch(batch_of(), kept_mask(handle, batch_of()))).loss
    assert abs(loss - before) > 0.1
    loss.backward(), oracle.backward()
    assert_same(model, dense, loss, oracle)


def test_hooks_on_all_modules(monkeypatch):
    """The head's product is a module's, too."""

    def halve(module, args, output):
        return 0.5 * output if isinstance(module, torch.nn.Linear) else None

    model, dense = make("phi3"), make("phi3")
    handle = lemo.enable(model, HALF)
    monkeypatch.setitem(torch.nn.modules.module._global_forward_hooks, 0, halve)
    loss = model(**batch_of()).loss
    oracle = dense(**masked_batch(batch_of(), kept_mask(handle, batch_of()))).loss
    loss.backward(), oracle.backward()
    assert_same(model, dense, loss, oracle)


def test_a_scale_of_logits_that_is_changed_later():
    """A number of the model itself, not of its configuration."""
    model = make("cohere2", logit_scale=1.0)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, HALF)
    for scale in (1.0, 0.3):
        model.logit_scale = dense.logit_scale = scale
        loss = model(**batch_of()).loss
        oracle = dense(**masked_batch(batch_of(), kept_mask(handle, batch_of()))).loss
        assert_close_fp32(loss, oracle, f"{scale}")


class ScaledLlama(LlamaForCausalLM):
    """Its logits have a scale that is trained, from 1 on."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, labels=None, attention_mask=None, position_ids=None, **kwargs):
        tokens = {"attention_mask": attention_mask, "position_ids": position_ids}
        states = self.model(input_ids, **tokens, **kwargs).last_hidden_state
        logits = self.scale * self.lm_head(states)
        loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_scale_of_logits_that_is_trained():
    model = ScaledLlama(make("llama").config).train()
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, HALF)
    loss = model(**batch_of()).loss
    oracle = dense(**masked_batch(batch_of(), kept_mask(handle, batch_of()))).loss
    loss.backward(), oracle.backward()
    assert_same(model, dense, loss, oracle)


@pytest.mark.parametrize("name", ["phi3", "opt"])  # of OPT, the base is around the decoder
def test_calls_of_the_decoder_are_those_of_the_whole_model(name, recwarn):
    model = make(name)
    dense = copy.deepcopy(model)
    lemo.enable(model, LemoConfig(keep=0.5, block_size=BLOCK, path="generic"))
    ids = batch_of()["input_ids"]
    with torch.no_grad():
        model.model(ids)
        model.eval()(ids, labels=ids)
    assert not [each for each in recwarn if WHOLE in str(each.message)]
    with pytest.warns(UserWarning, match=WHOLE):
        states = model.train().model(ids).last_hidden_state
    assert torch.equal(states, dense.model(ids).last_hidden_state)


@pytest.mark.parametrize("when", ["at once", "after a step"])
def test_attention_that_is_set_since_is_named(when):
    model = make("phi3")
    handle = lemo.enable(model, HALF)
    if when == "after a step":
        model(**batch_of())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="expected lemo's in place of 'eager', got 'sdpa'"):
        model(**batch_of())
    handle.remove()
    model.set_attn_implementation("sdpa")
    lemo.enable(model, HALF)
    assert model(**batch_of()).loss > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_handle_that_is_removed_in_front_of_backward(checkpointing):
    """The model's own attention would run where backward computes layers again."""
    gradients = []
    for removes in (False, True):
        model = make("phi3")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle = lemo.enable(model, HALF)
        loss = model(**batch_of()).loss
        if removes:
            handle.remove()
        if removes and checkpointing:
            with pytest.raises(RuntimeError, match="got 'eager'; call handle.remove.. after backw"):
                loss.backward()
            return
        loss.backward()
        gradients.append(model.model.layers[0].mlp.down_proj.weight.grad)
    assert torch.equal(*gradients)


def test_a_pickled_model_trains_in_another_process(monkeypatch):
    """Where lemo's attention has not been registered yet."""
    model = make("phi3")
    lemo.enable(model, HALF)
    stored = pickle.dumps(model)
    loss = model(**batch_of()).loss
    name = model.config._attn_implementation
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, name)
    loaded = pickle.loads(stored)
    assert torch.equal(loaded(**batch_of()).loss, loss)
    assert torch.equal(loaded.eval()(**batch_of()).loss, model.eval()(**batch_of()).loss)


def test_models_of_one_configuration_train_beside_each_other():
    model = make("phi3")
    other = type(model)(model.config).train()
    assert other.config is model.config
    handles = [lemo.enable(each, HALF) for each in (model, other)]
    for each in (model, other):
        assert each(**batch_of()).loss > 0
    assert all(handle.statistics()[0].attention_rows < 80 for handle in handles)


def test_models_train_beside_each_other_in_threads():
    models = [make("phi3", seed=seed) for seed in (0, 1)]
    dense = [copy.deepcopy(model) for model in models]
    handles = [lemo.enable(model, HALF) for model in models]
    batches = [batch_of(), {name: ids[:, :40] for name, ids in batch_of().items()}]
    losses = [None, None]
    begun, goes_on = threading.Event(), threading.Event()

    def step(index):
        losses[index] = models[index](**batches[index]).loss
        losses[index].backward()

    def wait(*_):
        begun.set()
        assert goes_on.wait(60)

    other = threading.Thread(target=step, args=(1,))

    def overlap(*_):
        # The other pass has begun before this one, and ends in the middle of it.
        goes_on.set()
        other.join()

    models[1].model.embed_tokens.register_forward_pre_hook(wait)
    models[0].model.embed_tokens.register_forward_hook(overlap)
    other.start()
    assert begun.wait(60)
    step(0)
    for index, handle in enumerate(handles):
        kept = kept_mask(handle, batches[index])
        oracle = dense[index](**masked_batch(batches[index], kept)).loss
        oracle.backward()
        assert_same(models[index], dense[index], losses[index], oracle)
