"""Products of a frozen linear layer in 8 bits (e4m3), forward and for the gradient of its input.

Rows of inputs and of gradients have a scale each, the weight one for each output (FP8 formats:
arXiv 2209.05433). One copy of the weight serves both directions: for the gradient of the input,
which sums over outputs, their scales are multiplied into the columns of the result's gradient
before that is rounded. Sums are in fp32.

Adapters would learn to mend the rounding of the weights, were it the same in each step. It changes
from step to step (`Fp8Linear.begin_step`).

Tensor cores read both factors along the dimension that is summed over, so the gradient's product
needs the copy transposed; that is made anew each time, in a small share of the product's time.
"""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lemo import ops
from lemo.models.calls.interception import kind_of
from lemo.models.projections.adapters import Adapted, adapted
from lemo.models.projections.torchao_weights import is_torchao_float8
from lemo.models.projections.weights import is_plain, once

__all__ = [
    "LIMIT",
    "Fp8Linear",
    "bytes_to_come",
    "check_gpu",
    "drop",
    "fp8_of",
    "obstacle",
    "setting_of",
    "share",
    "shared_rows",
    "why_unquantised",
]

LIMIT = (1 + 2**-4) ** 2 - 1
"""The largest relative error of a product without cancellation: e4m3 rounds each factor by 2^-4 of
itself at most. Where a product errs by more, numbers are lost below e4m3's range, or terms cancel;
the layer's products are then left as they are."""

# Steps after which a weight is rounded anew; layers take turns.
_PERIOD = 8
# Multiples of the golden ratio are spread evenly over [0, 1), however many there are.
_GOLDEN = (5**0.5 - 1) / 2
# Numbers of a weight that are in fp32 at a time while it is rounded anew.
_AT_ONCE = 2**24

# Rows on which the error is measured.
_SAMPLE = 256
# Sizes that tensor cores take.
_MULTIPLE = 16
_LEAST_CAPABILITY = (8, 9)
_ATTRIBUTE = "_lemo_fp8"

_log = logging.getLogger("lemo")

# What `shared_rows` keeps: rows, and what they are in e4m3.
_shared: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
_depth = 0


def setting_of(fast: bool) -> str:
    """What `products` was set to."""
    return "fp8_fast" if fast else "fp8"


