"""Saved activations on the host: bits, the bound of the pool, and what is refused."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch

import lemo
from devices import no_synchronisation, on_gpu
from lemo.models.layers.architectures import architecture_of
from lemo.models.memory import host_pool, offload
from lemo.models.memory.host_pool import HostPool
from lemo.models.training_forward import TrainingForward
from lemo.packing.batch import PackedBatch
from model_cases import BATCHES
from planner_cases import PeakOfTensors
from tiny_models import config_of, gradients, lora, make_model

MODES = ["none", "selective", "layer", ("none", "selective", "layer")]
MIB, ALIGNMENT = 2**20, 64
SETTINGS = {
    "everything": {"keep": 1.0},
    "shared set": {"keep": 0.5},
    "own sets": {"keep": 0.4, "keep_mlp": 0.6, "select_at": "all"},
    "computed keys": {"keep": 0.5, "visible_keys": "computed"},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tensors of tiny models move, too, and take few bytes more than they have."""
    monkeypatch.setattr(offload, "SMALLEST", 256)
    monkeypatch.setattr(host_pool, "HOST_ALIGNMENT", ALIGNMENT)


@pytest.fixture(autouse=True)
def deterministic():
    """On a GPU the gradient of the queries is the same from run to run only so."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on_gpu(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def steps(model, batch, count=2, **settings):
    """(losses, gradients of each step, the pool)."""
    defaults = {"block_size": 8, "dense_layers": [], "scorer": "random"}
    handle = lemo.enable(model, config_of(**defaults | settings))
    torch.manual_seed(3)
    losses, found = [], []
    for _ in range(count):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        found.append({name: gradient.clone() for name, gradient in gradients(model).items()})
        model.zero_grad()
    del loss
    pool = handle.path.forward.offload.pool
    handle.remove()
    return losses, found, pool


def assert_equal(result, expected):
    assert all(map(torch.equal, result[0], expected[0]))
    for got, oracle in zip(result[1], expected[1], strict=True):
        assert got.keys() == oracle.keys()
        assert all(torch.equal(got[name], oracle[name]) for name in oracle)


@pytest.mark.parametrize("recompute", MODES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_bits_of_the_native_path(name, recompute):
    model, batch = lora(make_model("llama"), lora_dropout=0.2), BATCHES["packed"]()
    settings = SETTINGS[name] | {"recompute": recompute}
    expected = steps(model, batch, **settings)
    assert expected[2] is None
    for share in (1.0, 0.4, (0.0, 1.0, 0.3)):
        result = steps(model, batch, offload=share, host_memory=0.25, **settings)
        assert_equal(result, expected)
        assert result[2].most > 0
        assert result[2].taken == 0


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_bits_of_the_generic_path(checkpointing):
    """The model's own layers, with its own checkpoints (reentrant or not) and without."""
    model, batch = lora(make_model("llama"), lora_dropout=0.2), BATCHES["right"]()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    settings = {"path": "generic", "keep": 0.5}
    expected = steps(model, batch, **settings)
    sizes = []
    for share in (1.0, 0.5, [0.0, 0.0, 1.0]):
        result = steps(model, batch, offload=share, host_memory=0.25, **settings)
        assert_equal(result, expected)
        sizes.append(result[2].most)
        assert result[2].taken == 0
    assert sizes[0] > sizes[1] > 0


def test_checkpoint_functions_of_the_user_and_every_parameter():
    model, batch = make_model("qwen3"), BATCHES["left"]()
    expected = steps(model, batch, recompute="none")
    assert_equal(steps(model, batch, recompute="none", offload=1.0, host_memory=0.25), expected)
    model._set_gradient_checkpointing(True, lambda function, *a: checkpointed(function, *a))
    expected = steps(model, batch)
    assert_equal(steps(model, batch, offload=1.0, host_memory=0.25), expected)


def checkpointed(function, *arguments):
    return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)


