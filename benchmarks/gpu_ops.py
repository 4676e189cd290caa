"""Check and time lemo's CUDA ops on one GPU against what PyTorch offers.

    python benchmarks/gpu_ops.py --output h200_ops.jsonl [--commit HASH]

Every op is compared with the fp32 oracle first; a wrong result ends the run. Times are medians of
CUDA-event measurements, ours and the peer's in turn, on data several times the L2 cache. Bandwidth
is a share of the device copy measured in the same run. One JSON line a figure is appended.
"""

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from lemo import ops, reference

TOKENS, HIDDEN, BLOCK = 65536, 4096, 64
WARMUP, CALLS = 3, 10


def median_ms(*functions: Callable[[], object], repeats: int = 20) -> list[dict]:
    """Milliseconds of one call of each function, taking turns: `{"median", "range"}`.

    A measurement is several calls in a row, so that the GPU never waits for the host.
    """
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(WARMUP + repeats):
        for function, taken in zip(functions, times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                function()
            end.record()
            end.synchronize()
            if repeat >= WARMUP:
                taken.append(start.elapsed_time(end) / CALLS)
    return [
        {"median": statistics.median(t), "range": [round(min(t), 4), round(max(t), 4)]}
        for t in times
    ]


def half_of_the_blocks(tokens: int) -> torch.Tensor:
    """Rows of a random half of the blocks, ascending."""
    blocks = torch.randperm(tokens // BLOCK, device="cuda")[: tokens // BLOCK // 2].sort().values
    return (blocks[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten().int()


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 2 GiB."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    (copy,) = median_ms(lambda: target.copy_(source))
    return 2 * source.numel() * 4 / copy["median"] * 1e3


def check_residual_scatter() -> None:
    for dtype, addend_dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ):
        for hidden in (4096, 384, 7):
            rows = half_of_the_blocks(4096)[:-3]
            x = torch.randn(4096, hidden, device="cuda", dtype=dtype)
            y = torch.randn(len(rows), hidden, device="cuda", dtype=addend_dtype)
            oracle = reference.residual_scatter(x.float(), y.float(), rows).to(dtype)
            result = ops.residual_scatter_(x.clone(), y, rows)
            assert torch.equal(result, oracle), f"residual_scatter {dtype} {hidden}"
            gathered = torch.ops.lemo.residual_scatter_backward(x, rows)
            assert torch.equal(gathered, x[rows.long()]), f"gather {dtype} {hidden}"
            everything = torch.randn_like(x)
            result = ops.residual_scatter_(x.clone(), everything)
            oracle = (x.float() + everything.float()).to(dtype)
            assert torch.equal(result, oracle), f"residual_scatter of every row {dtype} {hidden}"
    rows = half_of_the_blocks(4096)
    x, y = torch.randn(4096, 4096, device="cuda"), torch.randn(2048, 4096, device="cuda")
    first = ops.residual_scatter_(x.clone(), y, rows)
    assert all(torch.equal(first, ops.residual_scatter_(x.clone(), y, rows)) for _ in range(100))


def bench_residual_scatter(bandwidth: float) -> list[dict]:
    rows = half_of_the_blocks(TOKENS)
    index = rows.long()
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(len(rows), HIDDEN, device="cuda", dtype=torch.bfloat16)
    dy = torch.empty_like(y)
    scatter, index_add = median_ms(
        lambda: torch.ops.lemo.residual_scatter(x, y, rows), lambda: x.index_add_(0, index, y)
    )
    gather, index_select = median_ms(
        lambda: torch.ops.lemo.residual_scatter_backward(x, rows),
        lambda: torch.index_select(x, 0, index, out=dy),
    )
    shape = {"tokens": TOKENS, "rows": len(rows), "hidden": HIDDEN, "dtype": "bfloat16"}
    row_bytes = len(rows) * HIDDEN * 2
    return [
        record("residual_scatter", shape, scatter, "torch index_add_", index_add),
        share("residual_scatter bandwidth", shape, 3 * row_bytes, scatter, bandwidth),
        record("residual_scatter_backward", shape, gather, "torch index_select", index_select),
        share("residual_scatter_backward bandwidth", shape, 2 * row_bytes, gather, bandwidth),
    ]


def check_select_norm() -> None:
    for kind in ("rms", "layer"):
        for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
            for hidden in (4096, 384, 7):
                rows = half_of_the_blocks(4096)[:-3]
                x = torch.randn(4096, hidden, device="cuda", dtype=dtype, requires_grad=True)
                weight = torch.rand(hidden, device="cuda", requires_grad=True)
                bias = torch.randn(hidden, device="cuda", requires_grad=True)
                bias = bias if kind == "layer" else None
                leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
                dy = torch.randn(len(rows), hidden, device="cuda", dtype=dtype)
                oracle = reference.select_norm(x.float(), rows, weight, bias, 1e-5, kind)
                expected = torch.autograd.grad(oracle, leaves, dy.float())
                result = ops.select_norm(x, weight, bias, rows, 1e-5, kind)
                grads = torch.autograd.grad(result, leaves, dy)
                for value, truth in zip((result, *grads), (oracle, *expected)):
                    error = ((value.float() - truth).norm() / truth.norm()).item()
                    assert error <= bound, f"select_norm {kind} {dtype} {hidden}: {error:.1e}"


def bench_select_norm(bandwidth: float) -> list[dict]:
    rows = half_of_the_blocks(TOKENS)
    index = rows.long()
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(HIDDEN, device="cuda", dtype=torch.bfloat16)
    select = torch.ops.lemo.select_norm
    forward, torch_forward = median_ms(
        lambda: select(x, rows, weight, None, 1e-5, "rms", True),
        lambda: torch.nn.functional.rms_norm(x.index_select(0, index), (HIDDEN,), weight, 1e-5),
    )
    _, x_rows, mean, rstd = select(x, rows, weight, None, 1e-5, "rms", True)
    dy, dx = torch.randn_like(x_rows), torch.randn_like(x)
    leaf = x_rows.clone().requires_grad_()
    y = torch.nn.functional.rms_norm(leaf, (HIDDEN,), weight, 1e-5)

    def torch_backward() -> None:
        (grad,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
        dx.index_add_(0, index, grad)

    backward, plain_backward = median_ms(
        lambda: torch.ops.lemo.select_norm_backward(
            dy, x_rows, rows, weight, mean, rstd, "rms", dx, False
        ),
        torch_backward,
    )
    shape = {"tokens": TOKENS, "rows": len(rows), "hidden": HIDDEN, "dtype": "bfloat16"}
    row_bytes = len(rows) * HIDDEN * 2
    return [
        record("select_norm", shape, forward, "torch index_select + rms_norm", torch_forward),
        share("select_norm bandwidth", shape, 3 * row_bytes, forward, bandwidth),
        record("select_norm_backward", shape, backward, "torch + index_add_", plain_backward),
        share("select_norm_backward bandwidth", shape, 4 * row_bytes, backward, bandwidth),
    ]


def record(bench: str, shape: dict, ours: dict, peer_name: str, peer: dict) -> dict:
    return {
        "bench": bench,
        "shape": shape,
        "ours": round(ours["median"], 4),
        "range": ours["range"],
        "peer": peer_name,
        "peer_value": round(peer["median"], 4),
        "peer_range": peer["range"],
        "ratio": round(ours["median"] / peer["median"], 4),
        "unit": "ms",
    }


def share(bench: str, shape: dict, moved: int, ours: dict, bandwidth: float) -> dict:
    achieved = moved / ours["median"] * 1e3
    return {
        "bench": bench,
        "shape": shape,
        "ours": round(achieved / 1e12, 3),
        "peer": "device copy",
        "peer_value": round(bandwidth / 1e12, 3),
        "ratio": round(achieved / bandwidth, 4),
        "unit": "TB/s",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--commit", default="unknown", help="commit of the measured tree")
    options = parser.parse_args()
    torch.manual_seed(0)
    check_residual_scatter()
    check_select_norm()
    print("checks passed", flush=True)
    common = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": options.commit,
        "date": datetime.date.today().isoformat(),
    }
    with options.output.open("a") as lines:
        bandwidth = copy_bandwidth()
        for result in (*bench_residual_scatter(bandwidth), *bench_select_norm(bandwidth)):
            lines.write(json.dumps(result | common) + "\n")
            print(
                f"{result['bench']:<40} {result['ours']:>9} {result['unit']:<5} "
                f"{result['peer']:<20} {result['peer_value']:>9} ratio {result['ratio']}"
            )


if __name__ == "__main__":
    main()
