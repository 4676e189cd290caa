"""The plan of a run: what each layer stores, within the memory there is."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lemo.files import json_text, read_json, write_file
from lemo.planner.plan import MARGIN, DoesNotFitError, Plan, Planner
from lemo.planner.request import Request, adapters_of
from lemo.planner.shape import shape_of, window_of
from lemo.planner.text import bytes_text, needed_text, plan_lines
from lemo.planner.timing import Rates
from lemo.predictors import load
from lemo.settings.elimination import LemoConfig
from lemo.settings.finetune import FinetuneConfig
from lemo.training.calibration import calibrated
from lemo.training.quantised import check_stored, plain_parameters, scale_bytes, stored_as
from lemo.training.run_folder import PLAN_NAME

__all__ = [
    "RunPlan",
    "checkpointed",
    "limit_name",
    "memory_limit",
    "out_of_memory",
    "plan_run",
    "request_of",
]

_GIB = 2**30

_log = logging.getLogger("lemo")


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        plan: what each layer does, and what is predicted.
        asked: the settings that it follows from.
        request: what was planned, for other lengths.
    """

    plan: Plan
    asked: dict[str, Any]
    request: Request

    @property
    def recompute(self) -> Any:
        """The setting `recompute` of the plan: one mode, or that of each layer."""
        modes = self.plan.modes
        return modes[0] if len(set(modes)) == 1 else modes

    @property
    def settings(self) -> dict[str, Any]:
        """The settings `recompute`, `offload` and `head_groups` of the plan."""
        shares = self.plan.shares
        return {
            "recompute": self.recompute,
            "offload": shares if any(shares) else 0.0,
            "head_groups": self.plan.head_groups,
        }

    def write(self, folder: Path) -> None:
        """Writes plan.json into a run folder."""
        plan = self.plan
        content = {
            "asked": self.asked,
            "modes": list(plan.modes),
            "shares": list(plan.shares),
            "head_groups": plan.head_groups,
            "graph_bytes": plan.graphs,
            "kept_bytes": [layer.kept for layer in plan.layers],
            "host_bytes": [layer.host for layer in plan.layers],
            "peak_bytes": plan.peak,
            "seconds": plan.seconds,
            "limit_bytes": plan.limit,
        }
        write_file(folder / PLAN_NAME, json_text(content))

    def lines(self) -> list[str]:
        """The plan in words."""
        plan = self.plan
        sizes = f"{bytes_text(plan.peak)} of {bytes_text(plan.limit)}"
        if plan.host:
            sizes += f", {bytes_text(plan.host)} of the host"
        if plan.graphs:
            sizes += f", of which CUDA graphs keep {bytes_text(plan.graphs)} between steps"
        return [
            f"plan: {sizes}, {plan.seconds:.3g} s a step",
            *(f"  {line}" for line in plan_lines(plan)),
        ]


def memory_limit(config: FinetuneConfig, device: torch.device) -> int | None:
    """Bytes that a run may take: the setting, or what is free on its GPU; None: not limited."""
    if config.memory_limit is not None:
        return round(config.memory_limit * _GIB)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free


def limit_name(config: FinetuneConfig) -> str:
    """What `memory_limit` returns, as errors call it."""
    return "GPU memory" if config.memory_limit is None else "memory_limit"


def checkpointed(config: FinetuneConfig, elimination: LemoConfig) -> LemoConfig:
    """The settings with what gradient checkpointing says of `recompute` where that is auto."""
    if config.gradient_checkpointing and elimination.recompute == "auto":
        return elimination.model_copy(update={"recompute": "layer"})
    return elimination