def check_gpu(device: torch.device, fast: bool = False) -> None:
    """Refuses a GPU without tensor cores for e4m3.

    Raises:
        NotImplementedError: it has none.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise NotImplementedError(
            f"products: '{setting_of(fast)}' needs a GPU of compute capability 8.9 or higher (Ada, "
            f"Hopper), got {torch.cuda.get_device_name(device)} of {capability[0]}.{capability[1]}"
        )


class Fp8Linear:
    """The products of one frozen layer.

    At the first product of each direction the error is measured on some of its rows; it stays in
    the model's dtype from then on where that is too large.

    Attributes:
        name: of the module, for messages.
        paused: whether products are computed as without this.
        reasons: why products stay as they are, by direction, "forward" or "backward".
    """

    def __init__(
        self, module: nn.Module, name: str, fast: bool = False, place: int = 0, step: int = 0
    ) -> None:
        """Puts itself on the module, until `remove`.

        Args:
            module: the layer.
            name: of it, for messages.
            fast: as of `lemo.ops.fp8_product`.
            place: its turn among the steps in which weights are rounded anew.
            step: the optimizer step that runs, from 0.
        """
        self.name, self.paused, self._fast = name, False, fast
        self._place, self._turn = place, (step + place) // _PERIOD
        self.reasons: dict[str, str] = {}
        self._module = module
        self._measured: set[str] = set()
        self._weight: tuple[Tensor, Tensor] | None = None
        self._made_of: tuple[object, ...] = ()
        self._around: weakref.ref[nn.Module] | None = None
        vars(module)[_ATTRIBUTE] = self

    def remove(self) -> None:
        """Takes it off the module."""
        vars(self._module).pop(_ATTRIBUTE, None)

    def drop(self) -> None:
        """Frees the weight in 8 bits; the next product makes it anew."""
        self._weight = None

    def follow_training(self) -> None:
        """Frees the weight in 8 bits of a layer that is trained now.

        Many optimizers write through `weight.data`, or by kernels of their own, which is no change
        that a tensor counts. The layer may be frozen again.
        """
        weight: Any = self._module.weight
        if weight.requires_grad:
            self.drop()

    def begin_step(self, step: int) -> None:
        """Tells that optimizer step `step`, from 0, begins: some weights are rounded anew.

        They are on another grid then, whose scales are up to twice as large. So a weight's error is
        another one, and in the mean over steps small. The copy is written in place.
        """
        turn = (step + self._place) // _PERIOD
        if turn != self._turn:
            self._turn = turn
            if self._weight is not None and self._made_of == self._identity():
                weight: Any = self._module.weight
                values, scales = self._weight
                scales.copy_(ops.fp8_rows(weight.detach())[1])
                self._round(values, scales)

    def put_inside(self, around: nn.Module) -> None:
        """Says which module computes with the layer: a LoRA layer, or the layer itself.

        PEFT merges adapters into `weight.data`, which changes neither its address nor its version;
        the module around is another one then, once they are unloaded.
        """
        if self._around is None or self._around() is not around:
            self.drop()
            self._around = weakref.ref(around)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model makes its own.
        return vars(self) | {"_weight": None, "_made_of": (), "_around": None}

    def unfit(self) -> str | None:
        """Why the layer as it is now has no products in 8 bits; None: it has."""
        module: Any = self._module
        if any(size % _MULTIPLE for size in (module.in_features, module.out_features)):
            return (
                f"its sizes {module.in_features} and {module.out_features} are not both multiples "
                f"of {_MULTIPLE}"
            )
        if not (is_plain(module) or is_torchao_float8(module)):
            return "its weight is no plain matrix, or it has hooks"
        if not is_plain(module) and module.weight.scale.numel() != module.out_features:
            return "its weight is float8 of torchao without a scale for each output"
        return "its weight is trained" if module.weight.requires_grad else None

    def forward(
        self, x: Tensor, cast: Tensor, matrix: Callable[[], Tensor], bias: Tensor | None
    ) -> Tensor | None:
        """The layer's product, [R, out]; None: it stays in the model's dtype.

        Args:
            x: [R, in], by which rows are known again (`shared_rows`).
            cast: the same in the dtype of the result.
            matrix: gives the weight [out, in] in that dtype.
            bias: [out] of it.
        """
        if not self._takes("forward", cast):
            return None
        weight = self.weight()
        if "forward" not in self._measured:
            rows = _sample(cast)
            y = ops.fp8_product(ops.fp8_rows(rows), weight, cast.dtype, fast=self._fast)
            if not self._fits("forward", y, linear(rows, matrix())):
                return None
        return ops.fp8_product(_quantised(x, cast), weight, cast.dtype, bias, self._fast)

    def input_gradient(self, dy: Tensor, matrix: Callable[[], Tensor]) -> Tensor | None:
        """The gradient of the input, [R, in]; None: it stays in the model's dtype.

        Args:
            dy: [R, out].
            matrix: gives the weight.
        """
        if not self._takes("backward", dy):
            return None
        values, scales = self.weight()
        transposed = once(self, values.dtype, lambda dtype: ops.fp8_transpose(values))
        weight, factors = (transposed, scales.new_ones(transposed.shape[0], 1)), scales.flatten()
        if "backward" not in self._measured:
            rows = _sample(dy)
            dx = ops.fp8_product(ops.fp8_rows(rows, factors), weight, dy.dtype, fast=self._fast)
            if not self._fits("backward", dx, rows @ matrix()):
                return None
        return ops.fp8_product(ops.fp8_rows(dy, factors), weight, dy.dtype, fast=self._fast)

    def weight(self) -> tuple[Tensor, Tensor]:
        """Values [out, in] in e4m3 and scales [out, 1], made again where the weight has changed.

        Writes through `weight.data` are not seen here: asking for them would wait for the GPU.

        Raises:
            ValueError: the weight has inf or nan.
            NotImplementedError: see `check_gpu`.
        """
        weight: Any = self._module.weight
        if is_torchao_float8(self._module):
            return weight.qdata, weight.scale.float().view(-1, 1)
        identity = self._identity()
        if self._weight is None or self._made_of != identity:
            check_gpu(weight.device, self._fast)
            if not bool(weight.detach().isfinite().all()):
                raise ValueError(
                    f"products: expected finite weights for '{setting_of(self._fast)}', got inf or "
                    f"nan in {self.name}"
                )
            # Later steps write to it, outside of inference mode.
            with torch.inference_mode(False):
                self._weight = ops.fp8_rows(weight.detach())
                self._round(*self._weight)
            self._made_of = identity
        return self._weight

    def _identity(self) -> tuple[object, ...]:
        """What is another one where the weight has changed."""
        weight: Any = self._module.weight
        return weight.device, weight.data_ptr(), weight._version

    def _round(self, values: Tensor, scales: Tensor) -> None:
        """Rounds the weight into values, with the scales of this turn.

        Args:
            values: [out, in] in e4m3.
            scales: [out, 1], the least there can be.
        """
        weight: Any = self._module.weight
        scales.mul_(2 ** (self._turn * _GOLDEN % 1))
        rows = max(1, _AT_ONCE // weight.shape[1])
        parts = (x.split(rows) for x in (weight.detach(), scales, values))
        for matrix, scale, rounded in zip(*parts, strict=True):
            rounded.copy_(matrix / scale)

    def bytes_to_come(self) -> int:
        """Bytes of the weight in 8 bits, if it is still to be made."""
        kept = self._weight is not None or is_torchao_float8(self._module)
        weight: Any = self._module.weight
        return 0 if kept or self.unfit() is not None else weight.numel() + 4 * weight.shape[0]

    def reads_rows(self) -> bool:
        """Whether the next product is in 8 bits, as far as is known."""
        return "forward" not in self.reasons

    def _takes(self, direction: str, rows: Tensor) -> bool:
        return not self.paused and direction not in self.reasons and rows.shape[0] > 0

    def _fits(self, direction: str, found: Tensor, expected: Tensor) -> bool:
        """Whether the error is one that e4m3 allows; decides it for good."""
        norm = expected.float().norm()
        error, size = torch.stack([(found.float() - expected.float()).norm(), norm]).tolist()
        if not 0 < size < float("inf"):
            return True  # nothing to tell by: next time
        self._measured.add(direction)
        if error <= LIMIT * size:
            return True
        self.reasons[direction] = (
            f"its {direction} product errs by {error / size:.2g} of itself, more than the "
            f"{LIMIT:.2g} that rounding its factors to 8 bits explains"
        )
        _log.warning("products: %s stays in the model's dtype: %s", self.name, self.reasons)
        return False


def bytes_to_come(model: nn.Module) -> int:
    """Bytes of weights in 8 bits that the first pass will make."""
    total, around = 0, dict[nn.Module, nn.Module]()
    for module in model.modules():  # those around a layer come before it
        base = module._modules.get("base_layer")
        if base is not None:
            around[base] = module
        found: Fp8Linear | None = vars(module).get(_ATTRIBUTE)
        if found is not None:
            outer = around.get(module, module)
            total += found.bytes_to_come() if obstacle(outer, adapted(outer)) is None else 0
    return total


def fp8_of(module: nn.Module, around: nn.Module | None = None) -> Fp8Linear | None:
    """What computes a layer's products in 8 bits; None: nothing does.

    Args:
        module: the layer, without adapters.
        around: what computes with it now (`Fp8Linear.put_inside`); None: it is only asked.
    """
    found: Fp8Linear | None = vars(module).get(_ATTRIBUTE)
    if found is None or found.paused or found.unfit() is not None:
        return None
    if around is not None:
        found.put_inside(around)
    return found


def drop(module: nn.Module) -> None:
    """Frees a layer's weight in 8 bits, if there is one: it is about to be another one."""
    found: Fp8Linear | None = vars(module).get(_ATTRIBUTE)
    if found is not None:
        found.drop()


