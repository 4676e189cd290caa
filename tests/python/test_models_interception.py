"""What others put around or in place of a model's parts runs, or is refused: never left out."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.module_tracker import ModuleTracker
from transformers import AttentionInterface, DynamicCache
from transformers.loss import loss_utils
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama import modeling_llama

import lemo
import lemo.attention  # registers attention "lemo"
from lemo.models.calls.interception import has_own_forward, origin
from lemo.models.layers.architectures import Architecture
from lemo.models.layers.capture import capture_sub_blocks
from model_checks import assert_same_gradients
from tiny_models import ARCHITECTURES, config_of, lora, make_model, padded_batch
from tolerances import assert_close_fp32

# The GPU's attention knows no fp32; test_models_low_precision.py compares models there.
pytestmark = pytest.mark.cpu_only

EVERYTHING = config_of(keep=1.0, dense_layers=[], block_size=8)
BATCH = padded_batch([61, 40])


def scaled(function):
    """Makes a library's patch, which claims to be the function that it replaces."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        output = function(*args, **kwargs)
        return (1.1 * output[0], *output[1:]) if isinstance(output, tuple) else 1.1 * output

    return wrapped


class OwnAttention(modeling_llama.LlamaAttention):
    pass


def own_attention(module, query, key, value, attention_mask, **kwargs):
    return torch.zeros_like(query).transpose(1, 2), None


def hook(module, args, output):
    return output


def change_decoder_class(model, monkeypatch):
    forward = scaled(modeling_llama.LlamaModel.forward)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)


def change_layer_class(model, monkeypatch):
    forward = scaled(modeling_llama.LlamaDecoderLayer.forward)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)


def change_attention_class(model, monkeypatch):
    forward = scaled(modeling_llama.LlamaAttention.forward)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)


def change_attention(model, monkeypatch):
    layer = model.model.layers[1]
    layer.self_attn = OwnAttention(model.config, 1)


def change_forward_of_a_layer(model, monkeypatch):
    layer = model.model.layers[2]
    layer.forward = scaled(layer.forward)


def hook_a_layer(model, monkeypatch):
    model.model.layers[0].register_forward_hook(hook)


def hook_attention(model, monkeypatch):
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: None)


def change_rotation(model, monkeypatch):
    rotation = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled(rotation))


def change_what_the_rotation_calls(model, monkeypatch):
    monkeypatch.setattr(modeling_llama, "rotate_half", scaled(modeling_llama.rotate_half))


def change_what_eager_attention_calls(model, monkeypatch):
    monkeypatch.setattr(modeling_llama, "repeat_kv", scaled(modeling_llama.repeat_kv))


