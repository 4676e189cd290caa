"""How lemo's CUDA ops are timed on one GPU, and what a figure looks like."""

import statistics
from collections.abc import Callable

import torch

TOKENS, HIDDEN, BLOCK = 65536, 4096, 64
WARMUP, CALLS = 3, 10


def median_ms(
    *functions: Callable[[], object], repeats: int = 20, calls: int = CALLS
) -> list[dict]:
    """Milliseconds of one call of each function, taking turns: `{"median", "range"}`.

    A measurement is `calls` calls in a row, so that the GPU never waits for the host. Each round
    begins with another function: how hot one leaves the GPU is the next one's clock.
    """
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(WARMUP + repeats):
        for index in range(len(functions)):
            index = (index + repeat) % len(functions)
            function, taken = functions[index], times[index]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            if repeat >= WARMUP:
                taken.append(start.elapsed_time(end) / calls)
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


def record(bench: str, shape: dict, ours: dict, peer_name: str, peer: dict) -> dict:
    """A figure in milliseconds beside a peer's; `ours` and `peer` come from `median_ms`."""
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
    """The bandwidth of an op that moves `moved` bytes, as a share of the device copy's."""
    rates = [moved / ms * 1e3 for ms in (ours["median"], *reversed(ours["range"]))]
    return {
        "bench": bench,
        "shape": shape,
        "ours": round(rates[0] / 1e12, 3),
        "range": [round(rate / 1e12, 3) for rate in rates[1:]],
        "peer": "device copy",
        "peer_value": round(bandwidth / 1e12, 3),
        "ratio": round(rates[0] / bandwidth, 4),
        "unit": "TB/s",
    }
