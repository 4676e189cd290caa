"""Values that a training forward hands out are the dense model's, whatever is eliminated."""

import copy
import pickle

import pytest
import torch
from accelerate.utils import convert_to_fp32
from peft import PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy

import lemo
from generic_cases import kept_mask
from lemo.models.calls.arguments import ForwardArguments
from model_checks import assert_same_gradients
from tiny_models import (
    ARCHITECTURES,
    config_of,
    gradients,
    lora,
    make_ids,
    make_model,
    packed_batch,
    padded_batch,
)
from tolerances import assert_close_fp32

# The GPU's attention knows no fp32; test_models_low_precision.py compares models there.
pytestmark = pytest.mark.cpu_only

BATCH = padded_batch([64, 41])
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
PRESENT = BATCH["attention_mask"].bool()
SETTINGS = {
    "random": {"keep": 0.5, "scorer": "random", "keep_first": 0},
    "own sets": {"keep": 0.4, "keep_mlp": 0.6, "select_at": "all"},
    "all keys": {"keep": 0.5, "visible_keys": "all"},
    "groups": {"keep": 0.5, "group_size": 20},
    "threshold": {"policy": "threshold", "thresholds": [0.1] * 3, "burn_in": 3},
}


def config(name="random", **settings):
    return config_of(**{"dense_layers": [], "block_size": 8} | SETTINGS[name] | settings)


def own_loss(logits, batch=BATCH):
    targets = batch["labels"][:, 1:].flatten()
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_hidden_states_are_the_dense_models(architecture, name):
    model, dense = make_model(architecture), make_model(architecture)
    settings = config(name)
    if name == "threshold" and architecture == "qwen3":
        settings = config(name, thresholds=[0.4] * 3)  # normalized q, k: larger scores
    handle = lemo.enable(model, settings)
    mine, expected = (each(**INPUTS, output_hidden_states=True) for each in (model, dense))
    assert any(layer.attention_rows < layer.tokens for layer in handle.statistics())
    assert_close_fp32(mine.logits[PRESENT], expected.logits[PRESENT], "logits")
    for state, oracle in zip(mine.hidden_states, expected.hidden_states, strict=True):
        assert_close_fp32(state[PRESENT], oracle[PRESENT], "hidden states")


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
def test_gradients_of_a_loss_outside_come_from_the_kept_rows(recompute):
    """As from the loss inside that sees all keys, over the labels of the kept rows."""
    model, twin = lora(make_model("llama")), lora(make_model("llama"))
    handle = lemo.enable(model, config(recompute=recompute))
    inside = lemo.enable(twin, config(visible_keys="computed"))
    for each in (handle, inside):
        each.begin_step(0, 1)
    with handle.labelled(BATCH["labels"] != -100):
        loss = own_loss(model(**INPUTS).logits)
    loss.backward()
    twin(**BATCH, num_items_in_batch=1).loss.backward()
    labels = (BATCH["labels"][:, 1:] != -100).sum()
    batch, _ = inside._forward._begin(ForwardArguments.of(BATCH))
    targets, _ = lemo.models.layers.loss.next_labels(batch.packed, BATCH["labels"])
    kept = ((targets != -100) & ~inside._forward.selector.masked_rows()).sum()
    assert 0 < kept < labels
    # The loss inside divides by its share of the divisor, the one outside by all labels.
    for parameter in twin.parameters():
        if parameter.grad is not None:
            parameter.grad *= kept / (targets != -100).sum() / labels
    assert_same_gradients(model, twin)
    assert_close_fp32(loss, own_loss(lora(make_model("llama"))(**INPUTS).logits))


def test_it_is_said_once():
    model = make_model("llama")
    handle = lemo.enable(model, config())
    with pytest.warns(UserWarning, match="gradients come from .* nobody named them") as said:
        assert all([model(**INPUTS), model(**INPUTS), model(**INPUTS)])
    assert len([w for w in said if "lemo" in str(w.message)]) == 1
    with pytest.warns(UserWarning, match="rows that are kept$"), handle.labelled(PRESENT):
        model(**INPUTS)


