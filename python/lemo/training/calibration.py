"""How fast this machine is: short measured runs, stored for each machine, device and shape."""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lemo import _C, ops
from lemo.files import json_text, read_json, updating, write_file
from lemo.planner.shape import ModelShape
from lemo.planner.timing import Rates, operations

__all__ = ["FOLDER", "calibrated", "stored_rates"]

# Not Path.home(), which fails where a user has no home folder, as in many containers.
FOLDER = Path(os.path.expanduser("~"), ".cache", "lemo")
"""Where rates are stored."""

_NAME = "rates.json"
# Rows of the products and of attention, by the kind of the device.
_ROWS = {"cuda": 8192, "cpu": 512}
# Elements that are copied.
_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 24}
# Bytes that are copied to the host and back.
_LINK = {"cuda": 1 << 28, "cpu": 1 << 24}
_REPEATS = 5
# Seconds for which a GPU is kept busy before its time counts, and while it does.
_LOAD = 0.25
# Layers of the two small models whose steps tell the host's time.
_LAYERS = (2, 10)
# One more where rates of the same names are measured in another way: stored ones count no more.
_MANNER = 2

_log = logging.getLogger("lemo")


def stored_rates(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Rates | None:
    """The rates that were measured on this machine for such a model; None: none were.

    Args:
        shape, device, dtype: as for `calibrated`.
    """
    found = _read().get(_key(shape, device, dtype))
    # Those of an earlier version may lack some, and a damaged file may hold anything.
    known = {field.name for field in fields(Rates)}
    if not isinstance(found, dict) or found.keys() != known:
        return None
    return Rates(**found) if all(_is_rate(name, found[name]) for name in known) else None


def calibrated(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, fp8: bool = False
) -> Rates:
    """The rates of this machine for such a model, measured now unless they are stored.

    Args:
        shape: the model, whose products and heads are measured.
        device: where the step runs.
        dtype: of its products.
        fp8: whether those in 8 bits are wanted, too.
    """
    rates = stored_rates(shape, device, dtype)
    if rates is None or (fp8 and not rates.fp8):
        rates = measure(shape, device, dtype) if rates is None else rates
        if fp8:
            rates = replace(rates, fp8=_fp8_products(shape, device, dtype, rates.bytes))
        _store(_key(shape, device, dtype), rates)
    return rates


def measure(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates, from runs of a second or two."""
    bandwidth = _bandwidth(device, dtype)
    with torch.random.fork_rng(devices=[]):
        return Rates(
            _products(shape, device, dtype, bandwidth),
            *_attention(shape, device, dtype),
            bandwidth,
            _launch(device, dtype),
            _link(device),
        )


def _store(key: str, rates: Rates) -> None:
    """Add rates to those that are stored. Where that fails they are measured again next time."""
    try:
        if not FOLDER.is_absolute():
            raise FileNotFoundError("this user has no home folder")
        FOLDER.mkdir(parents=True, exist_ok=True)
        with updating(FOLDER / _NAME):
            content = _read() | {key: asdict(rates)}
            write_file(FOLDER / _NAME, json_text(content, indent=1, sort_keys=True))
    except OSError as error:
        _log.warning("the rates of this machine are not stored in '%s': %s", FOLDER, error)


def _read() -> dict[str, dict[str, float]]:
    try:
        content = read_json(FOLDER / _NAME)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_rate(name: str, value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    # Products in 8 bits are 0 where they were not measured.
    return 0 < value < math.inf or (name == "fp8" and value == 0)


def _key(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> str:
    """What rates depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    sizes = f"{shape.hidden}x{shape.width}, heads {shape.heads}/{shape.key_heads}/{shape.head_size}"
    version = _C.build_info()["version"]
    parts = (
        platform.node(),
        name,
        str(dtype),
        sizes,
        f"torch {torch.__version__}",
        f"lemo {version}",
        f"manner {_MANNER}",
    )
    return "; ".join(parts)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The time of a run; the first one does not count.

    On a GPU the mean of many in a row, at the clock that it holds under load: the first ones on a
    cool GPU take a tenth less, which no step does. On a CPU the least time.
    """
    _time(run, device)
    if device.type != "cuda":
        return min(_time(run, device) for _ in range(_REPEATS))
    count = math.ceil(_LOAD / _time(run, device))
    _time(run, device, count)
    return _time(run, device, count) / count


def _time(run: Callable[[], object], device: torch.device, count: int = 1) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random(device: torch.device, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=device, dtype=torch.float32).to(dtype)


def _bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes that a sum of two tensors reads and writes in a second."""
    x = torch.zeros(_ELEMENTS[device.type] // dtype.itemsize, device=device, dtype=dtype)
    y = torch.zeros_like(x)
    return 3 * x.nbytes / _seconds(lambda: y.add_(x), device)


def _link(device: torch.device) -> float:
    """Bytes of a second between the device and pinned memory of the host, the slower way."""
    on_gpu = device.type == "cuda"
    host = torch.empty(_LINK[device.type], dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
    there = torch.zeros_like(host, device=device)
    ways = (lambda: host.copy_(there, non_blocking=True), lambda: there.copy_(host))
    return host.nbytes / max(_seconds(way, device) for way in ways)


def _products(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, bandwidth: float
) -> float:
    """Operations of a second in the products of a layer, moving bytes apart."""
    rows, seconds, operations, moved = _ROWS[device.type], 0.0, 0, 0
    for inputs, outputs in {(each.inputs, each.outputs) for each in shape.linears()}:
        x = _random(device, dtype, rows, inputs)
        weight = _random(device, dtype, outputs, inputs)
        seconds += _seconds(lambda x=x, weight=weight: x @ weight.T, device)  # type: ignore[misc]
        operations += 2 * rows * inputs * outputs
        moved += rows * (inputs + outputs) * dtype.itemsize
    return operations / max(seconds - moved / bandwidth, seconds / 4)


def _fp8_products(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, bandwidth: float
) -> float:
    """The same of products in 8 bits, without the rounding of their rows."""
    rows, seconds, operations, moved = _ROWS[device.type], 0.0, 0, 0
    for inputs, outputs in {(each.inputs, each.outputs) for each in shape.linears()}:
        x = ops.fp8_rows(_random(device, dtype, rows, inputs))
        weight = ops.fp8_rows(_random(device, dtype, outputs, inputs))
        seconds += _seconds(
            lambda x=x, weight=weight: ops.fp8_product(x, weight, dtype),  # type: ignore[misc]
            device,
        )
        operations += 2 * rows * inputs * outputs
        moved += rows * (inputs + outputs * dtype.itemsize)
    return operations / max(seconds - moved / bandwidth, seconds / 4)


def _attention(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations of a second of attention, forward and backward."""
    rows = _ROWS[device.type]
    heads = (shape.heads, shape.key_heads, shape.key_heads)
    q, k, v = (
        _random(device, dtype, rows, count, shape.head_size).requires_grad_() for count in heads
    )
    cuts = torch.tensor([0, rows], dtype=torch.int32, device=device)
    with torch.no_grad():
        forward = _seconds(lambda: ops.segment_attention(q, k, v, cuts), device)

    def both() -> None:
        ops.segment_attention(q, k, v, cuts).sum().backward()

    with torch.enable_grad():
        backward = max(_seconds(both, device) - forward, forward)
    pairs = shape.queries * rows * rows / 2
    return 4 * pairs / forward, 10 * pairs / backward


def _launch(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the host for an operation of a layer: what layers add to a step too small to keep
    a GPU busy."""
    few, many = (_seconds(_small_step(layers, device, dtype), device) for layers in _LAYERS)
    layer = max(many - few, many / 10) / (_LAYERS[1] - _LAYERS[0])
    return layer / operations(_ADAPTED)


_ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _small_step(layers: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Both passes of a model of this many small layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from lemo.models.enable import enable
    from lemo.settings.elimination import LemoConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        use_cache=False,
    )
    base = LlamaForCausalLM(config).to(device, dtype)
    lora = LoraConfig(r=8, target_modules=_ADAPTED, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=False).train()
    # Passes that are replayed as graphs would tell nothing of the host's time for an operation.
    settings = LemoConfig(keep=0.5, scorer="random", recompute="none", cuda_graphs="off")
    enable(model, settings)
    ids = torch.zeros(1, 256, dtype=torch.int64, device=device)

    def run() -> None:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            model(input_ids=ids, labels=ids).loss.backward()

    return run
