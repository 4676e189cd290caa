"""Saved activations on the host: layers that share a tensor, and backward before forward ends."""

import pytest
import torch

from lemo.models.memory import host_pool, offload

pytestmark = pytest.mark.cpu_only

SIZE = 4 * 64 * 64


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", SIZE)
    monkeypatch.setattr(host_pool, "HOST_ALIGNMENT", 64)


@pytest.fixture
def made():
    return offload.Offload(2**20)


@pytest.fixture
def x():
    return torch.randn(64, 64, requires_grad=True)


MODULE = torch.nn.Linear(1, 1)


def test_a_tensor_that_two_layers_save_moves_once(made, x):
    moved = made.begin([1.0, 1.0], x.device)
    with moved.layer(0, MODULE):
        y = x.exp()  # of which the result is saved
    with moved.layer(1, MODULE):
        z = y * y
    del y
    moved.finish()
    assert made.pool.taken == SIZE
    found = torch.autograd.grad(z.sum(), x)[0]
    assert torch.allclose(found, 2 * (2 * x).exp())
    del z
    assert made.pool.taken == 0


def test_smaller_tensors_stay(made, x):
    moved = made.begin([1.0], x.device)
    with moved.layer(0, MODULE):
        y = x[1:].clone().exp()
    moved.finish()
    assert made.pool.taken == 0
    y.sum().backward()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_backward_inside_of_the_forward_pass(share, made, x, monkeypatch):
    """Of the layer itself, before it has moved, and of the one before, while it moves."""
    monkeypatch.setattr(offload, "SMALLEST", 256)

    def gradient(y):
        return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]

    moved = made.begin([share] * 3, x.device)
    with moved.layer(0, MODULE):
        y = x.exp()
        assert torch.allclose(gradient(y), x.exp())
    with moved.layer(1, MODULE):
        assert torch.allclose(gradient(y), x.exp())
        z = y.sin()
    with moved.layer(2, MODULE):
        w = z * z
    moved.finish()
    for _ in range(2):
        assert torch.allclose(gradient(y), x.exp())
        expected = 2 * x.exp().sin() * x.exp().cos() * x.exp()
        assert torch.allclose(gradient(w), expected, rtol=1e-4, atol=1e-5)
    del y, z, w
    assert made.pool.taken == 0