@pytest.mark.cpu_only
@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
def test_a_share_of_the_bytes_is_on_the_host_and_not_on_the_device(recompute):
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    left, taken = [], []
    for share in (0.0, 0.25, 0.5, 1.0):
        config = {"offload": share, "host_memory": 0.25, "recompute": recompute, "keep": 1.0}
        handle = lemo.enable(model, config_of(**config))
        with PeakOfTensors(model) as tensors:
            loss = model(**batch).loss
        pool = handle.path.forward.offload.pool
        taken.append(0 if pool is None else pool.taken)
        # The pool is a tensor, too.
        left.append(tensors.now - (0 if pool is None else pool.capacity))
        loss.backward()
        handle.remove()
    cut = 3 * (offload._CUT + ALIGNMENT)
    assert taken[2] == pytest.approx(taken[3] / 2, abs=cut)
    assert taken[1] == pytest.approx(taken[3] / 4, abs=cut)
    for there, here in zip(taken, left):
        # What is rounded up.
        assert 0 <= there - (left[0] - here) < 3 * 20 * ALIGNMENT


def test_the_pool_is_never_larger_than_it_was_said_to_be():
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    settings = {"recompute": "none", "offload": 1.0}
    *_, pool = steps(model, batch, host_memory=0.25, **settings)
    enough = pool.most
    *_, pool = steps(model, batch, host_memory=enough / 2**30, **settings)
    assert pool.most == enough == pool.capacity
    with pytest.raises(ValueError, match=r"host_memory: expected room for .* of layer 2, got"):
        steps(model, batch, host_memory=(enough - ALIGNMENT) / 2**30, **settings)


def test_more_than_the_host_has_is_refused_by_enable():
    model = lora(make_model("llama"))
    with pytest.raises(ValueError, match="host_memory: expected at most the .* free on the host"):
        lemo.enable(model, config_of(offload=1.0, host_memory=1e9))
    with pytest.raises(ValueError, match="host_memory: expected GiB of the host for offload"):
        config_of(offload=0.5)
    with pytest.raises(ValueError, match="offload: expected 3 entries, one for each layer, got 2"):
        lemo.enable(model, config_of(offload=[1.0, 0.5], host_memory=0.1))
    with pytest.raises(ValueError, match="offload: expected a share of each layer"):
        lemo.enable(model, config_of(path="generic", host_memory=0.1, scorer="random"))


def test_what_is_not_supported_is_refused(monkeypatch):
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    config = config_of(offload=1.0, host_memory=0.25).resolved(False)
    with pytest.raises(NotImplementedError, match="host_memory: expected 0 with context_parallel"):
        TrainingForward(architecture_of(model), config, context=object())
    monkeypatch.setattr(offload, "is_sharded", lambda module: True)
    lemo.enable(model, config)
    with pytest.raises(NotImplementedError, match="host_memory: expected 0 with fully_shard"):
        model(**batch)


@pytest.mark.cpu_only
def test_auto_says_where_nothing_is_planned():
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    with pytest.warns(UserWarning, match="nothing goes to the host, since memory is not predicted"):
        *_, pool = steps(model, batch, keep=1.0, host_memory=0.25)
    assert pool is None


def test_passes_without_a_graph_move_nothing():
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    handle = lemo.enable(model, config_of(offload=1.0, host_memory=0.25))
    with torch.no_grad():
        expected = handle.loss(**batch)
    pool = handle.path.forward.offload.pool
    assert pool is None or pool.most == 0
    assert torch.equal(handle.loss(**batch), expected)


def test_a_retained_graph_and_two_graphs_at_once():
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    settings = {"block_size": 8, "dense_layers": [], "keep": 1.0, "recompute": "selective"}

    def run():
        first, second = model(**batch).loss, model(**batch).loss
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        found = {name: gradient.clone() for name, gradient in gradients(model).items()}
        model.zero_grad()
        return found

    handle = lemo.enable(model, config_of(**settings))
    expected = run()
    handle.remove()
    handle = lemo.enable(model, config_of(offload=0.7, host_memory=0.25, **settings))
    found = run()
    assert all(torch.equal(found[name], oracle) for name, oracle in expected.items())
    assert handle.path.forward.offload.pool.taken == 0


