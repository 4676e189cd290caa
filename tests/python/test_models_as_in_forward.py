"""What is computed once more after forward is computed as in forward, or refused."""

import copy

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lemo
from generic_cases import make
from graph_stand_in import take_the_place_of_graphs
from tiny_models import LINEAR, gradients, lora, make_ids
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only

IDS = make_ids(2, 40)
BATCH = {"input_ids": IDS, "labels": IDS}
HEAD = [*LINEAR, "lm_head"]
REFUSED = "to have the same weights, adapters and dropout in backward"


def adapted(modules=LINEAR, **more):
    """A model with two adapters, of which the first is active."""
    model = lora(make("llama"), target_modules=modules, **more)
    model.add_adapter("other", model.peft_config["default"])
    return model.train()


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "scale_layer")]


def scale(model):
    for layer in layers_of(model):
        layer.scale_layer(3.0)


def write(model, trained):
    weight = next(
        weight
        for name, weight in model.named_parameters()
        if "down_proj" in name and weight.requires_grad == trained
    )
    with torch.no_grad():
        weight += 1.0


def frozen(model):
    return next(m for n, m in model.named_modules() if n.endswith("down_proj.base_layer"))


def replace(model):
    """A frozen weight in a new parameter, which counts its changes anew."""
    layer = frozen(model)
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    with torch.no_grad():
        layer.weight += 1.0


def replace_values(model):
    """Other memory for a frozen weight, which is no change that it counts."""
    weight = frozen(model).weight
    weight.data = weight.data + 1.0


CHANGES = {
    "another adapter": lambda model: model.base_model.set_adapter("other"),
    "two adapters": lambda model: model.base_model.set_adapter(["default", "other"]),
    "no adapter": lambda model: model.base_model.disable_adapter_layers(),
    "a merged adapter": lambda model: model.merge_adapter(),
    "an adapter merged into a copy": lambda model: model.merge_adapter(safe_merge=True),
    "a deleted adapter": lambda model: model.delete_adapter("default"),
    "no adapter's layers": lambda model: model.unload(),
    "merged adapters alone": lambda model: model.merge_and_unload(),
    "another scale": scale,
    "no dropout": lambda model: model.eval(),
}
# Who computes layers again, and in which module a difference is noticed.
RECOMPUTED = {
    "layer": "LlamaDecoderLayer",
    "selective": "LlamaDecoderLayer",
    "a function of the user": "LlamaDecoderLayer",
    "generic": "LlamaModel",
    "generic, reentrant": "LlamaModel",
}


def enable(model, how):
    """Enables lemo, with all blocks kept and layers that are computed again in a way."""
    settings = {"path": "generic"} if "generic" in how else {}
    if how == "a function of the user":

        def again(function, rows):
            return checkpoint(function, rows, use_reentrant=False)

        model.base_model.model._set_gradient_checkpointing(True, again)
    elif "generic" in how:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in how})
        model.enable_input_require_grads()
    else:
        settings["recompute"] = how
    return lemo.enable(model, lemo.LemoConfig(keep=1, **settings))


def train(model, change=None):
    """(loss, gradients) of a step in which the model changes between forward and backward."""
    torch.manual_seed(3)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = model(**BATCH, use_cache=False).loss
    if change is not None:
        change(model)
        for weight in trained.values():
            weight.requires_grad_()  # PEFT freezes what it switches off
    loss.backward()
    return loss, {name: x.grad for name, x in trained.items() if x.grad is not None}


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys() != set()
    for name, gradient in theirs.items():
        assert_close_fp32(mine[name], gradient, name)


@pytest.mark.parametrize("how", RECOMPUTED)
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_switched_before_layers_are_computed_again(change, how):
    model = adapted(lora_dropout=0.3)
    enable(model, how)
    reason = "(other weights|.* adapters)"
    with pytest.raises(RuntimeError, match=f"{RECOMPUTED[how]} {REFUSED}.* got {reason}"):
        train(model, CHANGES[change])


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("change", [*CHANGES, "other values"])
def test_layers_that_are_stored_know_nothing_of_a_switch(change, path):
    """As those of the plain model."""
    model, dense = (adapted(lora_dropout=0.3) for _ in range(2))
    lemo.enable(model, lemo.LemoConfig(keep=1, recompute="none", path=path))
    made = CHANGES.get(change, replace_values)
    (loss, mine), (expected, theirs) = (train(each, made) for each in (model, dense))
    assert_close_fp32(loss, expected, "loss")
    assert_same(mine, theirs)


@pytest.mark.parametrize("how", RECOMPUTED)
def test_what_changes_nothing_is_not_refused(how):
    model, dense = adapted(), adapted()
    enable(model, how)

    def other_step(model):
        model.eval()
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=IDS)

    (_, mine), (_, theirs) = train(model, other_step), train(dense)
    assert_same(mine, theirs)


@pytest.mark.parametrize("change", [replace, replace_values])
@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_weight_that_is_replaced_is_refused(how, change):
    model = adapted()
    enable(model, how)
    with pytest.raises(RuntimeError, match=f"{REFUSED}.* got other weights"):
        train(model, change)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("how", ["none", "layer", "selective"])
def test_weights_that_are_written_to_between_forward_and_backward(how, trained):
    """As in the plain model, where autograd says so."""
    model, dense = adapted(), adapted()
    lemo.enable(model, lemo.LemoConfig(keep=1, recompute=how))
    with pytest.raises(RuntimeError, match="inplace"):
        train(dense, lambda model: write(model, trained))
    with pytest.raises(RuntimeError, match="in place|inplace"):
        train(model, lambda model: write(model, trained))