def request_of(
    config: FinetuneConfig,
    elimination: LemoConfig,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    rates: Rates | None = None,
) -> Request:
    """What a run asks of the planner.

    Args:
        config: the run.
        elimination: its settings of elimination, none left open.
        model_config: Transformers' configuration of the model.
        dtype: of its weights.
        device: where it runs.
        rates: of the machine; None: those that are measured here.

    Raises:
        FileNotFoundError: there is no such folder of predictors.
        ValueError: memory and time cannot be predicted; predictors do not fit the model.
    """
    if elimination.path == "generic":
        raise ValueError(
            "elimination.path: expected native, whose memory can be predicted, got generic"
        )
    shape = shape_of(model_config)
    check_stored(model_config, config.quantize, config.model)
    stored = stored_as(model_config)
    shape = replace(
        shape,
        scales=scale_bytes(model_config, dtype.itemsize),
        plain=plain_parameters(model_config, shape),
    )
    if elimination.in_8_bits and stored not in (None, "float8"):
        raise ValueError(
            "elimination.products: expected dtype over weights that are stored quantised in "
            f"another way than float8, got {elimination.products}"
        )
    if elimination.scorer == "predictor" and not elimination.finds_answers:
        assert elimination.predictor is not None
        predictors = load(elimination.predictor, model_config)
        elimination = elimination.of_predictors(predictors.block_size, predictors.thresholds)
    adapters = adapters_of(
        config.lora_rank, config.lora_targets, config.lora_dropout > 0, config.train_norms
    )
    return Request(
        shape,
        adapters,
        elimination,
        calibrated(shape, device, dtype, elimination.in_8_bits) if rates is None else rates,
        batch=config.batch_size,
        size=dtype.itemsize,
        autocast=dtype != torch.float32,
        cuda=device.type == "cuda",
        passes=config.gradient_accumulation,
        quantize=config.quantize or stored,
        window=window_of(model_config),
        may_shard=dtype != torch.float16,
    )


def out_of_memory(
    step: int, error: BaseException, config: FinetuneConfig, plan: RunPlan | None, saved: int
) -> MemoryError:
    """The error of a step that ran out of memory: the plan, what to change, how to go on.

    Args:
        step: that ran out of it.
        error: torch's or Python's.
        config: the run.
        plan: its plan, if it has one.
        saved: the step of the newest checkpoint; 0: there is none.
    """
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    elimination, ways = config.elimination, []
    recompute = "none" if elimination is None else elimination.recompute
    if plan is not None and recompute == "auto" and set(plan.plan.modes) != {"layer"}:
        less = plan.plan.peak / _GIB * (1 - 2 * MARGIN)
        ways.append(f"--memory-limit {less:.3g} (GiB), by which more is recomputed")
    elif elimination is not None and recompute != "layer" and plan is None:
        ways.append("--recompute layer")
    parts = [f"step {step}: {reason}"]
    if plan is not None:
        parts += [line.strip() for line in plan.lines()]
    again = f"lemo finetune --output {shlex.quote(config.output)} --resume"
    going = f"the steps up to the checkpoint of step {saved} are kept; to go on"
    if not saved:
        going = "there is no checkpoint yet; to begin again"
    if ways:
        parts.append(f"{going} with less memory: {again} {ways[0]}")
    else:
        parts.append(f"{going} where there is more memory: {again}")
    parts.append(
        "a new run needs less with a smaller keep, context_length or batch_size (and more "
        "gradient_accumulation)"
    )
    if (config.quantize if plan is None else plan.request.quantize) is None:
        parts[-1] += ", or with --quantize nf4"
    return MemoryError("; ".join(parts))


