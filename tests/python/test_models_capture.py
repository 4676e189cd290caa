"""capture_sub_blocks shows the tensors of the dense model, and nothing else changes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lemo.models.layers.capture import capture_sub_blocks
from tiny_models import ARCHITECTURES, as_padded, make_model, packed_batch, padded_batch
from tolerances import assert_close_fp32, assert_close_low_precision

BATCHES = {
    "right": lambda: padded_batch([33, 12]),
    "left": lambda: padded_batch([33, 12], "left"),
    "packed": lambda: packed_batch([30, 15]),
}


def captured(model, batch):
    """{(layer, kind): (x, tensors)}, and the layout."""
    seen, layouts = {}, []

    def visit(layer, kind, x, tensors, layout):
        assert not torch.is_grad_enabled()
        assert (layer, kind) not in seen
        seen[layer, kind] = (x.clone(), dict(tensors))
        layouts.append(layout)

    capture_sub_blocks(model, batch, visit, block_size=8)
    return seen, layouts[-1]


@pytest.fixture
def spied(monkeypatch):
    """An attention implementation of Transformers that notes its queries and keys by layer."""
    notes = {}

    def spy(module, query, key, value, attention_mask, scaling=None, **kwargs):
        notes[module.layer_idx] = (query.transpose(1, 2) * scaling, key.transpose(1, 2))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )

    for interface, function in ((AttentionInterface, spy), (AttentionMaskInterface, sdpa_mask)):
        mapping = {**interface._global_mapping, "spy": function}
        monkeypatch.setattr(interface, "_global_mapping", mapping)
    return notes


def hooked(model, batch):
    """What the modules of Transformers get and give, by (layer, name)."""
    seen, hooks = {}, []
    opt = model.config.model_type == "opt"
    decoder = model.model.decoder if opt else model.model

    def note(module, key, take):
        def hook(module, args, output):
            seen[key] = take(args, output)

        hooks.append(module.register_forward_hook(hook))

    for index, layer in enumerate(decoder.layers):
        names = ("self_attn_layer_norm", "final_layer_norm")
        if not opt:
            names = ("input_layernorm", "post_attention_layernorm")
        for kind, name in zip(("attention", "mlp"), names):
            note(getattr(layer, name), (index, kind), lambda args, output: output)
        last = layer.fc2 if opt else layer.mlp.down_proj
        note(last, (index, "activation"), lambda args, output: args[0])
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


# The GPU's attention knows no fp32.
@pytest.mark.cpu_only
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_are_those_of_transformers(architecture, batch, spied):
    batch = BATCHES[batch]()
    seen, layout = captured(make_model(architecture).eval(), batch)
    assert list(seen) == [(i, kind) for i in range(3) for kind in ("attention", "mlp")]
    assert (layout.block_size, layout.num_tokens) == (8, 45)

    dense = make_model(architecture, attn_implementation="spy").eval()
    batch = as_padded(batch) if "position_ids" in batch else batch
    mask = batch["attention_mask"].bool()
    for (layer, name), value in hooked(dense, batch).items():
        value = value.reshape(*mask.shape, -1)[mask]
        if name == "activation":
            assert_close_fp32(seen[layer, "mlp"][1]["activation"], value, f"{layer} {name}")
        else:
            assert_close_fp32(seen[layer, name][0], value, f"{layer} {name}")
    for layer, (query, key) in spied.items():
        tensors = seen[layer, "attention"][1]
        assert_close_fp32(tensors["q"] * tensors["scale"], query[mask], f"{layer} q")
        assert_close_fp32(tensors["k"], key[mask], f"{layer} k")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_in_bf16(architecture, spied):
    batch = BATCHES["right"]()
    mask = batch["attention_mask"].bool()

    def weights(attn_implementation, dtype):
        model = make_model(architecture, attn_implementation=attn_implementation)
        return model.to(torch.bfloat16).to(dtype).eval()

    seen, _ = captured(weights("eager", torch.bfloat16), batch)
    notes = []
    for dtype in (torch.bfloat16, torch.float32):
        tensors = dict(hooked(weights("spy", dtype), batch))
        for layer, (query, key) in spied.items():
            tensors |= {(layer, "q"): query, (layer, "k"): key}
        notes.append(
            {name: value.reshape(*mask.shape, -1)[mask] for name, value in tensors.items()}
        )
    for (layer, name), exact in notes[1].items():
        x, tensors = seen[layer, "mlp" if name in ("mlp", "activation") else "attention"]
        value = x if name in ("attention", "mlp") else tensors[name]
        value = value * tensors["scale"] if name == "q" else value
        plain = notes[0][layer, name]
        assert_close_low_precision(
            value.flatten(1).to(plain.dtype), plain, exact, f"{layer} {name}"
        )


def test_lora_counts_and_the_model_is_left_alone():
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), settings).eval()
    plain, _ = captured(make_model("llama").eval(), BATCHES["right"]())
    adapted, _ = captured(model, BATCHES["right"]())
    assert torch.equal(adapted[0, "attention"][0], plain[0, "attention"][0])
    assert not torch.equal(adapted[0, "attention"][1]["q"], plain[0, "attention"][1]["q"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unsupported_model_is_named():
    with pytest.raises(TypeError, match="model: expected one of LlamaForCausalLM"):
        capture_sub_blocks(torch.nn.Linear(2, 2), BATCHES["right"](), lambda *args: None)
