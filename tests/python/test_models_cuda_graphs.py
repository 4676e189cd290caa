"""CUDA graphs of training passes: what is captured waits for no device, and gives the same.

On the CPU a stand-in takes the place of a graph (graph_stand_in.py).
"""

import copy
import logging
import pickle
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lemo
from graph_stand_in import WaitsError, take_the_place_of_graphs
from lemo.models import one_set_passes
from lemo.models.layers import cuda_graphs, modes, one_set
from lemo.models.layers.cuda_graphs import CudaGraphs
from tiny_models import flat_config, gradients, lora, make_ids, make_model, packed_batch
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only

TOKENS, BLOCK = 96, 8
SETTINGS = {"keep": 0.5, "scorer": "random", "block_size": BLOCK, "recompute": "none"}


@pytest.fixture
def captured(monkeypatch):
    """Passes are captured on the CPU, by the stand-in."""
    take_the_place_of_graphs(monkeypatch)


def enabled(graphs="on", architecture="llama", adapters=None, **settings):
    model = lora(make_model(architecture, max_position_embeddings=TOKENS), **adapters or {})
    return model, lemo.enable(model, flat_config(**SETTINGS | {"cuda_graphs": graphs} | settings))


def train(model, steps=4, batch=None):
    """(losses, gradients) of some steps of plain gradient descent, on a batch each."""
    found = []
    for step in range(steps):
        ids = make_ids(2, TOKENS, step)
        torch.manual_seed(step)
        loss = model(**(batch or {"input_ids": ids, "labels": ids})).loss
        loss.backward()
        found.append((loss.detach(), {name: x.clone() for name, x in gradients(model).items()}))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
        model.zero_grad()
    return found


CASES = {
    "kept alone": {},
    "all rows": {"keep": 1.0},
    "recomputed": {"recompute": "layer"},
    "selective": {"recompute": "selective"},
    "the rest computed": {"visible_keys": "computed"},
    "all keys": {"visible_keys": "all"},
    "burn-in": {"burn_in": 0.25},
    "pooled scores": {"scorer": "pooled", "keep_last": 1},
    "groups": {"group_size": 32},
    "dropout": {"adapters": {"lora_dropout": 0.3}},
    "opt": {"architecture": "opt"},
    "qwen3": {"architecture": "qwen3"},
}


@pytest.mark.parametrize("case", CASES)
def test_replays_do_not_wait_and_give_the_same(case, captured, monkeypatch):
    model, handle = enabled(**CASES[case])
    found = train(model)
    assert handle.graphs.captured >= 1
    assert handle.graphs.replays >= 2
    kept = handle.statistics()
    # As it is computed where nothing is captured.
    monkeypatch.setattr(one_set_passes, "supports_graphs", lambda device: False)
    model, handle = enabled("off", **CASES[case])
    for (loss, grads), (expected_loss, expected) in zip(found, train(model), strict=True):
        assert_close_fp32(loss, expected_loss, "loss")
        assert grads.keys() == expected.keys()
        for name in expected:
            assert_close_fp32(grads[name], expected[name], name)
    assert [layer.attention_rows for layer in kept] == [
        layer.attention_rows for layer in handle.statistics()
    ]


def test_packed_sequences_and_the_labels_of_a_step(captured, monkeypatch):
    batch = packed_batch([40, 8, 48])
    batch["labels"][:, 50:80] = -100
    batch["num_items_in_batch"] = torch.tensor(123.0)
    # A divisor is read where it is on the CPU; here it stands for one on a GPU.
    loss = sys.modules["lemo.ops.linear_cross_entropy"]
    monkeypatch.setattr(loss, "float", lambda x: 1.0, raising=False)
    model, handle = enabled()
    found = train(model, batch=batch)
    assert handle.graphs.replays >= 1
    monkeypatch.setattr(one_set_passes, "supports_graphs", lambda device: False)
    model, _ = enabled("off")
    for (loss, grads), (expected_loss, expected) in zip(found, train(model, batch=batch)):
        assert_close_fp32(loss, expected_loss, "loss")
        for name in expected:
            assert_close_fp32(grads[name], expected[name], name)


