"""``lemo finetune``: LoRA on long documents, with or without token elimination."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli import options
from lemo.cli.streams import printable


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
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu or cuda.", show_default="auto"),
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
    recompute: Annotated[
        str | None,
        typer.Option(
            help="none, layer or selective: what backward computes again (elimination.recompute).",
            show_default="layer with --gradient-checkpointing",
        ),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="Folder of lemo prepare whose scores decide (elimination.predictor and scorer)."
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Plain LoRA, nothing is eliminated.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any setting, over options and file: elimination.keep=0.25, warmup_steps=0.",
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

    Settings come from --set, then from the other options, then from --config, then from the
    defaults. With --output and --resume alone a run goes on with the settings it was started with;
    settings that are given must not differ from them.
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
            "device": device,
            "gradient_checkpointing": gradient_checkpointing,
            "seed": seed,
            "save_every": save_every,
            "resume": resume,
            "overwrite": overwrite,
            "elimination.keep": keep,
            "elimination.recompute": recompute,
            "elimination.predictor": predictor,
            "elimination.scorer": None if predictor is None else "predictor",
        }
    )
    settings = collect_settings(config, given, set_ or [], dense)

    from lemo.cli.progress import StepProgress
    from lemo.settings.finetune import FinetuneConfig
    from lemo.training.finetune import finetune as run
    from lemo.training.finetune import process_state
    from lemo.training.run_folder import ADAPTER_NAME, CHECKPOINTS_NAME

    wanted = FinetuneConfig.from_dict(settings)
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


def collect_settings(
    config: Path | None, given: dict[str, Any], assignments: list[str], dense: bool
) -> dict[str, Any]:
    """:func:`lemo.cli.options.collect_settings`, with what --resume and --dense mean.

    Args:
        config: YAML file of settings, or None. A resumed run without a file takes its own.
        given: settings by name, as options gave them.
        assignments: "name=value" strings.
        dense: whether elimination is off.

    Raises:
        ValueError: a setting of elimination beside `dense`; others as for the function above.
    """
    if config is None and given.get("resume") and "output" in given:
        recorded = Path(given["output"]) / "config.yaml"
        config = recorded if recorded.is_file() else None
    if dense:
        names = [*given, *(assignment.partition("=")[0].strip() for assignment in assignments)]
        for name in names:
            if name.partition(".")[0] == "elimination":
                raise ValueError(
                    f"--dense: expected no setting of elimination beside it, got '{name}'"
                )
        given = given | {"elimination": None}
    return options.collect_settings(config, given, assignments)
