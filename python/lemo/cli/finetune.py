"""``lemo finetune``: LoRA on long documents, with or without token elimination."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli import options


def finetune(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; options override it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    documents: Annotated[
        str | None,
        typer.Option(help=".jsonl, .jsonl.xz, .jsonl.gz, .txt or a datasets folder."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Run folder.")] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens of a training window.", show_default="8192")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="100")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows of a forward pass.", show_default="1")
    ] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option(help="Forward passes of a step.", show_default="1")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(show_default="2e-4")] = None,
    lora_rank: Annotated[int | None, typer.Option(show_default="16")] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(help="Adapted modules, with commas.", show_default="every linear layer"),
    ] = None,
    train_norms: Annotated[
        bool | None, typer.Option("--train-norms", help="Train the norms' weights too.")
    ] = None,
    rope_scaling: Annotated[
        str | None, typer.Option(help="linear, yarn, dynamic or none.", show_default="linear")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Recompute in backward.")
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default="0")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", show_default="50")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Share of blocks kept (elimination.keep).", show_default="0.5"),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Plain LoRA, nothing is eliminated.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any setting: elimination.keep=0.4, warmup_steps=0."
        ),
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Delete the run that is in the folder.")
    ] = None,
) -> None:
    """Fine-tune a model with LoRA on windows of long documents.

    Settings come from the command line, then from --config, then from the defaults. A run that is
    resumed takes the settings it was started with.
    """
    given = options.given(
        {
            "model": model,
            "documents": documents,
            "output": output,
            "context_length": context_length,
            "steps": steps,
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "learning_rate": learning_rate,
            "lora_rank": lora_rank,
            "lora_targets": lora_targets,
            "train_norms": train_norms,
            "rope_scaling": rope_scaling,
            "dtype": dtype,
            "gradient_checkpointing": gradient_checkpointing,
            "seed": seed,
            "save_every": save_every,
            "resume": resume,
            "overwrite": overwrite,
        }
    )
    assignments = list(set_ or [])
    if keep is not None:
        assignments.insert(0, f"elimination.keep={keep}")
    settings = collect_settings(config, given, assignments, dense)

    from lemo.cli.progress import StepProgress
    from lemo.training.config import FinetuneConfig
    from lemo.training.finetune import ADAPTER_NAME, process_state
    from lemo.training.finetune import finetune as run

    wanted = FinetuneConfig.from_dict(settings)
    screen = options.console(quiet=not process_state().is_main_process)
    options.show_messages(screen)
    with StepProgress(screen, wanted.log_every) as progress:
        result = run(wanted, progress)
    screen.print(f"adapter: {result.folder / ADAPTER_NAME}", highlight=False)


def collect_settings(
    config: Path | None, given: dict[str, Any], assignments: list[str], dense: bool
) -> dict[str, Any]:
    """Settings from the file, then the options, then the assignments.

    Args:
        config: YAML file of settings, or None. A resumed run without a file takes its own.
        given: settings by name.
        assignments: "name=value" strings.
        dense: whether elimination is off.

    Raises:
        ValueError, FileNotFoundError: see :func:`lemo.training.config.read_yaml` and
            :func:`lemo.cli.options.apply_assignments`.
    """
    from lemo.training.config import read_yaml

    settings: dict[str, Any] = {} if config is None else read_yaml(config)
    if config is None and given.get("resume") and "output" in given:
        recorded = Path(given["output"]) / "config.yaml"
        settings = read_yaml(recorded) if recorded.is_file() else {}
    settings |= given
    if dense:
        if any(a.strip().startswith("elimination.") for a in assignments):
            raise ValueError("--dense: expected no setting of elimination beside it, got one")
        settings["elimination"] = None
    options.apply_assignments(settings, assignments)
    return settings
