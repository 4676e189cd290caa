"""``lemo demo``: the whole method on a small model and the sources of Python's standard library."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from lemo.cli import options
from lemo.files import LOCK_NAME, lock


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for everything; an earlier demo in it is replaced.")
    ] = Path("runs/demo"),
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of dense LoRA; lemo gets as many, then the same time.",
            show_default="30, or 3 with --quick",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that everything runs, no more.")
    ] = False,
) -> None:
    """Run the whole method on a small model, on the CPU.

    The model is trained here, fine-tuned on long prompts densely and with lemo, and compared. Facts
    are planted in Python sources and asked for at the end; only the answers have labels.
    """
    # PyTorch and Transformers take seconds to import: only this command pays for them.
    from lemo.demo.run import DemoSettings, run_demo

    settings = DemoSettings.quick() if quick else DemoSettings()
    if steps is not None:
        settings = dataclasses.replace(settings, steps=steps)
    screen = options.result_console()
    options.show_messages(screen)
    folder = Path(os.path.realpath(output))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output: expected a folder, but '{output}' is a file")
    with lock(folder / LOCK_NAME, f"output: '{output}'"):
        run_demo(output, settings, screen)
