"""Each layer's own mode: as listed in the settings, and as planned by free memory."""

import pytest
import torch
from peft import LoraConfig

import lemo
from lemo import LemoConfig
from lemo.models.layers import modes as modes_module
from lemo.models.layers.adapter_sizes import adapters_of_layer
from lemo.models.layers.architectures import architecture_of
from lemo.models.memory.free_memory import free_bytes
from lemo.planner.memory import StepMemory
from lemo.planner.shape import LINEAR, Adapters, LayerRows, shape_of, step_of
from lemo.settings.elimination import LayerwiseConfig
from model_checks import saved_bytes
from planner_cases import PeakOfTensors
from tiny_models import HIDDEN, config_of, gradients, lora, make_ids, make_model
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only

LAYERS, TOKENS = 4, 256
MIXED = ["layer", "selective", "none", "layer"]


def model_and_batch(**settings):
    model = make_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=TOKENS)
    ids = make_ids(1, TOKENS)
    return lora(model, **settings), {"input_ids": ids, "labels": ids}


def enabled(model, recompute, **settings):
    defaults = {"keep": 0.5, "block_size": 8, "dense_layers": [], "scorer": "random"}
    return lemo.enable(model, config_of(recompute=recompute, **defaults | settings))


def memory_of(model, rows=TOKENS // 2, **settings):
    shape = shape_of(model.get_base_model().config)
    kept = [LayerRows(rows, rows)] * shape.layers
    step = step_of(shape, [TOKENS], kept, size=4, cuda=False, **settings)
    return StepMemory(shape, Adapters(4), step)


def stored(model, batch, recompute):
    """Bytes that autograd stores with these modes."""
    handle = enabled(model, recompute)
    size = saved_bytes(model, batch)
    handle.remove()
    return size


@pytest.fixture
def asked(monkeypatch):
    """Grows by one with every plan that is made, on a device with memory for everything."""
    made: list[int] = []
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 2**40)
    make = modes_module._actions
    monkeypatch.setattr(
        modes_module, "_actions", lambda *arguments: made.append(1) or make(*arguments)
    )
    return made


def test_gradients_of_mixed_modes_are_those_of_none():
    model, batch = model_and_batch()
    results = []
    for recompute in ("none", MIXED):
        handle = enabled(model, recompute)
        model(**batch).loss.backward()
        results.append({name: value.clone() for name, value in gradients(model).items()})
        model.zero_grad()
        handle.remove()
    for name, expected in results[0].items():
        assert_close_fp32(results[1][name], expected, name)


def test_mixed_modes_store_what_each_of_them_stores():
    model, batch = model_and_batch()
    memory = memory_of(model)
    # With one layer of each that stores something, which all of them share (tables, rows).
    first, second = (
        ["none", "selective", "layer", "layer"],
        ["none", "selective", "none", "selective"],
    )
    predicted = memory.layer(2, "none").kept + memory.layer(3, "selective").kept
    predicted -= 2 * memory.layer(2, "layer").kept
    assert stored(model, batch, second) - stored(model, batch, first) == predicted


def test_one_mode_for_each_layer():
    model, _ = model_and_batch()
    with pytest.raises(
        ValueError, match="recompute: expected 4 entries, one for each layer, got 1"
    ):
        enabled(model, ["layer"])


def test_auto_stores_what_fits(monkeypatch):
    """Less and less memory: everything is stored, some layers are recomputed, all are."""
    model, batch = model_and_batch()
    memory = memory_of(model)
    none, layer = stored(model, batch, "none"), stored(model, batch, "layer")
    # Free memory is that beside the weights.
    needed = (
        memory.peak(["none"] * LAYERS)
        - memory.weights
        + 3 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    )
    sizes = []
    for free in (2 * needed, needed - memory.layer(0, "none").kept, 1):
        monkeypatch.setattr(modes_module, "free_bytes", lambda device, held, free=free: free)
        sizes.append(stored(model, batch, "auto"))
    assert sizes[0] == none
    assert layer < sizes[1] < none
    assert sizes[2] == layer


@pytest.mark.parametrize(
    "trained",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
)
def test_a_trained_embedding_is_planned_for(trained, monkeypatch):
    """Its gradient and the optimizer's state, which are there from the second step on."""
    plans = []
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 2**40)
    make = modes_module._actions

    def made(planner, free, modes):
        plans.append(planner.plan(free, modes))
        return make(planner, free, modes)

    monkeypatch.setattr(modes_module, "_actions", made)
    model = make_model("llama", vocab_size=2000, max_position_embeddings=TOKENS)
    model, ids = lora(model, **trained), make_ids(1, TOKENS)
    # Logits of a chunk are no tensor here; of few rows they are small.
    lemo.enable(model, LemoConfig(keep=0.5, block_size=8, loss_chunk=1))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with PeakOfTensors(model) as tensors:
        weights = tensors.now
        for step in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            if step == 0:
                optimizer.step()
                tensors.peak = tensors.now
    (plan,) = plans
    found = tensors.peak - weights
    sums = 4 * TOKENS // 2 * HIDDEN
    assert found <= plan.peak < 1.05 * found + sums