@pytest.mark.parametrize("keys", ["kept", "all", "computed"])
def test_packed_sequences_that_end_elsewhere(keys, captured, monkeypatch):
    """A replay reads where the sequences of its own batch begin."""
    batches = [packed_batch(lengths) for lengths in ([40, 8, 48], [8, 48, 40], [48, 40, 8]) * 2]
    model, handle = enabled(visible_keys=keys)
    found = [train(model, 1, batch)[0] for batch in batches]
    assert handle.graphs.replays >= 3
    monkeypatch.setattr(one_set_passes, "supports_graphs", lambda device: False)
    model, _ = enabled("off", visible_keys=keys)
    for (loss, grads), batch in zip(found, batches, strict=True):
        [(expected_loss, expected)] = train(model, 1, batch)
        assert_close_fp32(loss, expected_loss, "loss")
        for name in expected:
            assert_close_fp32(grads[name], expected[name], name)


def test_the_stand_in_finds_what_waits(captured, monkeypatch):
    original = one_set.OneSet.__call__

    def waiting(self, tensors):
        loss = original(self, tensors)
        loss.item()
        return loss

    monkeypatch.setattr(one_set.OneSet, "__call__", waiting)
    model, _ = enabled()
    with pytest.raises(WaitsError, match="_local_scalar_dense"):
        train(model)


def test_what_changes_in_the_model_is_not_replayed(captured):
    model, handle = enabled()
    train(model, 3)
    replays = handle.graphs.replays
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.scaling["default"] *= 2
    train(model, 1)
    assert handle.graphs.replays == replays
    train(model, 2)
    replays = handle.graphs.replays
    layer.lora_A["default"].weight.requires_grad_(False)
    train(model, 1)
    assert handle.graphs.replays == replays


def test_modules_that_are_said_to_be_unchanged_are_read_once(captured, monkeypatch):
    """Each time that it is said, and in every pass where it is not."""
    reads, read = [], one_set_passes.state_of
    monkeypatch.setattr(one_set_passes, "state_of", lambda x: reads.append(1) or read(x))
    model, handle = enabled()
    with handle.unchanged():
        found = train(model)
        assert len(reads) == 1
        assert handle.graphs.replays == 3
    for layer in model.modules():
        if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
            layer.scaling["default"] *= 3
    with handle.unchanged():
        train(model, 3)
        assert len(reads) == 2
        assert handle.graphs.captured == 2
    train(model, 2)
    assert len(reads) == 4
    expected = train(enabled()[0])
    for (loss, grads), (loss2, grads2) in zip(found, expected, strict=True):
        assert torch.equal(loss, loss2)
        assert all(torch.equal(grads[name], x) for name, x in grads2.items())


def test_nothing_is_said_of_a_copy_that_is_made_meanwhile(captured):
    model, handle = enabled()
    with handle.unchanged():
        train(model, 2)
        copied, of_copy = copy.deepcopy((model, handle))
        train(copied, 3)
        replays = of_copy.graphs.replays
        assert replays > 0
        for layer in copied.modules():
            if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
                layer.scaling["default"] *= 3
        train(copied, 1)
        assert of_copy.graphs.replays == replays


def test_hooks_that_come_later_are_called(captured):
    model, handle = enabled()
    train(model, 3)
    replays = handle.graphs.replays
    layer, called = model.get_base_model().model.layers[1], []
    for module in (layer.self_attn.q_proj.base_layer, layer.mlp.up_proj, layer.input_layernorm):
        hook = module.register_forward_hook(lambda *_: called.append(1))
        train(model, 2)
        assert len(called) == 2
        # The stand-in calls hooks where a graph would not.
        assert handle.graphs.replays == replays
        called.clear()
        hook.remove()


def parts_with_python():
    yield "llama", lambda layer: (layer.mlp, "act_fn")
    yield "opt", lambda layer: (layer, "activation_fn")
    yield "qwen3", lambda layer: (layer.self_attn, "q_norm")


