"""A stand-in for CUDA graphs on the CPU.

It computes the captured function anew at every replay, from the tensors that a graph would read,
and lets no operator pass that a capture refuses.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lemo.models import one_set_passes
from lemo.models.layers import captured_graph, cuda_graphs

# Operators whose result, or its shape, the host has to know.
WAITS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount"),
    *("repeat_interleave.Tensor", "token_select"),
)


class WaitsError(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Refuses operators that make the host wait, copies between devices, and random numbers of
    other generators than torch's own."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, kwargs = op.name(), kwargs or {}
        masks = [x for x in args[1:2] if name.startswith("aten::index") and isinstance(x, list)]
        if any(name.partition("::")[2].startswith(waits) for waits in WAITS):
            raise WaitsError(name)
        if any(x is not None and x.dtype == torch.bool for mask in masks for x in mask):
            raise WaitsError(f"{name} of a mask")
        if kwargs.get("generator") is not None:
            raise WaitsError(f"{name} with a generator")
        return op(*args, **kwargs)


class OnCpu:
    """Stands in for a graph."""

    bytes, draws, loaded, last_call = 0, False, None, 0

    def __init__(self, function, inputs, parameters, module, place, check_room=None):
        self._function, self._parameters, self._module = function, parameters, module
        self._inputs = [None if x is None else x.detach().clone() for x in inputs]
        for x, given in zip(self._inputs, inputs):
            if x is not None:
                x.requires_grad_(given.requires_grad)

    @torch.no_grad()
    def load(self, inputs):
        for to, x in zip(self._inputs, inputs):
            if to is not None:
                to.copy_(x)

    def _computed(self):
        """The loss, and what takes the place of parameters."""
        first, *others = self._inputs
        aliased = captured_graph._aliased(self._module, self._parameters)
        with torch.enable_grad(), NoWaiting(), aliased as wanted:
            with torch.autocast("cpu", dtype=self._dtype, enabled=self._autocast):
                loss = self._function([first.clone(), *others])
            yield loss, wanted

    def forward(self):
        self._random = torch.get_rng_state()
        # Backward computes it again, outside of autocast.
        self._dtype = torch.get_autocast_dtype("cpu")
        self._autocast = torch.is_autocast_enabled("cpu")
        return next(self._computed())[0].detach().clone()

    def backward(self, dloss):
        leaves = [x for x in self._inputs if x is not None and x.requires_grad]
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            for loss, wanted in self._computed():
                return torch.autograd.grad(loss, [*leaves, *wanted], dloss, allow_unused=True)


class Place:
    def is_current(self):
        return True


def take_the_place_of_graphs(monkeypatch):
    """Passes are captured on the CPU, by the stand-in."""
    monkeypatch.setattr(one_set_passes, "supports_graphs", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "Graph", OnCpu)
    monkeypatch.setattr(cuda_graphs, "Place", Place)