def test_backward_may_begin_and_end_at_any_layer_and_has_two_layers_on_the_device():
    module = torch.nn.Linear(64, 64)
    x = module.weight  # stays on the device

    def compute(begin=lambda index, module: nullcontext()):
        y, sums = x, []
        for index in range(6):
            with begin(index, module):
                y = (y + x).tanh()
            sums.append(y.sum())
            if index == 3:
                middle = y
        return sums, middle

    def gradients_of(sums, middle):
        # The second ends while layer 3 is on its way, and the third begins below it.
        for last, first in ((5, x), (5, middle), (1, x), (5, x), (0, x), (3, x)):
            yield torch.autograd.grad(sums[last], first, retain_graph=True)[0]

    expected = list(gradients_of(*compute()))
    moved = offload.Offload(MIB).begin([1.0] * 6, x.device)
    with PeakOfTensors(module) as tensors:
        results = compute(moved.layer)
        moved.finish()
        before = tensors.now
        for found, oracle in zip(gradients_of(*results), expected):
            assert torch.equal(found, oracle)
            assert tensors.now - before <= 3 * x.nbytes  # the gradient is the third


def test_a_conjugate_and_what_is_elsewhere_stay():
    """A conjugate has the bytes of another number; a copy of a meta tensor has none."""
    module = torch.nn.Linear(1, 1)
    z, w = torch.randn(2, 64, 64, dtype=torch.complex64).requires_grad_().unbind()
    elsewhere = torch.ones(64, 64, device="meta", requires_grad=True)

    def compute():
        # The imaginary part of a conjugate is a view that is marked as negative.
        return (z.conj() * w).real.sum() + (z.conj().imag * w.imag).sum()

    expected = torch.autograd.grad(compute(), (z, w))
    made = offload.Offload(MIB)
    moved = made.begin([1.0], z.device)
    with moved.layer(0, module):
        loss, away = compute(), elsewhere * elsewhere
    moved.finish()
    assert made.pool.taken == 2 * z.nbytes  # both are in one storage
    assert all(map(torch.equal, torch.autograd.grad(loss, (z, w)), expected))
    away.sum().backward()


def test_a_graph_that_is_dropped_frees_its_slots():
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    handle = lemo.enable(model, config_of(offload=1.0, host_memory=0.25, keep=1.0))
    loss = model(**batch).loss
    pool = handle.path.forward.offload.pool
    assert pool.taken > 0
    del loss
    gc.collect()
    assert pool.taken == 0


def test_parameters_and_what_all_layers_share_stay(monkeypatch):
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    moved = []
    leave = offload._Storage.leave

    def listen(storage, *arguments):
        moved.append(storage._here.data_ptr())
        return leave(storage, *arguments)

    monkeypatch.setattr(offload._Storage, "leave", listen)
    handle = lemo.enable(model, config_of(offload=1.0, host_memory=0.25, recompute="none"))
    begin, batches = handle.path.forward._begin, []

    def begun(arguments):
        batch, embed = begin(arguments)

        def embedded(*given):
            batches.append(embed(*given))
            return batches[-1]

        return batch, embedded

    monkeypatch.setattr(handle.path.forward, "_begin", begun)
    model(**batch).loss.backward()
    (made, _), stay = batches[0], [p.data_ptr() for p in model.parameters()]
    assert moved
    assert not {*moved} & {*stay, *(table.data_ptr() for table in made.rotary)}