def change_eager_attention(model, monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", own_attention)


def register_attention(model, monkeypatch):
    AttentionInterface.register("own", own_attention)
    model.config._attn_implementation = "own"


def hook_the_decoder(model, monkeypatch):
    model.model.register_forward_hook(hook)


def hook_all_modules(model, monkeypatch):
    monkeypatch.setitem(nn.modules.module._global_forward_hooks, 0, hook)


def hook_what_all_modules_get(model, monkeypatch):
    hooks = nn.modules.module._global_forward_pre_hooks
    monkeypatch.setitem(hooks, 0, lambda module, args: None)


def hook_what_the_decoder_gets(model, monkeypatch):
    model.model.register_forward_pre_hook(lambda module, args: None)


def hook_gradients_of_the_decoder(model, monkeypatch):
    model.model.register_full_backward_hook(lambda module, inputs, outputs: None)


def change_forward_of_the_decoder(model, monkeypatch):
    model.model.forward = scaled(model.model.forward)


def compile_the_decoder(model, monkeypatch):
    model.model = torch.compile(model.model, backend="eager")


def remove_a_layer(model, monkeypatch):
    del model.model.layers[1]


def add_attention_dropout(model, monkeypatch):
    model.model.layers[2].self_attn.attention_dropout = 0.5


def see_later_tokens(model, monkeypatch):
    model.model.layers[1].self_attn.is_causal = False


def mask_no_later_tokens(model, monkeypatch):
    model.config.is_causal = False


REFUSED = {
    hook_the_decoder: "expected LlamaModel .* a hook from test_models_interception",
    hook_all_modules: "expected LlamaModel .* a hook from test_models_interception",
    hook_what_all_modules_get: "expected LlamaModel .* a hook from test_models_interception",
    hook_what_the_decoder_gets: "expected LlamaModel .* a hook from test_models_interception",
    hook_gradients_of_the_decoder: "expected LlamaModel .* a hook from test_models_interception",
    change_forward_of_the_decoder: "expected LlamaModel .* replaced",
    compile_the_decoder: "expected LlamaModel, got what torch.compile made of it",
    remove_a_layer: "num_hidden_layers = 3 layers, got 2",
    add_attention_dropout: "attention_dropout 0, got 0.5 in layer 2",
    see_later_tokens: "causal attention, got is_causal=False in layer 1",
    mask_no_later_tokens: "causal model, got config.is_causal=False",
    change_decoder_class: "LlamaModel.forward .* got one from test_models_interception",
    change_layer_class: "layers.0 .* whose forward comes from test_models_interception",
    change_attention_class: "layers.0.self_attn .* whose forward comes from",
    change_attention: "layers.1.self_attn .* a test_models_interception.OwnAttention",
    change_forward_of_a_layer: "layers.2 .* whose forward was replaced",
    hook_a_layer: "layers.0 .* a hook from test_models_interception",
    hook_attention: "layers.0.self_attn .* a hook from test_models_interception",
    change_rotation: "the rotation of transformers.models.llama.* got one from test_models_inter",
    change_what_the_rotation_calls: "the rotation of .*llama.* got one from test_models_inter",
    change_what_eager_attention_calls: "attn_implementation: .* 'eager' from test_models_interc",
    change_eager_attention: "attn_implementation: .* 'eager' from test_models_interception",
    register_attention: "attn_implementation: expected one of Transformers' own, got 'own' from",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", REFUSED)
def test_what_would_not_run_is_refused(change, when, monkeypatch):
    model = make_model("llama")
    if when == "after":
        lemo.enable(model, EVERYTHING)
        model(**BATCH)
    change(model, monkeypatch)
    use = model if when == "after" else lambda **_: lemo.enable(model, EVERYTHING)
    with pytest.raises(ValueError, match=REFUSED[change]):
        use(**BATCH)


def test_watchers_of_torch_on_all_modules():
    model = lora(make_model("llama"))
    handle = lemo.enable(model, EVERYTHING.replace(keep=0.5))
    with ModuleTracker():
        model(**BATCH).loss.backward()
        assert not handle.general_modules()
    assert handle.statistics()[0].attention_rows < 0.6 * 101


def test_layers_that_come_later_are_named():
    model = make_model("llama")
    lemo.enable(model, EVERYTHING)
    lora(model, layer_replication=[[0, 2], [1, 3]])
    with pytest.raises(ValueError, match="expected the 3 layers that it had .* got 4"):
        model(**BATCH)


def take_a_layer_out(model):
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 2


def turn_layers_around(model):
    model.model.layers = model.model.layers[::-1]


def widen_the_mask(model):
    model.config.sliding_window = 20


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (take_a_layer_out, "None of 'full_attention', got 11"),
        (turn_layers_around, "None of 'full_attention', got 11"),
        (widen_the_mask, "20 of 'sliding_attention', got 11"),
    ],
)
def test_windows_that_are_not_those_of_the_masks_are_refused(change, found, when, architecture):
    """A layer's mask is that of its place, and its own window that of where it was made for."""
    model = make_model(architecture)
    if when == "after":
        lemo.enable(model, EVERYTHING)
        model(**BATCH)
    change(model)
    with pytest.raises(ValueError, match=f"layer . to have the window .*, {found}; where layers"):
        lemo.enable(model, EVERYTHING) if when == "before" else model(**BATCH)


def test_layers_without_a_kind_are_refused():
    model = make_model("qwen2")
    model.model.layers.append(model.model.layers[2])
    model.config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="layer 3 .*, None of 'None', got 11; where layers"):
        lemo.enable(model, EVERYTHING)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_windows_that_follow_their_layers(architecture):
    model, dense = make_model(architecture), make_model(architecture)
    for each in (model, dense):
        take_a_layer_out(each)
        each.config.layer_types = each.config.layer_types[1:]
        each.config.use_cache = False  # whose places are those of before
    lemo.enable(model, EVERYTHING)
    for each in (model, dense):
        each(**BATCH).loss.backward()
    assert_same_gradients(model, dense)