def test_named_labels_choose_the_blocks():
    model = make_model("llama")
    handle = lemo.enable(model, config(keep=0.25, keep_last=0))
    mask = torch.zeros_like(PRESENT)
    mask[0, [17, 49]] = True  # predicted by rows 16 and 48: blocks 2 and 6
    mask[1, 24] = True  # by row 23: block 2 of the second sequence
    for _ in range(5):
        with handle.labelled(mask):
            model(**INPUTS)
        blocks = set(handle.statistics()[0].attention_blocks.tolist())
        assert {2, 6, 8 + 2} <= blocks
    with handle.labelled(mask[:, 1:]), pytest.raises(ValueError, match=r"mask: .*\[2, 64\], got"):
        model(**INPUTS)
    with pytest.raises(ValueError, match=r"mask: expected \[batch, tokens\], got \[64\]"):
        handle.labelled(mask[0]).__enter__()


def test_logits_beside_a_loss_are_computed_when_they_are_read():
    model, dense = lora(make_model("llama")), lora(make_model("llama"))
    handle = lemo.enable(model, config())
    outputs = model(**BATCH)
    assert list(outputs.keys()) == ["loss", "logits"]
    assert "Deferred" in repr(dict(outputs.items())["logits"]), "they were computed unasked"
    expected = dense(**BATCH).logits
    with torch.no_grad():
        assert not outputs.logits.requires_grad
        assert_close_fp32(outputs.logits[PRESENT], expected[PRESENT])
    for logits in (outputs.logits, outputs["logits"], outputs[1], outputs.get("logits")):
        assert_close_fp32(logits[PRESENT], expected[PRESENT])
    # A loss of them trains: labels passed, logits read.
    own_loss(outputs.logits).backward()
    assert any(gradient.any() for gradient in gradients(model).values())
    assert handle.statistics()[0].attention_rows < 105


@pytest.mark.parametrize("scorer", ["random", "given"])
def test_logits_beside_a_loss_train_the_rows_of_the_loss(scorer):
    """They neither draw anew nor need the scores again, and statistics stay those of the loss."""
    model, twin = make_model("llama"), make_model("llama")
    handle, other = (lemo.enable(each, config(scorer=scorer)) for each in (model, twin))
    scores = torch.rand(BATCH["labels"].shape, generator=torch.Generator().manual_seed(0))
    embedded = model.get_input_embeddings()(BATCH["input_ids"]).detach().requires_grad_()
    call = {**BATCH, "input_ids": None, "inputs_embeds": embedded}
    with handle.scored(scores), other.scored(scores):
        outputs, _ = model(**call), twin(**call)
    kept = kept_mask(handle, BATCH)
    (gradient,) = torch.autograd.grad(own_loss(outputs.logits), embedded)
    predicts = BATCH["labels"].roll(-1, 1) != -100  # the last token of a sequence has no gradient
    assert torch.equal(gradient.abs().sum(2) > 0, kept & predicts)
    assert torch.equal(kept_mask(handle, BATCH), kept)
    with handle.scored(scores), other.scored(scores):
        assert torch.equal(model(**call).loss, twin(**call).loss)


def test_what_is_said_of_logits_beside_a_loss_knows_of_its_labels():
    model = make_model("llama")
    lemo.enable(model, config())
    outputs = model(**BATCH)
    with pytest.warns(UserWarning, match="rows that are kept$"):
        _ = outputs.logits


def test_logits_of_an_earlier_loss_leave_the_latest_pass_as_it_is():
    """Though the two keep blocks of other sizes, the one as a text, the other for its answers."""
    model = make_model("llama")
    handle = lemo.enable(model, lemo.LemoConfig())
    ids = make_ids(1, 64)
    answers = torch.full_like(ids, -100)
    answers[0, -2:] = ids[0, -2:]
    of_text = model(ids, labels=ids)
    size = handle.block_size
    model(ids, labels=answers)
    latest = handle.statistics(), handle.block_size
    assert latest[1] != size
    assert of_text.logits.shape[:2] == ids.shape
    assert (handle.statistics(), handle.block_size) == latest