@pytest.mark.parametrize(("architecture", "part"), list(parts_with_python()))
def test_hooks_on_parts_that_run_as_they_are_are_called(architecture, part, captured):
    """In every pass: those that were there before the first one, and those that come later."""
    for before in (True, False):
        model, handle = enabled(architecture=architecture)
        owner, name = part(model.get_base_model().get_decoder().layers[1])
        called = []
        if not before:
            train(model, 3)
        getattr(owner, name).register_forward_hook(lambda *_, to=called: to.append(1))
        replays = handle.graphs.replays
        train(model, 4)
        assert len(called) == 4
        assert handle.graphs.replays == replays


class Counted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.nn.functional.silu(x)


def test_an_activation_of_the_user_is_called_in_every_pass(captured):
    model, handle = enabled()
    activation = model.get_base_model().model.layers[1].mlp.act_fn = Counted()
    train(model, 1)  # in front of which it is tried on a few rows
    before = activation.calls
    train(model, 4)
    assert activation.calls == before + 4
    assert handle.graphs.replays == 0


def test_another_activation_is_not_the_captured_one(captured):
    model, handle = enabled()
    train(model, 3)
    replays = handle.graphs.replays
    for layer in model.get_base_model().model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    found = train(model, 1)
    assert handle.graphs.replays == replays
    other, _ = enabled("off")
    train(other, 3)
    for layer in other.get_base_model().model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert_close_fp32(found[0][0], train(other, 1)[0][0], "loss")


def test_parameters_in_the_same_memory_are_told_apart(captured):
    """Two that become one, and another shape in the same place."""
    model, handle = enabled()
    layers = model.get_base_model().model.layers
    first, second = (layer.self_attn.q_proj.lora_A["default"] for layer in layers[:2])
    second.weight = torch.nn.Parameter(first.weight.detach())
    train(model, 3)
    replays = handle.graphs.replays
    second.weight = first.weight
    train(model, 1)
    assert handle.graphs.replays == replays
    train(model, 2)
    replays = handle.graphs.replays
    base = layers[0].self_attn.o_proj.base_layer.weight
    base.data = base.data.T
    train(model, 1)
    assert handle.graphs.replays == replays


def watchers():
    yield "anomaly detection", torch.autograd.detect_anomaly
    identity = lambda x: x  # noqa: E731
    yield "saved tensors", lambda: torch.autograd.graph.saved_tensors_hooks(identity, identity)
    yield "dispatch mode", TorchDispatchMode


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **kwargs or {})


@pytest.mark.parametrize(("named", "watch"), list(watchers()))
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_what_looks_at_every_operator_sees_them(named, watch, captured, caplog):
    model, handle = enabled()
    train(model, 3)
    replays = handle.graphs.replays
    with caplog.at_level(logging.INFO, "lemo"), Watching() if "mode" in named else watch():
        train(model, 2)
    assert handle.graphs.replays == replays
    assert named in caplog.text
    train(model, 1)
    assert handle.graphs.replays == replays + 1


def test_both_ways_to_set_the_precision_of_products(captured):
    """torch refuses to read the old one where the new one was set."""
    model, handle = enabled()
    before = torch.backends.cuda.matmul.fp32_precision
    train(model, 3)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
        replays = handle.graphs.replays
        train(model, 1)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert handle.graphs.replays == replays


def test_autocast_to_another_dtype_is_another_graph(captured):
    model, handle = enabled()
    with torch.autocast("cpu", torch.bfloat16):
        train(model, 3)
    replays = handle.graphs.replays
    with torch.autocast("cpu", torch.float16):
        train(model, 1)
    assert handle.graphs.replays == replays > 0


def test_a_checkpoint_function_of_the_user_is_called_in_every_pass(captured):
    model, handle = enabled(recompute="auto")
    called = []

    def checkpointed(function, *arguments):
        called.append(1)
        return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    train(model, 4)
    replays = handle.graphs.replays
    assert replays > 0, "torch's own"
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer._gradient_checkpointing_func = checkpointed
    train(model, 4)
    assert len(called) == 4 * len(layers)
    assert handle.graphs.replays == replays