def test_windows_and_groups_of_attention_count_in_the_time(monkeypatch):
    times = []
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 2**40)
    make = modes_module.StepTime
    monkeypatch.setattr(
        modes_module, "StepTime", lambda *a, **k: times.append(make(*a, **k)) or times[-1]
    )
    for window, group in ((None, None), (64, None), (None, 64)):
        sizes = {"max_position_embeddings": 2048, "sliding_window": window}
        model, ids = lora(make_model("mistral", **sizes)), make_ids(1, 2048)
        layerwise = LayerwiseConfig(group_size=group)
        lemo.enable(model, LemoConfig(keep=1.0, block_size=16, layerwise=layerwise))
        model(input_ids=ids, labels=ids).loss.backward()
    whole, windowed, grouped = (time.layer(0, "none") for time in times)
    assert max(windowed, grouped) < whole


def test_auto_without_a_gpu_stores_everything():
    assert free_bytes(torch.device("cpu")) is None
    model, batch = model_and_batch()
    assert stored(model, batch, "auto") == stored(model, batch, "none")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_asks_for_the_least_memory(reentrant, monkeypatch):
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 2**40)
    model, batch = model_and_batch()
    model.enable_input_require_grads()
    expected = stored(model, batch, "layer")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert stored(model, batch, "auto") == expected


def test_a_plan_is_made_once_for_passes_of_one_size(asked):
    model, batch = model_and_batch()
    enabled(model, "auto")

    def plans(change, autocast=False):
        """How many are made for such a pass."""
        before = len(asked)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**{name: change(value) for name, value in batch.items()}).loss
        loss.backward()
        return len(asked) - before

    assert [plans(lambda x: x) for _ in range(3)] == [1, 0, 0]
    # Up to an eighth fewer tokens.
    assert [plans(lambda x, count=count: x[:, :count]) for count in (250, 242)] == [0, 0]
    assert plans(lambda x: x[:, :64]) == 1
    # As many in two sequences.
    assert plans(lambda x: x.view(2, -1)) == 1
    assert [plans(lambda x: x, autocast) for autocast in (True, False, True)] == [1, 0, 0]


def test_another_plan_is_made_where_more_rows_are_kept(asked):
    model, batch = model_and_batch()
    handle = enabled(model, "auto", keep_schedule=((0.5, 1.0),))
    for step, plans in ((0, 1), (9, 2), (1, 2), (8, 2)):
        handle.begin_step(step, 10)
        model(**batch).loss.backward()
        assert len(asked) == plans
    # So where a gradient of the residual is wanted, which is stored beside the rest.
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert len(asked) == 3


@pytest.mark.parametrize("case", ["others have rows", "evaluation", "no gradients", "sharded"])
def test_passes_that_are_not_planned_do_not_look_at_the_memory(case, monkeypatch):
    """What processes that share out rows have free differs, and they have to store the same."""
    model, _ = model_and_batch()
    monkeypatch.setattr(modes_module.Modes, "_planned", lambda *_: pytest.fail("planned"))
    monkeypatch.setattr(modes_module, "is_sharded", lambda layer: case == "sharded")
    model.train(case != "evaluation")
    config = config_of(recompute="auto", head_groups=4)
    alone = case != "others have rows"
    modes = modes_module.Modes(architecture_of(model), config, alone=alone)
    with torch.set_grad_enabled(case != "no gradients"):
        found = modes.of(None, None, None, True)
    assert found == (["auto"] * LAYERS, (0.0,) * LAYERS, 4 if alone else 1)


@pytest.mark.parametrize(
    "layerwise", [{"keep": [0.5, 0.25, 1.0, 0.5]}, {"keep_mlp": 0.25}, {"group_size": 32}]
)
def test_a_plan_knows_what_each_layer_keeps(layerwise, monkeypatch):
    steps, make = [], modes_module.step_of
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 2**40)
    monkeypatch.setattr(
        modes_module, "step_of", lambda *a, **k: steps.append((a[2], k)) or make(*a, **k)
    )
    model, batch = model_and_batch()
    handle = lemo.enable(model, LemoConfig(keep=0.5, block_size=8, layerwise=layerwise))
    model(**batch).loss.backward()
    ((rows, settings),) = steps
    kept = [(layer.attention_rows, layer.mlp_rows) for layer in handle.statistics()]
    assert [tuple(layer) for layer in rows] == [
        tuple(map(modes_module.rounded_up, layer)) for layer in kept
    ]
    one_set = len({rows for layer in kept for rows in layer}) == 1
    assert (settings["drops"], settings["all_count"]) == (one_set, not one_set)
    assert settings["shifted"] == ("group_size" in layerwise)


