"""``lemo relevance``: retrieval heads of a model, and scores of a data set's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lemo.cli import options
from lemo.cli.from_settings import Given, with_settings
from lemo.cli.streams import printable
from lemo.settings.relevance import HeadsConfig, ScoresConfig

if TYPE_CHECKING:
    from lemo.relevance.heads import RetrievalHeads

app = typer.Typer(help="Find and store which blocks of a prompt its answers need.")
app.callback(invoke_without_command=True)(options.show_help)

# The settings that have an option; the others are for --set and --config.
_HEADS = (
    *("model", "documents", "output", "context_length", "windows", "block_size", "count"),
    *("layers", "rope_scaling", "dtype", "device", "seed", "overwrite"),
)
_SCORES = (
    *("model", "scout", "documents", "output", "scorer", "heads", "context_length"),
    *("block_size", "rope_scaling", "dtype", "device", "resume", "overwrite"),
)


@app.command()
@with_settings(HeadsConfig, _HEADS, "count=8")
def heads(given: Given) -> None:
    """Find the heads that look at what an answer is copied from.

    Facts are planted in the documents and asked for behind them. Settings come from --set, then
    from the other options, then from --config, then from the defaults.
    """
    wanted = given.settings(HeadsConfig)

    from lemo.cli.progress import StageProgress
    from lemo.preparation.heads import find_heads_in_documents

    options.check_output_file("--output", Path(wanted.output))
    screen = options.console()
    options.show_messages(screen)
    with StageProgress(screen) as progress:
        found = find_heads_in_documents(
            wanted, lambda done, total: progress("windows", done, total, "")
        )
    result = options.result_console()
    result.print(_table(found))
    result.print(printable(f"written: {wanted.output}"), soft_wrap=True)


@app.command()
@with_settings(ScoresConfig, _SCORES, "rope_scaling=yarn")
def scores(given: Given) -> None:
    """Score the blocks of a data set once, for all epochs.

    The folder is for the setting elimination.scores of lemo finetune (--scores). The same command
    with --resume goes on where one was interrupted. Settings come from --set, then from the other
    options, then from --config, then from the defaults.
    """
    wanted = given.settings(ScoresConfig)

    from lemo.cli.progress import StageProgress
    from lemo.preparation.scores import score_examples
    from lemo.relevance.store import DESCRIPTION_FILE

    screen = options.console()
    options.show_messages(screen)
    try:
        with StageProgress(screen) as progress:
            windows = score_examples(
                wanted, lambda done, total: progress("examples", done, total, "")
            )
    except KeyboardInterrupt:
        if (Path(wanted.output) / DESCRIPTION_FILE).is_file():
            instead = " in place of --overwrite" if wanted.overwrite else ""
            screen.print(
                f"what is scored is kept; to go on, give the same command with --resume{instead}"
            )
        raise
    screen.print(printable(f"scores of {len(windows.examples)} examples: {wanted.output}"))


def _table(found: RetrievalHeads) -> Any:
    from rich.table import Table

    table = Table("layer", "head", title="share of a head's looks that falls on the fact")
    table.add_column("share", justify="right")
    shares = found.found_by["share_of_looks"]
    for layer, head in found.heads:
        table.add_row(str(layer), str(head), f"{shares[f'{layer}.{head}']:.3f}")
    return table
