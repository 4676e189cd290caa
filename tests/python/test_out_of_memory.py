"""Memory that runs out in an operator: one kind of error, of the type that callers look for."""

import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import devices
import lemo
from lemo import LemoConfig, ops
from lemo.models.calls.replaced_forward import ReplacedForward
from lemo.ops.call import call
from limits import address_space
from tiny_models import make_ids, make_model

_ops = torch.ops.lemo
# More elements than any machine has room for, of few bytes: every row is the same one.
HUGE = 2**30, 2**20


def huge(*last):
    return torch.ones((1, 1, *last)).expand(*HUGE, *last)


def no_memory(shape):
    """What is raised where a tensor of fp32 or int32 of this shape does not fit."""
    kind, device = MemoryError, "cpu"
    if devices.on_gpu():
        kind, device = torch.OutOfMemoryError, f"cuda:{torch.cuda.current_device()}"
    wanted = f"{4 * math.prod(shape)} bytes for a tensor {list(shape)} on {device}"
    return pytest.raises(kind, match=re.escape(f"cannot allocate {wanted}"))


def test_a_result_that_does_not_fit():
    x, rows = torch.ones(1, 2**24), torch.zeros(2**24, dtype=torch.int32)
    with no_memory((2**24, 2**24)):
        ops.residual_gather(x, rows)


def test_a_contiguous_copy_that_does_not_fit():
    with no_memory(HUGE):
        ops.swiglu(huge(), torch.ones(1, 1))


def test_the_next_call_finds_the_memory_there():
    x = torch.randn(4, 6)
    expected = ops.swiglu(x, x)
    with no_memory(HUGE):
        ops.swiglu(huge(), x)
    assert torch.equal(ops.swiglu(x, x), expected)


def rotated():
    x = torch.randn(2**20, 1, 32).requires_grad_()
    return ops.rope(x, *torch.ones(2, 2**20, 32)), x, (2**20, 1, 32)


def attended():
    q = torch.randn(2**16, 1, 256).requires_grad_()
    cuts = torch.arange(2**16 + 1, dtype=torch.int32)
    return ops.segment_attention(q, q, q, cuts), q, (2**16, 1, 256)


def gated():
    gate = torch.randn(2**16, 512).requires_grad_()
    return ops.swiglu(gate, torch.ones(2**16, 512)), gate, (2**16, 512)


@pytest.mark.cpu_only  # a GPU has no limit that can be set so
@pytest.mark.parametrize("forward", [rotated, attended, gated])
def test_backward(forward):
    """The gradient is one number, of which the op makes a copy in every row."""
    out, leaf, shape = forward()
    gradient = torch.ones(1).expand_as(out)
    with address_space(2**25), no_memory(shape):
        out.backward(gradient)
    assert leaf.grad is None


@pytest.fixture
def freed_pieces():
    """Of 16 MiB each, which malloc keeps for later: what lies above them is still in use."""
    torch.empty(2**23 - 2**12)  # freed at once: from here on malloc keeps pieces of such sizes
    pieces = [torch.empty(2**22) for _ in range(17)]
    above = pieces.pop()
    pieces.clear()
    yield
    del above


@pytest.mark.cpu_only
@pytest.mark.usefixtures("freed_pieces")
def test_scratch_of_a_kernel():
    """There is room for the result, and none for the kernel's own row of the same size."""
    x, weight = torch.ones(1, 2**24), torch.ones(2**24)
    with (
        address_space(2**26 + 2**25),
        pytest.raises(MemoryError, match=r"^select_norm: cannot allocate scratch on cpu$"),
    ):
        call(_ops.select_norm, x, None, weight, None, 1e-5, "rms", False)


class HugeArgument(TorchDispatchMode):
    """One operator gets a first argument that no memory holds as a contiguous tensor."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is self.op:
            first, *others = arguments
            arguments = first[:1, :1].expand(*HUGE, *first.shape[2:]), *others
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("path", "recompute", "op", "what"),
    [
        ("native", "none", "swiglu", "lemo: 64 tokens, of which the first layer keeps 32;"),
        ("native", "layer", "swiglu_backward", "lemo: in the backward pass of a layer with"),
        ("generic", "none", "segment_attention", ""),
        ("generic", "none", "segment_attention_backward", ""),
    ],
)
def test_a_step_of_a_model(path, recompute, op, what):
    model = make_model("llama", attn_implementation="sdpa")
    lemo.enable(model, LemoConfig(path=path, recompute=recompute, keep=0.5, block_size=8))
    ids = make_ids(1, 64)
    kind = torch.OutOfMemoryError if devices.on_gpu() else MemoryError
    with (
        HugeArgument(getattr(_ops, op).default),
        pytest.raises(kind, match=rf"cannot allocate \d+ bytes(.|\n)*{what}"),
    ):
        model(input_ids=ids, labels=ids).loss.backward()


def test_layers_that_torch_has_compiled():
    """They call operators without lemo's Python between."""
    module = torch.nn.Module()
    compiled = torch.compile(ops.rope, backend="eager", fullgraph=True)
    tables = torch.ones(1, 2), torch.ones(1, 2)
    with pytest.raises(RuntimeError, match=r"\[lemo:"):
        compiled(huge(2), *tables)
    module.forward = ReplacedForward(module, "handle", lambda *_: compiled(huge(2), *tables))
    with no_memory((*HUGE, 2)):
        module.forward()


@pytest.mark.cpu_only  # a GPU has no limit that can be set so
def test_backward_passes_that_torch_has_compiled():
    """The same message; its type is torch's, which lemo cannot choose there."""
    compiled = torch.compile(
        lambda q, cuts: ops.segment_attention(q, q, q, cuts), backend="aot_eager"
    )
    q = torch.randn(2**16, 1, 256).requires_grad_()
    out = compiled(q, torch.arange(2**16 + 1, dtype=torch.int32))
    gradient = torch.ones_like(out)
    with (
        address_space(2**25),
        pytest.raises(
            RuntimeError, match=r"^\[lemo:memory\] cannot allocate \d+ bytes for a tensor"
        ),
    ):
        out.backward(gradient)
    assert q.grad is None


def failing(message):
    def op():
        raise RuntimeError(f"[lemo:device_memory] {message}")

    return op


def test_a_gpu_without_memory():
    message = "cannot allocate 8 bytes for a tensor [2] on cuda:0: CUDA out of memory. Tried to"
    with pytest.raises(torch.OutOfMemoryError) as raised:
        call(failing(message))
    assert str(raised.value) == message


def test_a_gpu_that_failed_before_says_so(monkeypatch):
    """Older versions of torch do not tell the core why there is no memory."""
    message, asked = "cannot allocate 8 bytes for a tensor [2] on cuda:1", []
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked.append)
    with pytest.raises(torch.OutOfMemoryError, match=r"on cuda:1$"):
        call(failing(message))
    assert asked == ["cuda:1"]

    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    with pytest.raises(RuntimeError, match="an illegal memory access") as raised:
        call(failing(message))
    assert not isinstance(raised.value, torch.OutOfMemoryError)