@pytest.mark.parametrize("beside_a_loss", [False, True])
def test_rows_that_see_everything_are_not_burnt_in(beside_a_loss):
    """The first row of the only block that is kept, with the only label."""
    model, dense, ids = lora(make_model("llama")), lora(make_model("llama")), make_ids(1, 64)
    handle = lemo.enable(model, config(keep=0.1, keep_last=0, burn_in=3))
    labels = torch.full_like(ids, -100)
    labels[0, 33] = ids[0, 33]
    if beside_a_loss:
        loss = model(ids, labels=labels, output_hidden_states=True).loss
    else:
        with handle.labelled(labels != -100):
            loss = own_loss(model(ids).logits, {"labels": labels})
    loss.backward()
    assert handle.statistics()[0].attention_blocks.tolist() == [4]
    assert_close_fp32(loss, dense(ids, labels=labels).loss)
    assert any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("call", [INPUTS, {**BATCH, "output_hidden_states": True}])
def test_groups_without_effect_are_named(call):
    model = make_model("llama")
    lemo.enable(model, config("groups"))
    with pytest.warns(UserWarning, match="layerwise.group_size: without effect"):
        model(**call)


def test_mixed_precision_of_accelerate_leaves_them_deferred():
    """It rebuilds the output, with all floats in fp32."""
    model, dense = lora(make_model("llama")), lora(make_model("llama"))
    lemo.enable(model, config())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = convert_to_fp32(model(**BATCH))
        expected = dense(**BATCH).logits
    assert "Deferred" in repr(dict(outputs.items())["logits"])
    assert outputs.logits.dtype == torch.float32
    error = (outputs.logits - expected)[PRESENT].norm() / expected[PRESENT].norm()
    assert error < 2e-2


@pytest.mark.parametrize("path", ["native", "generic"])
def test_logits_have_the_autocast_of_their_devices_forward(path, monkeypatch):
    """Whatever autocast is on for others, and where they are read."""
    model, dense = (lora(make_model("llama", attn_implementation="sdpa")) for _ in range(2))
    lemo.enable(model, config(path=path))
    device = BATCH["input_ids"].device.type
    other = "cpu" if device == "cuda" else "cuda"
    torch.set_autocast_enabled(other, True)
    try:
        outputs = model(**BATCH)
    finally:
        torch.set_autocast_enabled(other, False)
    with torch.autocast(device, torch.bfloat16):
        logits = outputs.logits
    assert_close_fp32(logits[PRESENT], dense(**BATCH).logits[PRESENT])


def test_labels_are_named_behind_virtual_tokens(recwarn):
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = get_peft_model(make_model("llama"), settings)
    handle = lemo.enable(model, config(keep=0.25, keep_last=0))
    mask = torch.zeros_like(PRESENT)
    mask[:, 20] = True  # behind 5 virtual tokens predicted by row 24: block 3 of both sequences
    with handle.labelled(mask):
        model(**INPUTS)
    assert {3, 9 + 3} <= set(handle.statistics()[0].attention_blocks.tolist())


def test_logits_of_weights_that_changed_are_refused():
    model = lora(make_model("llama"))
    lemo.enable(model, config())
    outputs = model(**BATCH)
    outputs.loss.backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    with pytest.raises(RuntimeError, match="logits: .* read outputs.logits before optimizer.step"):
        _ = outputs.logits


def test_without_gradients_the_model_is_dense():
    """A reference model may be asked in training mode, as for preference pairs."""
    model, dense = make_model("llama"), make_model("llama")
    handle = lemo.enable(model, config())
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, dense(**BATCH).logits)
        assert torch.equal(model(**BATCH).loss, dense(**BATCH).loss)
    assert handle.statistics() == []


def test_the_first_draw_gets_every_block_in_turn():
    """One block of four fits, and the last one is always kept: it may not be the only one ever."""
    model = make_model("llama")
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.25))
    batch, drawn = packed_batch([64]), set()
    for _ in range(30):
        assert model(**batch).loss > 0
        drawn |= set(handle.statistics()[0].attention_blocks.tolist())
    assert drawn == {0, 1, 2, 3}


