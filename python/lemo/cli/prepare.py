"""``lemo prepare``: labels, predictors and thresholds into one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli import options
from lemo.cli.streams import printable


def prepare(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; options override it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    documents: Annotated[
        str | None,
        typer.Option(help=".jsonl, .jsonl.xz, .jsonl.gz, .txt or a datasets folder."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder to write.")] = None,
    held_out_documents: Annotated[
        str | None,
        typer.Option(help="Documents to test on.", show_default="a tenth of the documents"),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Window lengths, such as 4096,8K.", show_default="4096")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Training windows of each length.", show_default="64")
    ] = None,
    held_out_windows: Annotated[
        int | None, typer.Option(help="Test windows of each length.", show_default="8")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of blocks to keep.", show_default="0.5")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a block.", show_default="1024")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Hidden units of a predictor.", show_default="hidden size / 16"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="label, or content: without what a block's place explains.", show_default="label"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each predictor.", show_default="300")
    ] = None,
    prune_to: Annotated[
        float | None,
        typer.Option(help="Share of hidden units to shrink to.", show_default="dead units only"),
    ] = None,
    dense_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that keep everything in the threshold search.", show_default="none"
        ),
    ] = None,
    search_rounds: Annotated[
        int | None, typer.Option(help="Rounds of the threshold search.", show_default="1")
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
    seed: Annotated[int | None, typer.Option(show_default="0")] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace the output folder.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any setting, over options and file: windows=32."
        ),
    ] = None,
) -> None:
    """Train the predictors of all layers on a frozen model and find their thresholds.

    Settings come from --set, then from the other options, then from --config, then from the
    defaults.
    """
    named = {
        "model": model,
        "documents": documents,
        "output": output,
        "held_out_documents": held_out_documents,
        "lengths": None if lengths is None else options.parse_integers(lengths, "--lengths"),
        "windows": windows,
        "held_out_windows": held_out_windows,
        "keep": keep,
        "block_size": block_size,
        "rank": rank,
        "target": target,
        "steps": steps,
        "prune_to": prune_to,
        "dense_layers": None if dense_layers is None else _layers(dense_layers),
        "search_rounds": search_rounds,
        "rope_scaling": rope_scaling,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "overwrite": overwrite,
    }

    from lemo.preparation.documents import PrepareConfig, prepare_from_documents

    settings = options.collect_settings(config, options.given(named), assignments or [])
    screen = options.console()
    options.show_messages(screen)
    with _Progress(screen) as progress:
        description = prepare_from_documents(PrepareConfig.from_dict(settings), progress)
    result = options.result_console()
    result.print(_table(description))
    result.print(printable(_summary(description, settings["output"])), soft_wrap=True)


def _layers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(
            f"--dense-layers: expected integers such as 0,1,-1, got '{text}'"
        ) from None


class _Progress:
    """One live bar for each stage on a terminal, one line for each stage elsewhere."""

    def __init__(self, screen: Any):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._screen = screen
        self._live = Progress(
            TextColumn("{task.fields[stage]}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=screen,
            disable=not screen.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Progress:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __call__(self, stage: str, done: int, total: int, message: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._live.add_task("", total=total, stage=printable(stage))
        text = printable(message)
        self._live.update(self._tasks[stage], completed=done, total=total, description=text)
        if not self._screen.is_terminal and done == total:
            self._screen.print(printable(f"{stage}: {done} of {total}  {message}"))


def _table(description: dict[str, Any]) -> Any:
    from rich.table import Table

    keep = description["settings"]["training"]["keep"]
    table = Table("layer", title=f"recall of the kept set at keep {keep:g}, held-out documents")
    columns = ("attention", "(place alone)", "MLP", "threshold", "MLP's", "parameters")
    for column in columns:
        table.add_column(column, justify="right")
    thresholds = description["thresholds"]
    for index, layer in enumerate(description["layers"]):
        attention, mlp = layer["attention"], layer["mlp"]
        table.add_row(
            str(index),
            f"{attention['recall']:.3f}",
            f"{attention['recall_of_place_alone']:.3f}",
            f"{mlp['recall']:.3f}",
            f"{thresholds['attention'][index]:.4g}",
            f"{thresholds['mlp'][index]:.4g}",
            f"{attention['parameters'] + mlp['parameters']:,}",
        )
    return table


def _summary(description: dict[str, Any], output: str) -> str:
    recall, search = description["recall"], description["threshold_search"]
    lines = [
        f"mean recall: attention {recall['attention']:.3f}, MLP {recall['mlp']:.3f}",
        f"size: {description['parameters']:,} parameters, {description['bytes'] / 2**20:.2f} MiB, "
        f"{description['share_of_model']:.2%} of the model's bytes",
    ]
    if search["losses"]:
        lines.append(
            f"threshold search: loss {search['losses'][0]:.4f} -> {search['losses'][-1]:.4f} "
            f"in {search['evaluations']} evaluations"
        )
    lines.append(f"written: {output}")
    return "\n".join(lines)