def test_memory_that_runs_out_beside_graphs_is_taken_from_them(captured, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model, handle = enabled()
    train(model, 3)
    handle.graphs.bytes = 2**30
    original, failed = one_set.OneSet.__call__, []
    planned, of = [], modes.Modes.of
    monkeypatch.setattr(
        modes.Modes, "of", lambda self, *given: planned.append(given[-1]) or of(self, *given)
    )

    def short_of_memory(self, tensors):
        if handle.graphs.bytes:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, tensors)

    monkeypatch.setattr(one_set.OneSet, "__call__", short_of_memory)
    ids = make_ids(1, TOKENS)
    with caplog.at_level(logging.INFO, "lemo"):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert failed
    assert loss.isfinite()
    assert handle.graphs.captured == 0
    assert "memory ran out" in caplog.text
    replays = handle.graphs.replays
    train(model, 3)
    assert handle.graphs.replays == replays
    # No memory is set aside for graphs that will not be.
    assert planned == [True, False, False, False, False]


def test_auto_leaves_as_much_memory_as_a_graph_takes(captured, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "free_bytes", lambda device, held: 100 - held)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for spares, need, held, fits in (
        (True, 50, 0, True),
        (True, 51, 0, False),
        (True, 50, 50, True),  # in the pool that there is
        (True, 30, 50, True),
        (True, 51, 50, False),
        (False, 90, 0, True),
    ):
        graphs = CudaGraphs(spares)
        graphs.bytes = held
        if spares and not fits:
            with pytest.raises(cuda_graphs._NoRoomError, match="would stay free"):
                graphs._check_room(need)
        elif spares:
            graphs._check_room(need)