def test_labels_win_over_the_block_that_is_always_kept():
    model, ids = make_model("llama"), make_ids(1, 64)
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.25, scorer="random"))
    labels = torch.full_like(ids, -100)
    labels[0, 20:24] = ids[0, 20:24]
    for _ in range(5):
        loss = model(input_ids=ids, labels=labels).loss
        assert loss > 0
        assert handle.statistics()[0].attention_blocks.tolist() == [1]
    loss.backward()
    assert any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep: expected more than 0 in some layer, got 0 everywhere"),
        ({"keep": [0.0] * 3, "keep_mlp": 0.0}, "keep: expected more than 0 in some layer"),
        (
            {"policy": "threshold", "thresholds": [9e9] * 3},
            "layerwise.thresholds: expected some block to reach one, got none of 14 in the",
        ),
        (
            {"keep": [0.0] * 3, "keep_schedule": [[0.5, 0.5]]},
            "keep: expected some block to be kept, got none in any layer",
        ),
    ],
)
def test_training_nothing_is_an_error_in_the_first_step(settings, message):
    model = make_model("llama")
    settings = {"dense_layers": [], "block_size": 8, "keep_first": 0} | settings

    def train():
        lemo.enable(model, config_of(**settings))
        model(**BATCH)

    with pytest.raises(ValueError, match=message):
        train()


def test_labels_that_are_all_masked_are_an_error_in_the_first_step():
    model, ids = make_model("llama"), make_ids(1, 64)
    lemo.enable(model, lemo.LemoConfig(keep=0.1, block_size=8, burn_in=5, scorer="random"))
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    first = torch.full_like(ids, -100)
    first[0, 58] = ids[0, 58]  # predicted from the beginning of the only block, burnt in
    with pytest.raises(ValueError, match="labels: expected one or more .* so nothing is trained"):
        model(input_ids=ids, labels=first)
    assert model(input_ids=ids, labels=labels).loss > 0
    with pytest.warns(UserWarning, match="nothing is trained in this step"):
        assert model(input_ids=ids, labels=first).loss == 0


# Copies, pickles, compilation


def test_a_pickled_model_still_eliminates():
    model = lora(make_model("llama"))
    lemo.enable(model, config())
    loaded = pickle.loads(pickle.dumps(model))
    losses = []
    for each in (model, copy.deepcopy(model), loaded):
        handle = each.base_model.model._lemo_handle
        handle.begin_step(0, 1)
        losses.append(each(**BATCH).loss)
        losses[-1].backward()
        assert handle.statistics()[0].attention_rows < 105
    assert_same_gradients(loaded, model)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    handle.remove()
    assert_close_fp32(loaded(**BATCH).loss, lora(make_model("llama"))(**BATCH).loss)


@pytest.mark.parametrize(
    "how", ["enabled first", "compiled first", "run first", "in place", "layers"]
)
def test_a_compiled_model_trains_rightly(how):
    torch.compiler.reset()
    model, twin = lora(make_model("llama")), lora(make_model("llama"))
    compile_ = {"backend": "eager"}
    compiled = model
    if how == "layers":
        layers = model.base_model.model.model.layers
        for index, layer in enumerate(layers):
            layers[index] = torch.compile(layer, **compile_)
    elif how in ("compiled first", "run first"):
        compiled = torch.compile(model, **compile_)
    if how == "run first":
        compiled(**BATCH).loss.backward()
        compiled.zero_grad()
    handle, expected = lemo.enable(compiled, config()), lemo.enable(twin, config())
    if how == "enabled first":
        compiled = torch.compile(model, **compile_)
    elif how == "in place":
        model.compile(**compile_)
    for each in (handle, expected):
        each.begin_step(0, 1)
    loss = compiled(**BATCH).loss
    loss.backward()
    twin_loss = twin(**BATCH).loss
    twin_loss.backward()
    assert torch.equal(loss, twin_loss)
    mine = {name.replace("_orig_mod.", ""): g for name, g in gradients(compiled).items()}
    theirs = gradients(twin)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    handle.remove()
    assert_close_fp32(compiled(**BATCH).loss, lora(make_model("llama"))(**BATCH).loss)