@pytest.mark.parametrize("select_at", ["first", "all"])
@pytest.mark.parametrize("visible_keys", ["all", "computed"])
def test_positions_that_all_layers_read_stay(visible_keys, select_at, monkeypatch):
    """They are not there before the first layer asks for them."""
    moved, leave = [], offload._Storage.leave
    read, made = PackedBatch.positions.fget, {}

    def listen(storage, *arguments):
        moved.append(storage._here.data_ptr())
        return leave(storage, *arguments)

    def positions(batch):
        found = read(batch)
        made[found.data_ptr()] = found
        return found

    monkeypatch.setattr(offload._Storage, "leave", listen)
    monkeypatch.setattr(PackedBatch, "positions", property(positions))
    settings = {"keep": 0.5, "visible_keys": visible_keys, "scorer": "random", "block_size": 8}
    settings |= {"select_at": select_at, "dense_layers": []}
    model = lora(make_model("llama"))
    moving = {"offload": 1.0, "host_memory": 0.25, "recompute": "none"}
    lemo.enable(model, config_of(**settings, **moving))
    model(**BATCHES["packed"]()).loss.backward()
    assert moved
    assert made
    assert not {*moved} & {*made}


def test_a_buffer_elsewhere_does_not_keep_activations_on_the_device():
    """As one on the CPU in a layer on a GPU."""
    taken = []
    for device in ("cpu", "meta"):
        model = lora(make_model("llama"))
        for layer in architecture_of(model).decoder.layers:
            layer.register_buffer("note", torch.zeros(1, device=device))
        handle = lemo.enable(model, config_of(offload=1.0, host_memory=0.25, recompute="none"))
        loss = model(**BATCHES["right"]()).loss
        taken.append(handle.path.forward.offload.pool.taken)
        loss.backward()
    assert taken[1] == taken[0] > 0


def test_a_tensor_that_is_changed_after_it_was_saved_is_found():
    def layer(x):
        y = x * x
        y.add_(0)  # of y nothing is saved
        z = y.exp()
        z.mul_(2)  # of exp the result is
        return z

    x = torch.randn(64, 64, requires_grad=True)
    module = torch.nn.Linear(1, 1)
    for share in (1.0, 0.5, 0.0):
        moved = offload.Offload(MIB).begin([share, 1.0], x.device)
        with moved.layer(0, module):
            z = layer(x)
        moved.finish()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


def test_views_of_one_storage_move_once():
    module = torch.nn.Linear(1, 1)
    made = offload.Offload(MIB)
    x = torch.randn(64, 192, requires_grad=True)

    def compute():
        a, b, c = (x * 2).split(64, dim=1)
        return (a * b * c).sum() + (a.t() @ b).sum()

    expected = torch.autograd.grad(compute(), x)[0]
    moved = made.begin([1.0], x.device)
    with moved.layer(0, module):
        loss = compute()
    moved.finish()
    # x * 2, and the product of two parts.
    assert made.pool.taken == 4 * 64 * 192 + 4 * 64 * 64
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_a_pool(monkeypatch):
    monkeypatch.setattr(host_pool, "_SEGMENT", 8192)
    monkeypatch.setattr(host_pool, "HOST_ALIGNMENT", 4096)
    pool = HostPool(5 * 4096 + 1, pinned=False)
    assert pool.capacity == 5 * 4096
    first, second = pool.take(5000), pool.take(4096)
    assert first.runs == ((0, 8192),)
    assert [len(piece) for piece in first.pieces] == [5000]
    assert pool.take(8193) is None
    pool.free(first)
    third = pool.take(3 * 4096 + 7)
    assert third.runs == ((0, 8192), (12288, 20480))
    # Not beyond what is pinned at once.
    assert [len(piece) for piece in third.pieces] == [8192, 4096, 7]
    assert (pool.taken, pool.most) == (pool.capacity, pool.capacity)
    for piece, value in zip((*third.pieces, *second.pieces), range(4)):
        piece.fill_(value)
    assert [piece.unique().tolist() for piece in third.pieces] == [[0], [1], [2]]
    pool.free(third)
    pool.free(second)
    pool.pin()  # nothing, where no GPU copies
    assert pool.pinned_bytes == 0
    assert pool.take(pool.capacity).runs == ((0, pool.capacity),)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(pool)