@pytest.mark.parametrize("path", ["native", "generic"])
def test_a_decoder_inside_of_a_compiled_module_is_refused(path):
    model = make_model("llama")
    compile_the_decoder(model, None)
    with pytest.raises(ValueError, match="expected LlamaModel, got what torch.compile made of it"):
        lemo.enable(model, lemo.LemoConfig(path=path))


def change_mlp_class(model, monkeypatch):
    forward = scaled(modeling_llama.LlamaMLP.forward)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)


def change_norm_class(model, monkeypatch):
    forward = scaled(modeling_llama.LlamaRMSNorm.forward)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def hook_projections(model, monkeypatch):
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            layer.register_forward_hook(lambda module, args, output: 1.1 * output)


def change_linear_class(model, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", scaled(nn.Linear.forward))


@pytest.mark.parametrize(
    "change", [change_mlp_class, change_norm_class, hook_projections, change_linear_class]
)
def test_what_runs_as_a_module_is_honoured(change, monkeypatch):
    model, dense = lora(make_model("llama")), lora(make_model("llama"))
    before = lora(make_model("llama"))(**BATCH).loss
    for each in (model, dense):
        change(each, monkeypatch) if change is hook_projections else None
    if change is not hook_projections:
        change(model, monkeypatch)
    lemo.enable(model, EVERYTHING)
    loss, expected = model(**BATCH).loss, dense(**BATCH).loss
    assert abs(expected - before) > 1e-3, "the change changes nothing"
    assert_close_fp32(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, dense)


own_forward = modeling_llama.LlamaForCausalLM.forward


def with_norm_of_logits(model, input_ids=None, labels=None, **kwargs):
    """PaLM's loss, which keeps the softmax's divisor near 1."""
    output = own_forward(model, input_ids=input_ids, labels=labels, **kwargs)
    divisors = output.logits[:, :-1].logsumexp(-1)[labels[:, 1:] != -100]
    output.loss = output.loss + 0.1 * divisors.square().mean()
    return output


class OwnCausalLM(modeling_llama.LlamaForCausalLM):
    forward = with_norm_of_logits


def change_causal_lm_class(model, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", with_norm_of_logits)


def change_class_of_causal_lm(model, monkeypatch):
    model.__class__ = OwnCausalLM


def change_forward_of_causal_lm(model, monkeypatch):
    model.forward = functools.partial(with_norm_of_logits, model)


def change_loss_function(model, monkeypatch):
    model.loss_function = lambda *args, **kwargs: 2 * ForCausalLMLoss(*args, **kwargs)


def change_part_of_the_loss(model, monkeypatch):
    part = scaled(loss_utils.fixed_cross_entropy)
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", part)


def change_cross_entropy(model, monkeypatch):
    function = scaled(nn.functional.cross_entropy)
    monkeypatch.setattr(nn.functional, "cross_entropy", function)


OF_ALL_MODELS = (change_causal_lm_class, change_part_of_the_loss, change_cross_entropy)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize(
    ("change", "when"),
    [
        (change_causal_lm_class, "before"),
        (change_causal_lm_class, "after"),
        (change_class_of_causal_lm, "after"),
        (change_forward_of_causal_lm, "before"),
        (change_loss_function, "before"),
        (change_loss_function, "after"),
        (change_part_of_the_loss, "before"),
        (change_part_of_the_loss, "after"),
        (change_cross_entropy, "after"),
    ],
)
def test_a_loss_of_ones_own_is_made_of_what_the_decoder_gives(change, when, keep, monkeypatch):
    model, dense = lora(make_model("llama")), lora(make_model("llama"))
    inner = model.get_base_model()
    if when == "before":
        change(inner, monkeypatch)
    handle = lemo.enable(model, EVERYTHING.replace(keep=keep))
    if when == "after":
        change(inner, monkeypatch)
    loss = model(**BATCH).loss
    if change not in OF_ALL_MODELS:
        change(dense.get_base_model(), monkeypatch)
    expected = dense(**BATCH).loss
    assert_close_fp32(loss, expected)
    if keep == 1:
        loss.backward()
        expected.backward()
        assert_same_gradients(model, dense)
    else:
        assert handle.statistics()[0].attention_rows < 0.6 * 101
    # The layers can be compared all the same, but this loss is not what lemo would make.
    handle.verify(BATCH)
    with pytest.raises(ValueError, match="the loss of Transformers, got one from test_models_int"):
        handle.loss(**BATCH)


def test_verify_finds_changes_beside_a_loss_of_ones_own(monkeypatch):
    model = make_model("llama")
    change_loss_function(model, monkeypatch)
    handle = lemo.enable(model, EVERYTHING)
    monkeypatch.setattr(Architecture, "scale", lambda architecture, index: 0.3)
    with pytest.raises(ValueError, match="Hidden states differ first behind layer 0"):
        handle.verify(BATCH)


def test_where_code_of_a_notebook_comes_from():
    """It is in no module's file, and `functools.wraps` copies the name of the module."""
    names = {"__name__": "__main__", "wraps": functools.wraps, "f": own_forward}
    exec("@wraps(f)\ndef patch(*args):\n    return f(*args)", names)
    assert names["patch"].__module__.startswith("transformers.")
    assert origin(names["patch"]) == "__main__"
    assert origin(own_forward).startswith("transformers.")


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "lemo"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_transformers_itself_does_is_none_of_it(architecture, implementation):
    model = make_model(architecture, attn_implementation=implementation)
    # Transformers puts hooks on layers to record what it is asked for.
    model(**BATCH, output_hidden_states=True)
    lemo.enable(model, EVERYTHING)
    model(**BATCH).loss.backward()


def test_own_forwards():
    assert has_own_forward(modeling_llama.LlamaDecoderLayer)
    assert has_own_forward(modeling_llama.LlamaMLP)
    assert has_own_forward(nn.Linear)
    assert has_own_forward(OwnAttention), "inherited from where its class was written"


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_by_any_name_means_the_models_own_forward(name):
    model, dense = make_model("llama"), make_model("llama")
    handle = lemo.enable(model, config_of(keep=0.5, dense_layers=[], block_size=8))
    ids = BATCH["input_ids"][:1]

    def logits(each):
        cache = DynamicCache(config=each.config)
        each(ids[:, :30], **{name: cache})
        return each(ids[:, 30:], **{name: cache}).logits

    try:
        expected = logits(dense)
    except TypeError:
        pytest.fail(f"this Transformers does not know {name}")
    assert torch.equal(logits(model), expected)
    assert handle.statistics() == []


@pytest.mark.parametrize("name", ["is_causal", "head_mask", "softcap"])
def test_arguments_that_are_not_known_are_refused(name):
    model = make_model("llama")
    lemo.enable(model, EVERYTHING)
    with pytest.raises(ValueError, match=f"^{name}: not known to lemo"):
        model(**BATCH, **{name: 0.5})
    assert model(**BATCH, **{name: None}, token_type_ids=BATCH["input_ids"]).loss > 0


def test_labels_of_a_changed_model_are_refused():
    """What predictors would learn from."""
    model = make_model("llama")
    hook_a_layer(model, None)
    with pytest.raises(ValueError, match="layers.0 .* a hook from test_models_interception"):
        capture_sub_blocks(model, BATCH, lambda *_: None)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("transform", ["grad", "jvp", "per sample"])
@pytest.mark.parametrize("path", ["native", "generic"])
def test_transforms_of_functions_are_refused(path, transform, labels):
    """lemo's operators have none; where the model's own forward runs, they work."""
    model = lora(make_model("llama"))
    lemo.enable(
        model, config_of(keep=1.0, dense_layers=[], block_size=8, path=path, scorer="random")
    )
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    ids = BATCH["input_ids"][:1, :20]

    def loss(weights, ids):
        call = {"input_ids": ids} | ({"labels": ids} if labels else {})
        output = torch.func.functional_call(model, weights, (), call)
        return output.loss if labels else output.logits.mean()

    def run():
        if transform == "grad":
            return torch.func.grad(loss)(weights, ids)
        if transform == "jvp":
            tangents = {name: torch.ones_like(x) for name, x in weights.items()}
            return torch.func.jvp(lambda w: loss(w, ids), (weights,), (tangents,))
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, ids[None])

    if path == "generic" and not labels:
        assert run()
    else:
        with pytest.raises(NotImplementedError, match=r"^torch\.func: expected loss\.backward\(\)"):
            run()
    assert loss(weights, ids) > -100, "functional_call alone may be used"