def replayed(monkeypatch, how):
    """A model whose passes are replayed as CUDA graphs from the next one on."""
    take_the_place_of_graphs(monkeypatch)
    model = adapted()
    handle = lemo.enable(model, lemo.LemoConfig(keep=1, recompute=how, cuda_graphs="on"))
    for _ in range(2):
        train(model)
        model.zero_grad()
    assert handle.graphs.replays == 1
    return model


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("how", ["none", "layer"])
def test_weights_that_are_written_to_before_a_backward_that_is_replayed(how, trained, monkeypatch):
    model = replayed(monkeypatch, how)
    with pytest.raises(RuntimeError, match="changed in place"):
        train(model, lambda model: write(model, trained))
    train(model)


@pytest.mark.parametrize(
    "change", ["a merged adapter", "an adapter merged into a copy", "other values"]
)
def test_weights_that_are_merged_into_before_a_backward_that_is_replayed(change, monkeypatch):
    """A graph reads the memory of the weights, which do not count what is written through data."""
    model = replayed(monkeypatch, "layer")
    with pytest.raises(RuntimeError, match="replaced between forward and backward .*merge adapter"):
        train(model, CHANGES.get(change, replace_values))


MONTECLORA = peft.LoraConfig(
    target_modules=["q_proj", "down_proj"],
    monteclora_config=peft.MontecloraConfig(num_samples=2, buffer_size=8),
)
PVERA = peft.PveraConfig(target_modules=["q_proj"], r=4, generator_seed=3)
# What draws other noise when it is called again, as errors call it.
DRAWING = {"MonteCLoRA": MONTECLORA, "PVeRA with a generator_seed": PVERA}


@pytest.mark.parametrize("how", RECOMPUTED)
@pytest.mark.parametrize("kind", DRAWING)
def test_noise_that_cannot_be_drawn_again_is_refused(kind, how):
    model = peft.get_peft_model(make("llama"), copy.deepcopy(DRAWING[kind])).train()
    enable(model, how)
    message = f"recompute: expected 'none' .* {kind}, .* got a {RECOMPUTED[how]} that backward"
    with pytest.raises(ValueError, match=message):
        train(model)


@pytest.mark.parametrize("kind", DRAWING)
def test_a_head_with_noise_that_cannot_be_drawn_again_is_refused(kind):
    config = copy.deepcopy(DRAWING[kind])
    config.target_modules = {"lm_head"}
    model = peft.get_peft_model(make("llama"), config).train()
    lemo.enable(model, lemo.LemoConfig(keep=1, recompute="none"))
    with pytest.raises(ValueError, match=f"layers with {kind}, .* the head, .* cannot have it"):
        train(model)


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("kind", DRAWING)
def test_noise_that_is_drawn_once_is_that_of_the_plain_model(kind, path):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(make("llama"), copy.deepcopy(DRAWING[kind])).train())
    model, dense = models
    lemo.enable(model, lemo.LemoConfig(keep=1, path=path))
    (loss, mine), (expected, theirs) = train(model), train(dense)
    assert_close_fp32(loss, expected, "loss")
    assert_same(mine, theirs)


@pytest.mark.parametrize("how", RECOMPUTED)
def test_noise_of_adapters_that_are_not_active_is_not_drawn(how):
    def make_model():
        model = lora(make("llama"), target_modules=LINEAR)
        model.add_adapter("other", copy.deepcopy(MONTECLORA))
        return model.train()

    model, dense = make_model(), make_model()
    enable(model, how)
    (_, mine), (_, theirs) = train(model), train(dense)
    assert_same(mine, theirs)


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("change", ["another adapter", "no adapter", "another scale", "no dropout"])
def test_a_head_that_is_switched_between_forward_and_backward(change, path):
    """Its logits are made a chunk of rows at a time, and made again in backward."""
    model = adapted(HEAD, lora_dropout=0.3)
    lemo.enable(model, lemo.LemoConfig(keep=1, path=path))
    with pytest.raises(RuntimeError, match=f"{REFUSED}.* adapters"):
        train(model, CHANGES[change])


@pytest.mark.parametrize("path", ["native", "generic"])
@pytest.mark.parametrize("change", [*CHANGES, "other weights"])
def test_logits_that_are_read_when_the_model_has_changed_are_refused(change, path):
    """Such as those of a student, read where its adapters are disabled for the teacher."""
    model = adapted(lora_dropout=0.3)
    lemo.enable(model, lemo.LemoConfig(keep=0.5, path=path))
    if change == "other weights":
        others = {name: weight + 0.1 for name, weight in model.named_parameters()}
        outputs = torch.func.functional_call(model, others, (), BATCH)
    else:
        outputs = model(**BATCH)
        CHANGES[change](model)
    with pytest.raises(RuntimeError, match="logits: expected to be read while the model is as in"):
        _ = outputs.logits


@pytest.mark.parametrize("path", ["native", "generic"])
def test_a_student_is_read_after_its_teacher(path):
    model, dense = adapted(), adapted()
    lemo.enable(model, lemo.LemoConfig(keep=0.5, path=path))
    outputs = model(**BATCH)
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=IDS).logits
    with dense.disable_adapter():
        assert_close_fp32(teacher, dense(input_ids=IDS).logits)
    assert_close_fp32(outputs.logits, dense(input_ids=IDS).logits)


@pytest.mark.parametrize("how", ["none", "layer", "selective"])
def test_a_graph_that_is_kept_gives_its_gradients_again(how):
    model, dense = adapted(), adapted()
    lemo.enable(model, lemo.LemoConfig(keep=1, recompute=how))
    for each in (model, dense):
        loss = each(**BATCH, use_cache=False).loss
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    for name, gradient in gradients(dense).items():
        assert_close_fp32(gradients(model)[name], gradient, name)
