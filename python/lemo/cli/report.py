"""``lemo report``: plots and one HTML page of one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lemo.cli import options
from lemo.cli.streams import printable


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the report. Default: 'report' in the first run folder."),
    ] = None,
) -> None:
    """Draw the plots of runs and write one HTML page.

    The page needs no other file.
    """
    # Matplotlib takes a second to import: only this command pays for it.
    from lemo.report import load_run, write_report
    from lemo.training.run_report import REPORT_NAME

    options.show_own_messages(options.console())
    page = write_report([load_run(run) for run in runs], output or runs[0] / REPORT_NAME)
    options.result_console().print(printable(f"Report: {page}"), soft_wrap=True)
