"""``lemo plan``: memory and time of a training step, and what each layer stores of it."""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any

import typer

from lemo.cli import options
from lemo.cli.streams import printable

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_MOST_BYTES = 2**60
# Of a host; all ways to use them are compared.
_MOST_GPUS = 256


def plan(
    model: Annotated[str, typer.Argument(help="Folder with a config.json, or hub name.")],
    tokens: Annotated[str, typer.Option(help="Tokens of a window, such as 65536, 64K or 1M.")],
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the blocks that is kept (elimination.keep).", show_default="0.5"
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that a step may take, such as 80GiB.",
            show_default="what is free on the GPU here",
        ),
    ] = None,
    gpus: Annotated[
        int, typer.Option(help="GPUs of a host; more than 1: the ways to use them, best first.")
    ] = 1,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of the host for activations, such as 64GiB (elimination.host_memory).",
            show_default="none",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows of a forward pass.")] = 1,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Forward passes of an optimizer step.")
    ] = 1,
    lora_rank: Annotated[int, typer.Option(help="Rank of every LoRA pair.")] = 16,
    lora_targets: Annotated[
        str | None,
        typer.Option(help="Adapted modules, with commas.", show_default="every linear layer"),
    ] = None,
    train_norms: Annotated[bool, typer.Option("--train-norms", help="Train norms, too.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[
        str | None, typer.Option(help="Weights in nf4, int8 or float8.", show_default="no")
    ] = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Multiply with frozen weights in 8 bits.")
    ] = False,
    recompute: Annotated[
        str,
        typer.Option(help="auto: as planned; or none, selective, layer (elimination.recompute)."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting of `lemo finetune`."),
    ] = None,
) -> None:
    """Predict memory and time of a training step.

    Also what each layer stores or recomputes, and the longest window that fits. Nothing is trained
    and no weights are read. The rates that the time follows from are measured for a second or two,
    once for each machine and shape; without a GPU here, the plan of one is made by nominal rates,
    and no time is told.
    """
    length = _parse_length(tokens)
    limit = None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory")
    if not 1 <= gpus <= _MOST_GPUS:
        raise ValueError(f"--gpus: expected a number from 1 to {_MOST_GPUS}, got {gpus}")
    if limit == 0:
        raise ValueError(f"--gpu-memory: expected a size above 0, got '{gpu_memory}'")
    settings: dict[str, Any] = {
        "model": model,
        "documents": "-",
        "output": "-",
        "context_length": length,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "lora_rank": lora_rank,
        "lora_targets": lora_targets,
        "train_norms": train_norms,
        "dtype": dtype,
        "quantize": quantize,
        "device": device,
        "elimination": {"recompute": recompute}
        | ({} if keep is None else {"keep": keep})
        | ({"products": "fp8"} if fp8 else {}),
    }
    if host_memory is not None:
        size = parse_bytes(host_memory, "--host-memory")
        settings["elimination"]["host_memory"] = size / _UNITS["gib"]
    options.apply_assignments(settings, assignments or ())

    from lemo.settings.finetune import FinetuneConfig
    from lemo.training.dry_run import planned

    screen = options.console()
    options.show_messages(screen)
    for line in planned(FinetuneConfig.from_dict(settings), limit, gpus):
        options.result_console().print(printable(line), soft_wrap=True)


def _parse_length(text: str) -> int:
    lengths: list[int] = []
    with contextlib.suppress(ValueError):
        lengths = options.parse_integers(text, "--tokens")
    if len(lengths) != 1 or not 2 <= lengths[0] < 2**31:
        raise ValueError(
            f"--tokens: expected one length from 2 to {2**31 - 1}, such as 65536, 64K or 1M, got "
            f"'{text}'"
        )
    return lengths[0]


def parse_bytes(text: str, option: str) -> int:
    """ "80GiB" -> 85899345920. The unit may not be left out: settings of the same names are in GiB.

    Raises:
        ValueError: not a size, or one that no machine has; the message names ``option``.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{option}: expected a size with its unit, such as 80GiB, got '{text}'")
    size = float(match[1]) * _UNITS[match[2]]
    if size > _MOST_BYTES:
        raise ValueError(f"{option}: expected a size of 1048576 TiB at most, got '{text}'")
    return round(size)