def plan_run(
    config: FinetuneConfig,
    elimination: LemoConfig | None,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    limit: int | None,
    processes: int = 1,
) -> RunPlan | None:
    """The plan of a run; None where its memory is not limited, or cannot be predicted.

    A resumed run keeps the plan that it has, as long as it fits.

    Args:
        config: the run.
        elimination: its settings of elimination, none left open.
        model_config: Transformers' configuration of the model.
        dtype: of its weights.
        device: where it runs.
        limit: bytes that a step may take; None: not limited.
        processes: of the run.

    Raises:
        DoesNotFitError: no plan is within the limit.
        ValueError: `memory_limit` or a share of the host that is to be planned is given, but memory
            cannot be predicted.
    """
    if limit is None:
        if elimination is not None and elimination.plans_host:
            raise ValueError(
                "memory_limit: expected GiB beside elimination.host_memory on the CPU, by which is "
                "planned what goes there, got null; or say elimination.offload"
            )
        return None
    if elimination is not None:
        elimination = checkpointed(config, elimination)
    predicted = _predicted(config, elimination, model_config, dtype, device, processes)
    if predicted is None or elimination is None:
        return None
    request, planner = predicted
    asked, modes = _asked(config, elimination), request.modes
    plan: Plan | None
    if modes is not None and not elimination.plans_host:
        plan = planner.given(modes, limit)
        # What is free on a GPU is no limit of the user's, and what is predicted errs.
        margin = MARGIN if config.memory_limit is None else 0.0
        if (1 - margin) * plan.peak <= limit and plan.host <= elimination.host_bytes:
            return RunPlan(plan, asked, request)
    else:
        plan = _recorded(config, asked, planner, limit) or planner.plan(limit, modes)
        if plan is not None:
            return RunPlan(plan, asked, request)
    message = _what_would_fit(config, request, planner, limit, modes)
    if config.memory_limit is None and _keeps_less(elimination):
        # What is predicted is an upper bound.
        _log.warning("%s; scores may keep fewer rows, so the run begins", message)
        smallest = planner.smallest(limit, modes)
        return None if modes is not None else RunPlan(smallest, asked, request)
    raise DoesNotFitError(message)


def _predicted(
    config: FinetuneConfig,
    elimination: LemoConfig | None,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    processes: int,
) -> tuple[Request, Planner] | None:
    """What is planned, and its planner; None where memory cannot be predicted and need not be.

    The arguments and the error are those of `plan_run`.
    """
    try:
        if elimination is None:
            raise ValueError("elimination: expected settings of it, got null")
        request = replace(
            request_of(config, elimination, model_config, dtype, device),
            processes=config.context_parallel,
            shards=processes if config.shard else 1,
        )
        return request, request.planner(config.context_length)
    except ValueError as error:
        name = "memory_limit"
        if config.memory_limit is None:
            if elimination is None or not elimination.plans_host:
                _log.info("no plan: %s", error)
                return None
            name = "elimination.host_memory"
        raise ValueError(f"{name}: memory cannot be predicted: {error}") from None


def _asked(config: FinetuneConfig, elimination: LemoConfig) -> dict[str, Any]:
    """The settings that a plan follows from; a resumed run keeps the plan where they are equal."""
    asked: dict[str, Any] = {
        "recompute": elimination.recompute,
        "memory_limit": config.memory_limit,
    }
    if elimination.host_memory:
        asked |= {"offload": elimination.offload, "host_memory": elimination.host_memory}
    if elimination.head_groups is not None:
        asked["head_groups"] = elimination.head_groups
    return asked


def _what_would_fit(
    config: FinetuneConfig,
    request: Request,
    planner: Planner,
    limit: int,
    modes: Sequence[str] | None,
) -> str:
    """What is said where no plan is within the limit.

    Raises:
        DoesNotFitError: it is the host that is too small.
    """
    request.check_host(config.context_length)
    message = (
        f"{limit_name(config)}: expected a step of {config.batch_size} x {config.context_length} "
        f"tokens that fits into {bytes_text(limit)}, got one of "
        f"{needed_text(planner.least(modes))}"
    )
    message += " at least" if modes is None else " with elimination.recompute as it is"
    return message + f"; what would fit: {request.advice(config.context_length, limit)}"


def _keeps_less(elimination: LemoConfig) -> bool:
    """Whether layers may keep fewer rows than are planned for, or fewer rows have labels."""
    by_threshold = elimination.layerwise.policy == "threshold"
    return by_threshold or elimination.keep_relevance is not None or elimination.finds_answers


def _recorded(
    config: FinetuneConfig, asked: dict[str, Any], planner: Any, limit: int
) -> Plan | None:
    """The plan of the run that is resumed, if it was asked for in the same way and fits."""
    if not config.resume:
        return None
    try:
        content = read_json(Path(config.output) / PLAN_NAME)
        if content["asked"] != json.loads(json.dumps(asked)):
            return None
        plan: Plan = planner.of(
            content["modes"], limit, content["head_groups"], content.get("shares")
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    fits = plan.peak <= limit and plan.host <= round(asked.get("host_memory", 0) * _GIB)
    return plan if fits else None
