"""The plan of a step without its weights, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lemo.ops import supports_device
from lemo.planner.combinations import combination_lines, combinations
from lemo.planner.plan import NOMINAL, DoesNotFitError, Plan
from lemo.planner.request import Request
from lemo.planner.shape import IN_DTYPE
from lemo.planner.text import bytes_text, needed_text, plan_lines
from lemo.settings.elimination import LemoConfig
from lemo.settings.finetune import FinetuneConfig
from lemo.training.calibration import calibrated
from lemo.training.model import load_config
from lemo.training.planning import checkpointed, limit_name, memory_limit, request_of

__all__ = ["planned"]


def planned(config: FinetuneConfig, limit: int | None, gpus: int = 1) -> Iterator[str]:
    """The lines of `lemo plan`.

    Args:
        config: the run.
        limit: bytes that a step may take; None: `memory_limit`, or what is free on the GPU here.
        gpus: of a host; more than one: the ways to use them.

    Raises:
        DoesNotFitError: no plan is within the limit.
        FileNotFoundError, ValueError: no such model; settings whose memory is not predicted.
    """
    elimination = config.elimination
    if elimination is None:
        raise ValueError("elimination: expected settings of it, got null")
    _check(config, limit)
    elimination = checkpointed(config, elimination.resolved(elimination.finds_answers))
    model_config, tokens = load_config(config.model), config.context_length
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    here = torch.cuda.is_available() and supports_device("cuda")
    name = "--gpu-memory"
    if limit is None:
        limit = memory_limit(config, device) if here or config.memory_limit else None
        name = limit_name(config)
        if limit is None:
            raise ValueError("--gpu-memory: expected a size such as 80GiB, because no GPU is here")
    timed = here or device.type == "cpu"
    request = _request(config, elimination, model_config, device, timed)
    yield f"model: {model_config.model_type}, {_sizes(request, tokens)}"
    yield from _about_step(request, tokens)
    request.check_host(tokens)
    if gpus > 1:
        yield from _of_several(request, tokens, gpus, limit, timed, name)
        return
    plan = _plan_within(request, tokens, limit, name)
    yield from plan_lines(plan)
    yield f"peak memory: {bytes_text(plan.peak)} of {bytes_text(limit)}"
    if plan.graphs:
        yield f"CUDA graphs: {bytes_text(plan.graphs)} of it, also between steps"
    if elimination.host_memory:
        yield f"host memory: {bytes_text(plan.host)} of {bytes_text(elimination.host_bytes)}"
    if timed:
        yield f"step time: {plan.seconds:.3g} s"
    else:
        yield "step time: not known here: no GPU to measure rates on"
    yield f"longest window that fits: {request.longest(limit)} tokens"


def _check(config: FinetuneConfig, limit: int | None) -> None:
    """Refuses settings that nothing would be planned by; the arguments are those of `planned`."""
    if limit is not None and config.memory_limit is not None:
        raise ValueError(
            f"memory_limit: expected null beside --gpu-memory, got {config.memory_limit:g}"
        )
    for name, value, expected in (
        ("context_parallel", config.context_parallel, 1),
        ("shard", config.shard, False),
    ):
        if value != expected:
            raise ValueError(
                f"{name}: expected {str(expected).lower()}, since --gpus compares all ways to use "
                f"several GPUs, got {str(value).lower()}"
            )


def _request(
    config: FinetuneConfig,
    elimination: LemoConfig,
    model_config: Any,
    device: torch.device,
    timed: bool,
) -> Request:
    """What is to be planned; where a step is timed, with the rates of this machine."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    # Refuses what is not predicted before anything is measured.
    request = request_of(config, elimination, model_config, dtype, device, NOMINAL)
    if not timed:
        return request
    rates = calibrated(request.shape, device, dtype, elimination.in_8_bits)
    return replace(request, rates=rates)


def _sizes(request: Request, tokens: int) -> str:
    linear, others = request.shape.parameters()
    return (
        f"{request.shape.layers} layers, {(linear + others) / 1e9:.3g} billion parameters, "
        f"{bytes_text(request.planner(tokens).weights)} with LoRA and its optimizer"
    )


def _about_step(request: Request, tokens: int) -> Iterator[str]:
    """What layers keep of the step, and which of their products are in 8 bits."""
    rows, elimination = request.planner(tokens).rows, request.elimination
    yield (
        f"step: {request.batch} x {tokens} tokens, of which layers keep "
        + (f"{min(rows)}" if min(rows) == max(rows) else f"{min(rows)} to {max(rows)}")
    )
    if elimination.in_8_bits:
        yield (
            f"products: {elimination.products}; the first step logs layers that err too much, "
            "which stay in dtype"
        )
        for each in request.shape.linears():
            if each.name not in IN_DTYPE and (each.inputs % 16 or each.outputs % 16):
                yield f"products of {each.name}: in dtype, its sizes are no multiples of 16"


def _of_several(
    request: Request,
    tokens: int,
    gpus: int,
    limit: int,
    timed: bool,
    name: str,
) -> Iterator[str]:
    """The ways to use several GPUs; the arguments are those of `combinations`, and what errors call
    the limit."""
    found = combinations(request, tokens, gpus, limit)
    if found[0].plan is None:
        raise DoesNotFitError(
            f"{name}: expected room for a step on {gpus} GPUs, however they are used, got "
            f"{bytes_text(limit)} of each; what would fit on one: {request.advice(tokens, limit)}"
        )
    yield f"{gpus} GPUs, with {bytes_text(limit)} of each, the most tokens a second first:"
    yield from combination_lines(found, timed=timed)
    if timed:
        between = request.rates.between / 1e9
        yield f"expected between GPUs: {between:g} GB/s to each (not measured)"


def _plan_within(request: Request, tokens: int, limit: int, name: str) -> Plan:
    """The plan of one GPU; DoesNotFitError, by the name of the limit, where none is within it."""
    planner, elimination, modes = request.planner(tokens), request.elimination, request.modes
    if modes is None or elimination.plans_host:
        plan = planner.plan(limit, modes)
    else:
        plan = planner.given(modes, limit)
    if plan is None or plan.peak > limit:
        needed = planner.least(modes) if plan is None else plan.peak
        raise DoesNotFitError(
            f"{name}: expected {needed_text(needed)} or more, got {bytes_text(limit)}; what would "
            f"fit: {request.advice(tokens, limit)}"
        )
    return plan