def obstacle(module: nn.Module, layer: Adapted | str) -> str | None:
    """Why what is around a linear layer leaves no product to 8 bits; None: nothing is in the way.

    Args:
        module: the layer, plain or with adapters.
        layer: what `adapted` says of it.
    """
    if isinstance(layer, str):
        return layer
    if getattr(module, "merged", False):
        return "merged adapters"
    if layer.pairs and layer.pairs[0].magnitude is not None:
        return "DoRA"
    return None


def why_unquantised(module: nn.Module) -> str | None:
    """Why products of a linear layer, plain or with adapters, stay in the model's dtype.

    None: none does, as far as is known.
    """
    layer = adapted(module)
    reason = obstacle(module, layer)
    if reason is not None or isinstance(layer, str):
        return reason
    found: Fp8Linear | None = vars(layer.base).get(_ATTRIBUTE)
    if found is None:
        return f"{kind_of(layer.base)} that is no linear layer, or came after enable"
    return found.unfit() or "; ".join(found.reasons.values()) or None


@contextmanager
def shared_rows() -> Iterator[None]:
    """Rows that several layers read inside are rounded once."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _shared.clear()


def share(x: Tensor, rows: tuple[Tensor, Tensor]) -> None:
    """Names what x is in e4m3, for layers that read it inside the same `shared_rows`."""
    if _depth:
        _shared[:] = [(x, rows)]


def _quantised(x: Tensor, cast: Tensor) -> tuple[Tensor, Tensor]:
    for rows, quantised in _shared:
        if rows is x:
            return quantised
    quantised = ops.fp8_rows(cast)
    share(x, quantised)
    return quantised


def _sample(rows: Tensor) -> Tensor:
    step = max(1, rows.shape[0] // _SAMPLE)
    return rows[::step][:_SAMPLE].contiguous()
