"""``lemo demo``: the whole method on a small model and the Python sources at hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lemo.cli import options


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for everything; an earlier demo in it is replaced.")
    ] = Path("runs/demo"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of dense LoRA; lemo gets the same time.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that everything runs, no more.")
    ] = False,
) -> None:
    """Train a small model here, extend its context densely and with lemo, and compare."""
    # PyTorch and Transformers take seconds to import: only this command pays for them.
    from lemo.demo.run import DemoSettings, run_demo

    settings = DemoSettings.quick() if quick else DemoSettings()
    if steps is not None:
        settings = dataclasses.replace(settings, steps=steps)
    screen = Console()
    options.show_messages(screen)
    run_demo(output, settings, screen)