def of_two_dtypes(layers):
    layers[1].self_attn.q_proj.lora_A.to(torch.bfloat16)
    layers[1].self_attn.q_proj.lora_B.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [of_two_dtypes, lambda layers: layers[2].mlp.up_proj.weight.requires_grad_()]
)
def test_what_is_not_planned_trains_as_without_a_plan(change, monkeypatch):
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 1)
    model, batch = model_and_batch(target_modules=["q_proj"])
    change(model.get_base_model().model.layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert stored(model, batch, "auto") == stored(model, batch, "none")


def test_rows_are_rounded_up_by_an_eighth_at_most():
    assert all(rows <= modes_module.rounded_up(rows) <= rows * 9 / 8 for rows in range(1, 5000))
    assert len({modes_module.rounded_up(rows) for rows in range(4097, 8193)}) == 8


@pytest.mark.parametrize("visible_keys", ["kept", "all", "computed"])
def test_only_passes_over_kept_rows_alone_are_planned(visible_keys, asked):
    """What rows that are computed for others take is not predicted."""
    model, batch = model_and_batch()
    enabled(model, "auto", visible_keys=visible_keys)
    model(batch["input_ids"]).logits.sum().backward()
    assert asked == []
    model(**batch).loss.backward()
    assert len(asked) == (visible_keys == "kept")


def test_adapters_of_a_layer():
    model, _ = model_and_batch(target_modules=["q_proj", "down_proj"])
    layer = model.get_base_model().model.layers[0]
    found = adapters_of_layer(layer, torch.float32, False)
    assert found == Adapters(4, frozenset(["q_proj", "down_proj"]))
    assert (found.rank_of("q_proj"), found.rank_of("up_proj")) == (4, 0)
    assert adapters_of_layer(layer, torch.bfloat16, False).apart
    assert not adapters_of_layer(layer, torch.bfloat16, True).apart
    model, _ = model_and_batch(
        target_modules=LINEAR, lora_dropout=0.1, modules_to_save=["input_layernorm"]
    )
    layer = model.get_base_model().model.layers[0]
    found = adapters_of_layer(layer, torch.float32, False)
    assert found == Adapters(4, dropout=True, norms=True)
    layer.mlp.up_proj.base_layer.weight.requires_grad_()
    assert adapters_of_layer(layer, torch.float32, False) is None


def test_adapters_that_come_later_are_planned_for(monkeypatch):
    """Switched ones store other things; a layer in the middle alone may have some."""
    asked = []
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 2**40)
    make = modes_module.StepMemory
    monkeypatch.setattr(
        modes_module, "StepMemory", lambda *a, **k: asked.append(a[1]) or make(*a, **k)
    )
    model, batch = model_and_batch(target_modules=["q_proj"])
    model.add_adapter("large", LoraConfig(r=16, target_modules=LINEAR))
    enabled(model, "auto")
    for name in ("default", "large", "default"):
        model.set_adapter(name)
        model(**batch).loss.backward()
    assert [(each.rank, len(each.targets)) for each in asked] == [(4, 1), (16, len(LINEAR))]
    model, batch = model_and_batch(target_modules=LINEAR, layers_to_transform=[2])
    enabled(model, "auto")
    model(**batch).loss.backward()
    assert (asked[-1].rank, asked[-1].targets) == (4, frozenset(LINEAR))


def test_what_is_trained_later_beside_adapters_is_planned_for(monkeypatch):
    """The embedding, for whose gradient and optimizer's state there has to be room; the head."""
    fixed, rest = [], []
    monkeypatch.setattr(modes_module, "free_bytes", lambda device, held: 2**40)
    make = modes_module.Planner

    def made(memory, time, more, *others):
        fixed.append(more)
        return make(memory, time, more, *others)

    monkeypatch.setattr(modes_module, "Planner", made)
    model, batch = model_and_batch()
    handle, base = enabled(model, "auto"), model.get_base_model()
    modes = handle._forward.elimination.decoder._modes
    own = modes._planned
    monkeypatch.setattr(modes, "_planned", lambda *a: rest.append(own(*a)) or rest[-1])
    embedding = base.model.embed_tokens.weight
    for trained in (None, embedding, base.lm_head.weight):
        if trained is not None:
            trained.requires_grad_()
        for _ in range(2):
            model(**batch).loss.backward()
    assert [actions is not None for actions in rest] == [True] * 4 + [False] * 2
    first, second = fixed
    assert second - first == 3 * embedding.nbytes


def test_layers_of_two_dtypes_are_not_planned():
    bf16, fp32 = Adapters(4, size=2), Adapters(8, frozenset(["q_proj"]), apart=True)
    assert bf16.united(fp32) is None
    assert bf16.united(Adapters(0, frozenset(), size=2)) == bf16
    assert Adapters(0, frozenset(), size=2).united(fp32) == fp32
    both = fp32.united(Adapters(4, frozenset(["up_proj"]), dropout=True, norms=True))
    assert (both.size, both.apart, both.dropout, both.norms) == (4, True, True, True)
    assert {name: both.rank_of(name) for name in LINEAR if both.rank_of(name)} == {
        "q_proj": 8,
        "up_proj": 4,
    }
