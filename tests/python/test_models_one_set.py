"""What a pass with one set of rows depends on: labels, modules, and settings of torch."""

from types import SimpleNamespace

import pytest
import torch

import lemo
from graph_stand_in import take_the_place_of_graphs
from lemo.models import one_set_passes
from lemo.models.layers import one_set
from lemo.models.layers.architectures import architecture_of
from tiny_models import gradients, lora, make_model, padded_batch

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("labelled", [1, 17, 60, 64])
def test_rows_of_labels(labelled):
    targets = torch.full((64,), -100)
    with_labels = torch.randperm(64)[:labelled].sort()[0]
    targets[with_labels] = torch.arange(labelled)
    rows, chosen = one_set.labels_of_rows(targets, -100, labelled)
    if rows is None:
        assert labelled > 60
        assert torch.equal(chosen, targets)
        return
    assert labelled <= rows.numel() <= labelled + labelled // 8
    assert torch.equal(rows, rows.unique()), "ascending, each once"
    assert torch.equal(chosen, targets[rows.long()])
    assert set(with_labels.tolist()) <= set(rows.tolist())


@pytest.mark.parametrize("count", [640, 16384, 20000])
def test_answers_of_any_length_have_few_shapes(count):
    targets, sizes = torch.full((count,), -100), set()
    for labelled in range(count // 64):
        targets[labelled] = 1
        rows, _ = one_set.labels_of_rows(targets, -100, labelled + 1)
        sizes.add(rows.numel())
        assert labelled < rows.numel() <= (labelled + 1) * 9 / 8 + count / 64
    assert len(sizes) <= 3


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("divisor", [None, 64, torch.tensor(64)])
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_a_batch_without_labels_adds_nothing(as_on_a_gpu, divisor, keep, monkeypatch):
    """One of several of a step, whose divisor counts the labels of all."""
    monkeypatch.setattr(one_set_passes, "supports_graphs", lambda device: as_on_a_gpu)
    model, batch = lora(make_model("llama", dtype=torch.bfloat16)), padded_batch([40, 25], "left")
    config = lemo.LemoConfig(keep=keep, block_size=8, scorer="random", cuda_graphs="off")
    lemo.enable(model, config)
    assert model(**batch, num_items_in_batch=divisor).loss > 0
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, num_items_in_batch=divisor).loss
    loss.backward()
    assert (loss, loss.dtype) == (0, torch.float32)
    assert not any(gradient.any() for gradient in gradients(model).values())


MATMUL = {
    "fp32_precision": "tf32",
    "allow_bf16_reduced_precision_reduction": False,
    "allow_fp16_reduced_precision_reduction": False,
    "allow_fp16_accumulation": True,
}


@pytest.mark.parametrize("name", [*MATMUL, "deterministic", "library"])
def test_settings_of_torch_by_which_kernels_are_chosen(name, monkeypatch):
    """Stand-ins: without a GPU torch takes not all of them."""
    cuda = torch.backends.cuda
    values = {name: getattr(cuda.matmul, name) for name in MATMUL}
    before = one_set._switches()
    if name == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif name == "library":
        monkeypatch.setattr(cuda, "preferred_blas_library", lambda: "another")
    else:
        monkeypatch.setattr(cuda, "matmul", SimpleNamespace(**values | {name: MATMUL[name]}))
    assert one_set._switches() != before
    assert one_set._switches() == one_set._switches()


def hooked(module):
    module.register_forward_hook(lambda *_: None)


def moved(parameter):
    parameter.data = parameter.data.clone()


def transposed(parameter):
    parameter.data = parameter.data.T


CHANGES = {
    "training": lambda layer: layer.eval(),
    "scale": lambda layer: vars(layer.self_attn).update(scaling=1.0),
    "window": lambda layer: vars(layer.self_attn).update(sliding_window=7),
    "another activation": lambda layer: setattr(layer.mlp, "act_fn", torch.nn.SiLU()),
    "a hook on the activation": lambda layer: hooked(layer.mlp.act_fn),
    "checkpoints": lambda layer: vars(layer).update(gradient_checkpointing=True),
    "a hook on an adapter": lambda layer: hooked(layer.self_attn.q_proj),
    "a hook on a weight's layer": lambda layer: hooked(layer.self_attn.q_proj.base_layer),
    "scaling": lambda layer: layer.self_attn.q_proj.scaling.update(default=9.0),
    "dropout": lambda layer: layer.self_attn.q_proj.lora_dropout.update(
        {"default": torch.nn.Dropout(0.5)}
    ),
    "frozen": lambda layer: layer.self_attn.q_proj.lora_A["default"].requires_grad_(False),
    "a weight that moved": lambda layer: moved(layer.mlp.up_proj.weight),
    "an adapter that moved": lambda layer: moved(layer.self_attn.q_proj.lora_A["default"].weight),
    "strides": lambda layer: transposed(layer.self_attn.o_proj.base_layer.weight),
    "eps": lambda layer: vars(layer.input_layernorm).update(variance_epsilon=0.5),
    "a hook on a norm": lambda layer: hooked(layer.post_attention_layernorm),
    "a norm that moved": lambda layer: moved(layer.input_layernorm.weight),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_layer_is_another_state(change):
    model = lora(make_model("qwen2"))
    architecture = architecture_of(model)
    before = one_set.state_of(architecture).said
    assert one_set.state_of(architecture).said == before
    CHANGES[change](architecture.layer(1))
    assert one_set.state_of(architecture).said != before


def test_another_checkpoint_function_is_another_state():
    model = lora(make_model("qwen2"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    architecture = architecture_of(model)
    before = one_set.state_of(architecture).said
    architecture.layer(1)._gradient_checkpointing_func = lambda function, *_: function(*_)
    assert one_set.state_of(architecture).said != before


@pytest.mark.parametrize("end", ["layernorm", "lm_head", "lora_A.default"])
def test_weights_that_are_no_parameters_are_not_captured(end, monkeypatch):
    """A replay would read those of the captured pass, and has no gradient for them."""
    take_the_place_of_graphs(monkeypatch)
    found, batch = [], padded_batch([40, 25])
    for graphs in ("off", "on"):
        model, scale = lora(make_model("llama")), torch.tensor(0.9, requires_grad=True)
        parts = [module for name, module in model.named_modules() if name.endswith(end)]
        weights = [module._parameters.pop("weight").detach() for module in parts]
        handle = lemo.enable(model, lemo.LemoConfig(keep=1.0, cuda_graphs=graphs))
        for _ in range(3):
            for module, weight in zip(parts, weights, strict=True):
                module.weight = weight * scale
            model(**batch).loss.backward()
        found.append(scale.grad)
    assert handle.graphs.captured == 0
    assert found[0] != 0
    assert torch.equal(*found)
