"""``lemo finetune``: LoRA on long documents, with or without token elimination."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lemo.cli import options
from lemo.cli.from_settings import Given, with_settings
from lemo.cli.streams import printable
from lemo.settings.finetune import FinetuneConfig

# The settings that have an option; the others are for --set and --config.
_OPTIONS = (
    *("model", "documents", "output", "context_length", "steps", "batch_size"),
    *("gradient_accumulation", "learning_rate", "lora_rank", "lora_targets", "train_norms"),
    "context_parallel",
    *("rope_scaling", "dtype", "quantize", "device", "shard", "gradient_checkpointing", "seed"),
    *("memory_limit", "save_every"),
    *("elimination.keep", "elimination.recompute", "elimination.host_memory"),
    "elimination.predictor",
    *("elimination.heads", "elimination.scores", "resume", "overwrite"),
)
# Options that name what a scorer reads, and that scorer.
_SCORERS = {"predictor": "predictor", "heads": "attention", "scores": "given"}


@with_settings(FinetuneConfig, _OPTIONS, "elimination.keep=0.25, warmup_steps=0")
def finetune(
    given: Given,
    dense: Annotated[
        bool, typer.Option("--dense", help="Plain LoRA, nothing is left out.")
    ] = False,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8", help="Multiply with frozen weights in 8 bits (elimination.products fp8)."
        ),
    ] = False,
) -> None:
    """Fine-tune a model with LoRA on windows of long documents.

    Settings come from --set, then from the other options, then from --config, then from the
    defaults. --predictor, --heads and --scores also set elimination.scorer. With --output and
    --resume alone a run goes on with the settings it was started with; settings that are given must
    not differ from them.
    """
    wanted = completed(given, dense, fp8).settings(FinetuneConfig)

    from lemo.training.processes import process_group

    with process_group():
        _run(wanted)


def _run(wanted: FinetuneConfig) -> None:
    from lemo.cli.progress import StepProgress
    from lemo.training.finetune import finetune as run
    from lemo.training.processes import process_state
    from lemo.training.run_folder import ADAPTER_NAME, CHECKPOINTS_NAME

    screen = options.console(quiet=not process_state(wanted).is_main_process)
    options.show_messages(screen)
    try:
        with StepProgress(screen, wanted.log_every) as progress:
            result = run(wanted, progress)
    except KeyboardInterrupt:
        folder = Path(wanted.output) / CHECKPOINTS_NAME
        if folder.is_dir() and any(folder.iterdir()):
            screen.print(
                "the steps up to the newest checkpoint are kept; to go on: lemo finetune --output "
                + printable(f"{shlex.quote(wanted.output)} --resume")
            )
        raise
    screen.print(printable(f"adapter: {result.folder / ADAPTER_NAME}"))


def completed(given: Given, dense: bool, fp8: bool = False) -> Given:
    """The same with what --resume, --dense, --fp8, --predictor and the like mean.

    Args:
        given: what the command line says. A resumed run without a file takes its own.
        dense: whether nothing is left out.
        fp8: whether frozen weights multiply in 8 bits.

    Raises:
        FileNotFoundError: no run to resume.
        ValueError: a setting of elimination beside `dense`; two scorers; the settings of the run
            that is resumed are damaged.
    """
    config, values = given.config, dict(given.options)
    if config is None and values.get("resume") and "output" in values:
        from lemo.training.run_folder import CONFIG_NAME, check_config

        config = Path(values["output"]) / CONFIG_NAME
        if not config.is_file():
            raise FileNotFoundError(f"output: there is no run in '{values['output']}' to resume")
        check_config(config)
    named = [option for option in _SCORERS if f"elimination.{option}" in values]
    if len(named) > 1:
        both = " and ".join(f"--{option}" for option in named)
        raise ValueError(f"{both}: expected one of them, for one scorer")
    for option in named:
        values["elimination.scorer"] = _SCORERS[option]
    if fp8:
        values["elimination.products"] = "fp8"
    if dense:
        assigned = (assignment.partition("=")[0].strip() for assignment in given.assignments)
        for name in (*values, *assigned):
            if name.partition(".")[0] == "elimination":
                raise ValueError(
                    f"--dense: expected no setting of elimination beside it, got '{name}'"
                )
        values["elimination"] = None
    return Given(config, values, given.assignments)