def test_graphs_that_nobody_needs_make_place(captured, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_IDLE_PASSES", 20)
    graphs, module = CudaGraphs(), torch.nn.Linear(1, 1, bias=False)

    def run(size):
        inputs = [torch.ones(size)]
        graphs.run("key", lambda x: (x[0] * module.weight).sum(), inputs, [module.weight], module)

    for size in range(1, 9):
        run(size)
        run(size)
    assert graphs.captured == 8
    for _ in range(20):
        run(8)
    run(9)
    replays = graphs.replays
    run(9)
    assert (graphs.captured, graphs.replays) == (8, replays + 1)


def test_norms_of_heads_are_trained(captured):
    """Qwen3 has norms of queries and keys."""
    found = {}
    for graphs in ("off", "on"):
        model, handle = enabled(graphs, "qwen3")
        for layer in model.get_base_model().model.layers:
            layer.self_attn.q_norm.weight.requires_grad_()
        found[graphs] = train(model)
    assert handle.graphs.replays
    for (_, expected), (_, result) in zip(found["off"], found["on"]):
        assert any("q_norm" in name for name in expected)
        assert result.keys() == expected.keys()
        for name, oracle in expected.items():
            assert_close_fp32(result[name], oracle, name)


def test_a_trained_weight_that_nothing_reads_is_an_obstacle(captured, caplog):
    model, handle = enabled()
    model.get_base_model().model.layers[0].mlp.register_parameter(
        "scale", torch.nn.Parameter(torch.ones(1))
    )
    with caplog.at_level(logging.INFO, "lemo"):
        train(model)
    assert not handle.graphs.replays
    assert "a trained weight that is read elsewhere: layers.0.mlp.scale" in caplog.text


def test_a_step_between_forward_and_backward_is_an_error(captured):
    model, _ = enabled()
    train(model, 3)
    ids = make_ids(2, TOKENS)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


def test_memory_is_given_back_with_the_handle(captured):
    model, handle = enabled()
    train(model, 3)
    assert handle.graphs.captured
    handle.remove()
    assert handle.graphs.captured == 0


def test_a_pass_before_the_backward_of_another_one(captured):
    model, handle = enabled()
    train(model, 3)
    batches = [{"input_ids": make_ids(2, TOKENS, seed)} for seed in (8, 9)]
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    replays = handle.graphs.replays
    sum(losses).backward()
    both = {name: x.clone() for name, x in gradients(model).items()}
    assert replays == handle.graphs.replays, "the second one runs without a graph"
    # Each by itself, with the rows that it kept.
    assert all(x.isfinite().all() for x in both.values())
    train(model, 1)
    assert handle.graphs.replays == replays + 1


def test_a_second_backward(captured):
    """Where the inputs are there still, forward is replayed again; elsewhere it is an error."""
    model, _ = enabled()
    train(model, 3)
    ids = make_ids(2, TOKENS)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = {name: x.clone() for name, x in gradients(model).items()}
    model.zero_grad()
    loss.backward()
    twice = gradients(model)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    model.zero_grad()
    other = model(input_ids=ids, labels=ids).loss
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    other.backward()


def test_a_second_backward_with_dropout(captured):
    model, handle = enabled(adapters={"lora_dropout": 0.3})
    train(model, 3)
    for graph in handle.graphs._graphs.values():
        graph.draws = True
    ids = make_ids(2, TOKENS)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_captures_that_fail_again_and_again_end(captured, monkeypatch):
    tried = []

    def failing(*arguments):
        tried.append(arguments)
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(cuda_graphs, "Graph", failing)
    graphs, module = CudaGraphs(), torch.nn.Linear(1, 1, bias=False)
    for size in range(1, 10):
        for _ in range(4):
            inputs = [torch.ones(size)]
            graphs.run(
                "key", lambda x: (x[0] * module.weight).sum(), inputs, [module.weight], module
            )
    assert len(tried) == 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"select_at": "all", "scorer": "pooled"}, "layers keep rows of their own"),
        ({"recompute": "layer", "adapters": {"lora_dropout": 0.3}}, "recomputed layers with dropo"),
        ({"adapters": {"use_rslora": True, "target_modules": ["lm_head"]}}, "the head is no plain"),
        ({"products": "fp8"}, "products in 8 bits"),
        ({"adapters": {"bias": "all"}, "architecture": "qwen2"}, None),
    ],
)
def test_what_cannot_be_captured_is_said_once(settings, reason, captured, caplog):
    model, handle = enabled(**settings)
    with caplog.at_level(logging.INFO, "lemo"):
        train(model)
    said = [r.getMessage() for r in caplog.records if "run without one" in r.getMessage()]
    assert handle.graphs.replays == 0 if reason else handle.graphs.replays > 0
    assert len(said) == (reason is not None)
    assert reason is None or reason in said[0]


def test_a_capture_that_fails_leaves_the_pass_as_it_was(captured, monkeypatch, caplog):
    def failing(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "Graph", failing)
    model, handle = enabled()
    with caplog.at_level(logging.INFO, "lemo"):
        found = train(model)
    assert "not permitted when stream is capturing" in caplog.text
    assert handle.graphs.replays == 0
    assert all(loss.isfinite() for loss, _ in found)


def test_graphs_are_bounded_and_shapes_that_do_not_come_again_are_not_captured(captured):
    graphs, module = CudaGraphs(), torch.nn.Linear(1, 1, bias=False)

    def function(inputs):
        return (inputs[0] * module.weight).sum()

    for size in range(1, 40):
        graphs.run("key", function, [torch.ones(size)], [module.weight], module)
    assert graphs.captured == 0
    for size in range(1, 40):
        graphs.run("key", function, [torch.ones(size)], [module.weight], module).backward()
    assert graphs.captured == 8


def test_copies_have_graphs_of_their_own(captured):
    model, handle = enabled()
    train(model, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other_handle = other.get_base_model()._lemo_handle
        assert other_handle.graphs is not handle.graphs
        assert other_handle.graphs.captured == 0


def test_off(captured):
    model, handle = enabled("off")
    train(model, 2)
    assert handle.graphs is None
