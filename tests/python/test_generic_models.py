"""The generic path on models that lemo has no architecture for; see generic_cases.py."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lemo
from generic_cases import (
    assert_same,
    batch_of,
    kept_mask,
    make,
    masked_batch,
    settings,
    train,
)
from lemo.models.generic.path import GenericPath
from model_checks import saved_bytes
from tiny_models import as_padded, gradients, lora, make_ids, packed_batch, padded_batch
from tolerances import assert_close_fp32

# Kernels of a GPU know no fp32; benchmarks/models.py compares models there.
pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::FutureWarning")]

MODELS = ["own_llama", "llama", "mistral", "qwen2", "qwen3", "opt", "gemma2", "gemma3_text", "phi3"]
MODELS += ["mixtral", "qwen3_moe", "gpt_oss", "gpt_neox", "gpt2", "smollm3", "granite", "glm4"]
MODELS += ["cohere2", "deepseek_v3"]


@pytest.mark.parametrize("name", MODELS)
def test_everything_kept_is_the_model_itself(name):
    model = make(name)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings(1.0))
    for batch in (batch_of(), padded_batch([61, 1, 30])):
        assert_same(model, dense, train(model, batch), train(dense, batch))
        model.zero_grad(), dense.zero_grad()
    assert isinstance(handle.path, GenericPath)


@pytest.mark.parametrize("name", MODELS)
def test_kept_rows_are_what_the_model_makes_of_them_alone(name):
    model = make(name)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings())
    for batch in (batch_of(), padded_batch([61, 8, 45])):
        loss = train(model, batch)
        kept = kept_mask(handle, batch)
        present = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()
        assert 0.4 < kept.sum() / present < 0.7
        assert_same(model, dense, loss, train(dense, masked_batch(batch, kept)))
        model.zero_grad(), dense.zero_grad()


@pytest.mark.parametrize("name", ["own_llama", "mistral", "gemma3_text", "granite"])
def test_kept_rows_alone_under_an_explicit_mask(name):
    """The model gets nothing but the kept rows, their positions and which may see which."""
    model = make(name)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings())
    ids = make_ids(1, 61)
    loss = train(model, {"input_ids": ids, "labels": ids})
    rows = kept_mask(handle, {"input_ids": ids})[0].nonzero()[:, 0]
    assert rows.diff().max() > 1
    back = rows[:, None] - rows
    seen = {
        "full_attention": back >= 0,
        "sliding_attention": (back >= 0) & (back < (dense.config.sliding_window or 0))
        if hasattr(dense.config, "sliding_window")
        else back >= 0,
    }
    masks = {kind: torch.where(mask, 0.0, -1e30)[None, None] for kind, mask in seen.items()}
    sliding = name == "mistral"
    mask = masks if name == "gemma3_text" else masks[("full", "sliding")[sliding] + "_attention"]
    states = dense.model(ids[:, rows], attention_mask=mask, position_ids=rows[None])
    logits = dense.lm_head(states.last_hidden_state[0])
    if name == "granite":
        logits = logits / dense.config.logits_scaling
    labels = torch.cat((ids[0, 1:], torch.tensor([-100])))[rows]
    oracle = torch.nn.functional.cross_entropy(logits, labels)
    oracle.backward()
    assert_same(model, dense, loss, oracle)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe", "mistral"])
def test_packed_sequences_are_those_of_a_padded_batch(name):
    packed = packed_batch([40, 3, 37])
    model = make(name, output_router_logits=False)
    other = copy.deepcopy(model)
    losses = [
        train(one, batch)
        for one, batch in ((model, packed), (other, as_padded(packed)))
        if lemo.enable(one, settings())
    ]
    assert_same(model, other, *losses)


def test_padding_on_the_left():
    batch = padded_batch([61, 30], side="left")
    model = make("phi3")
    dense = copy.deepcopy(model)
    lemo.enable(model, settings(1.0))
    assert_same(model, dense, train(model, batch), train(dense, batch))


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_padding_on_the_left_needs_positions_where_these_are_learned(name):
    batch = padded_batch([61, 30], side="left")
    model = make(name)
    dense = copy.deepcopy(model)
    lemo.enable(model, settings(1.0))
    with pytest.raises(ValueError, match="position_ids: expected for padding on the left"):
        model(**batch)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch["position_ids"] = positions
    assert_same(model, dense, train(model, batch), train(dense, batch))


def test_a_sequence_of_padding_alone_is_none_on_the_left():
    batch = padded_batch([61, 30])
    for name, filling in (("attention_mask", 0), ("labels", -100)):
        batch[name][1] = filling
    model = make("gpt2")
    dense = copy.deepcopy(model)
    lemo.enable(model, settings(1.0))
    assert_same(model, dense, train(model, batch), train(dense, batch))


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_kinds_of_tokens_are_those_of_kept_rows(name, kinds, keep):
    """GPT-2 embeds them, of which 0 is one as well; others read none."""
    model = make(name)
    dense = copy.deepcopy(model)
    handle = lemo.enable(model, settings(keep))
    batch = {**batch_of(), "token_type_ids": torch.arange(61).expand(2, 61) % kinds}
    loss = train(model, batch)
    assert_same(model, dense, loss, train(dense, masked_batch(batch, kept_mask(handle, batch))))


def test_prompts_that_see_each_other_both_ways_are_refused_where_the_decoder_masks_them():
    """It gets kept rows alone, so that a rule of the whole batch cannot be asked."""
    pytest.importorskip("transformers.models.hrm_text")  # of newer versions
    model = make("hrm_text")
    lemo.enable(model, settings(0.5))
    batch = {**batch_of(), "token_type_ids": (torch.arange(61) < 20).long().expand(2, 61)}
    with pytest.raises(NotImplementedError, match="HrmTextForCausalLM masks .* by a rule of its"):
        model(**batch)


# Checkpointing, adapters, compilation


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gemma3_text", "phi3", "mixtral"])
def test_checkpointing_changes_nothing_but_what_is_stored(name, reentrant):
    model = make(name)
    model.enable_input_require_grads()
    stored, recomputed = copy.deepcopy(model), model
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = batch_of()
    losses, sizes = [], []
    for one in (stored, recomputed):
        lemo.enable(one, settings())
        sizes.append(saved_bytes(one, batch))
    if name == "mixtral":
        # Reentrant checkpoints give what hooks record, such as the routers' logits, no gradient.
        stored.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (stored, recomputed):
        one._lemo_handle.begin_step(0, 1)
        losses.append(train(one, batch))
    assert_same(recomputed, stored, *losses)
    assert sizes[1] < sizes[0] / 2


def test_checkpoints_hold_kept_rows_only():
    model = make("phi3")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {name: ids.repeat(1, 2) for name, ids in batch_of().items()}
    sizes, shapes = {}, []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    for keep in (1.0, 0.25):
        handle = lemo.enable(model, settings(keep))
        shapes.clear()
        sizes[keep] = saved_bytes(model, batch)
        assert shapes == [(1, handle.statistics()[0].attention_rows, 32)]
        handle.remove()
    assert sizes[0.25] < 0.4 * sizes[1.0]


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters(order):
    model = make("glm4")
    if order == "before":
        handle = lemo.enable(model, settings())
    names = ["q_proj", "v_proj", "gate_up_proj"]
    model = lora(model, target_modules=names)
    if order == "after":
        handle = lemo.enable(model, settings())
    batch = batch_of()
    loss = train(model, batch)
    mine = {name: gradient.clone() for name, gradient in gradients(model).items()}
    assert len(mine) == 2 * 3 * 3
    kept = kept_mask(handle, batch)
    handle.remove()
    model.zero_grad()
    oracle = train(model, masked_batch(batch, kept))
    assert_close_fp32(loss, oracle)
    for name, gradient in gradients(model).items():
        assert_close_fp32(mine[name], gradient, name)


@pytest.fixture
def nothing_compiled():
    """torch.compile stops to compile a function that it has compiled too often before."""
    torch.compiler.reset()


def test_layers_that_torch_compiles_by_default(nothing_compiled):
    """Inductor hands names of arguments on to functions of its own, which have some, too."""
    model = make("mistral", num_hidden_layers=1, layer_types=None)
    eager = copy.deepcopy(model)
    for one in (eager, model):
        lemo.enable(one, settings())
    model.model.layers[0].compile()
    batch = batch_of()
    losses = train(model, batch), train(eager, batch)
    assert_same(model, eager, *losses)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("what", ["model", "layers", "each layer"])
def test_compiled_models(nothing_compiled, what, checkpoints):
    counter = CompileCounterWithBackend("aot_eager")
    model = make("mistral")
    if checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    eager, compiled = copy.deepcopy(model), model
    for one in (eager, model):
        lemo.enable(one, settings())
    if what == "model":
        compiled = torch.compile(model, backend=counter)
    for index, layer in enumerate(model.model.layers):
        if what == "layers":
            layer.compile(backend=counter)
        elif what == "each layer":
            model.model.layers[index] = torch.compile(layer, backend=counter)
    batch = batch_of()
    losses = train(compiled, batch), train(eager, batch)
    if what == "each layer":
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = layer._orig_mod
    assert_same(model, eager, *losses)
    assert what == "model" or counter.frame_count


def test_a_head_whose_weights_are_gone_in_backward():
    """Its capped logits are computed again there."""
    model = make("gemma2")
    lemo.enable(model, settings(keep=1.0))
    others = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    others["model.norm.weight"].requires_grad_()
    loss = torch.func.functional_call(model, others, (), batch_of()).loss
    with pytest.raises(RuntimeError, match="expected Linear .* in backward, .* got other weights"):
        loss.backward()