class Cycle:
    """Garbage, as the graph of a pass that an exception ended, which has a part of a pool."""

    def __init__(self, pool, slot):
        self.pool, self.slot, self.itself = pool, slot, self

    def __del__(self):
        self.pool.free(self.slot)


def test_parts_of_a_pool_that_the_garbage_collector_frees_meanwhile():
    size, count = host_pool.HOST_ALIGNMENT, 64
    thresholds = gc.get_threshold()
    gc.disable()
    try:
        for later in range(20):
            pool = HostPool(count * size, pinned=False)
            slots = [pool.take(size) for _ in range(count)]
            for slot in slots[::4]:
                pool.free(slot)
            assert pool.taken == 48 * size
            freed = slots[2]
            for place in (5, 31):
                Cycle(pool, slots[place])
            held = {
                run
                for place in range(count)
                if place % 4 and place not in (2, 5, 31)
                for run in slots[place].runs
            }
            del slots, slot
            pairs = [(place, place) for place in range(3000)]  # no tuple is used again
            # It comes so many objects later.
            gc.set_threshold(gc.get_count()[0] + 1 + later)
            gc.enable()
            pool.free(freed)
            assert pool.taken >= 0
            gc.disable()
            gc.collect()
            assert pool.taken == 45 * size, later
            for _ in range(19):
                (run,) = pool.take(size).runs
                assert run not in held, later
                held.add(run)
            assert pool.take(size) is None
            del pairs
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()


def test_a_loss_without_gradients_comes_first():
    """Tensors that are made in inference mode may not be written to outside of it."""
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    handle = lemo.enable(model, config_of(offload=1.0, host_memory=0.1, keep=1.0))
    with torch.inference_mode():
        handle.loss(**batch)
    assert handle.path.forward.offload.pool is None, "nothing is saved"
    loss = model(**batch).loss
    assert handle.path.forward.offload.pool.taken
    loss.backward()


def test_a_copied_model_has_a_pool_of_its_own():
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    handle = lemo.enable(model, config_of(offload=1.0, host_memory=0.1, keep=1.0))
    loss = model(**batch).loss
    copied = copy.deepcopy(model)
    copied(**batch).loss.backward()
    loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradients(copied)[name], gradient)
    assert handle.path.forward.offload.pool.taken == 0


@pytest.mark.gpu_only
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_slow_copies_change_no_bits(recompute, monkeypatch):
    """Copies that come long after what they read was computed, and end long after they began."""
    model, batch = lora(make_model("llama")), BATCHES["right"]()
    settings = {"keep": 1.0, "recompute": recompute}
    expected = steps(model, batch, count=3, **settings)
    copy_all = offload._Streams._copy

    def slowly(streams, copies, stream):
        def delayed():
            for pair in copies:
                torch.cuda._sleep(2_000_000)
                yield pair
                torch.cuda._sleep(2_000_000)

        return copy_all(streams, delayed(), stream)

    monkeypatch.setattr(offload._Streams, "_copy", slowly)
    for share in (1.0, 0.5):
        result = steps(model, batch, count=3, offload=share, host_memory=0.25, **settings)
        assert_equal(result, expected)


@pytest.mark.gpu_only
def test_the_host_does_not_wait_once_pages_are_pinned():
    made, module = offload.Offload(MIB * 64), torch.nn.Linear(1, 1)
    made.pin(torch.device("cuda"))
    x = torch.randn(512, 512, requires_grad=True)

    def step():
        moved, y = made.begin([1.0, 0.5, 1.0], x.device), x
        for index in range(3):
            with moved.layer(index, module):
                y = (y * x).tanh() * y
        moved.finish()
        y.sum().backward()

    step()
    with no_synchronisation():
        step()
    assert made.pool.taken == 0
    assert made.pool.pinned_bytes == made.pool.capacity
    assert made.pool._memory.is_pinned()
