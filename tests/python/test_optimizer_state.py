"""The state of an optimizer in few tensors of a file comes back as it was, bit for bit."""

import io

import pytest
import torch

from lemo.training import checkpoint
from lemo.training.behind import Copy, HostMemory
from lemo.training.optimizer_state import packed, unpacked

pytestmark = pytest.mark.cpu_only

SHAPES = [(4, 3), (3, 4), (5,), (4, 3)]


def stepped(shapes=SHAPES, skipped=(), dtypes=(torch.float32,)):
    """An optimizer after three steps, in which some parameters had no gradient."""
    torch.manual_seed(0)
    kinds = [dtypes[i % len(dtypes)] for i in range(len(shapes))]
    parameters = [torch.nn.Parameter(torch.randn(s).to(d)) for s, d in zip(shapes, kinds)]
    groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(3):
        for number, parameter in enumerate(parameters):
            if number not in skipped:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return 1
    items = value.values() if isinstance(value, dict) else value
    return sum(map(tensors_in, items)) if isinstance(value, dict | list) else 0


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
    else:
        assert one == other


def through_a_file(state):
    file = io.BytesIO(checkpoint._to_bytes(Copy(packed(state), HostMemory()).value()))
    return unpacked(torch.load(file, weights_only=True))


@pytest.mark.parametrize("skipped", [(), (1,), range(4)])
def test_what_was_packed_comes_back(skipped):
    state = stepped(skipped=skipped).state_dict()
    assert len(state["state"]) == 4 - len(skipped)
    assert_same(through_a_file(state), state)


def test_tensors_of_a_name_are_one():
    states = (packed(stepped([(4, 3)] * count).state_dict()) for count in (2, 50))
    small, large = (Copy(state, HostMemory()).value() for state in states)
    assert tensors_in(small) == tensors_in(large)


def test_what_differs_between_parameters_stays_as_it_is():
    mixed = stepped(dtypes=(torch.float32, torch.bfloat16)).state_dict()
    assert_same(through_a_file(mixed), mixed)
    uneven = stepped().state_dict()
    del uneven["state"][2]["exp_avg"]
    assert_same(through_a_file(uneven), uneven)


def test_files_of_older_versions_are_read():
    state = stepped().state_dict()
    assert unpacked(state) is state


def test_a_step_from_what_came_back_is_the_same():
    one, other = stepped(), stepped()
    other.load_state_dict(through_a_file(other.state_dict()))
    for optimizer in (one, other):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    pairs = zip(one.param_groups, other.param_groups)
    assert all(
        torch.equal(x, y) for a, b in pairs for x, y in zip(a["params"], b["params"], strict=True)
    )
