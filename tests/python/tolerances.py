"""The one place that says how close is close enough."""

import torch
from torch import Tensor

FP32_RELATIVE_ERROR = 2e-5


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """||value - oracle|| / ||oracle|| in fp64; infinite where special values differ."""
    value, oracle = value.detach().double(), oracle.detach().double()
    assert value.shape == oracle.shape, f"shape {tuple(value.shape)}, oracle {tuple(oracle.shape)}"
    special = ~torch.isfinite(oracle)
    same = torch.equal(special, ~torch.isfinite(value)) and torch.equal(
        value[special].nan_to_num(nan=1.5), oracle[special].nan_to_num(nan=1.5)
    )
    if not same:
        return float("inf")
    value, oracle = value[~special], oracle[~special]
    norm = oracle.norm().item()
    return (value - oracle).norm().item() / (norm if norm > 0 else 1.0)


def assert_close_fp32(value: Tensor, oracle: Tensor, what: str = "result") -> None:
    """An fp32 result against an oracle computed in fp32 or fp64."""
    error = relative_error(value, oracle)
    assert error <= FP32_RELATIVE_ERROR, f"{what}: relative error {error:.2e}"


def assert_same_sums(value: Tensor, oracle: Tensor, what: str = "result") -> None:
    """Sums of the same terms in fp32 in another order, each rounded once to the dtype."""
    assert value.dtype == oracle.dtype
    if oracle.dtype == torch.float32:
        assert_close_fp32(value, oracle, what)
        return
    sizes = oracle.detach().double().abs()
    # Other last bits of a sum may be another number of the dtype.
    allowed = torch.finfo(oracle.dtype).eps * sizes + FP32_RELATIVE_ERROR * sizes.max()
    error = (value.detach().double() - oracle.detach().double()).abs()
    assert bool((error <= allowed).all()), f"{what}: error {error.max().item():.2e}"


def assert_close_low_precision(
    value: Tensor, plain: Tensor, oracle: Tensor, what: str = "result"
) -> None:
    """A bf16 or fp16 result errs at most twice as much as plain PyTorch in the same dtype.

    Args:
        value: lemo's result.
        plain: the same mathematics in plain PyTorch, inputs and arithmetic in the low precision.
        oracle: the fp32 result on the same (rounded) inputs.
    """
    error, plain_error = relative_error(value, oracle), relative_error(plain, oracle)
    rounding = torch.finfo(value.dtype).eps / 2  # a perfect result still rounds once
    assert error <= max(2 * plain_error, rounding), (
        f"{what}: relative error {error:.2e}, plain {value.dtype} {plain_error:.2e}"
    )
