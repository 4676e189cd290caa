"""``lemo data``: what lemo makes of a file of training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli import options
from lemo.cli.streams import printable

app = typer.Typer(help="Look at training data as lemo reads it.")
# The callback also makes it a group where it has one command.
app.callback(invoke_without_command=True)(options.show_help)

# Characters of each text of the shown example on either side of what is left out.
_SHOWN = 400


@app.command()
def check(
    documents: Annotated[
        Path, typer.Argument(metavar="FILE", help="Documents or conversations, as for finetune.")
    ],
    model: Annotated[
        str, typer.Option(help="Model folder or hub name; its tokenizer and template are used.")
    ],
    context_length: Annotated[int, typer.Option(help="Tokens of a training window.")] = 8192,
    labels: Annotated[str, typer.Option(help="answers or all: which tokens get a label.")] = (
        "answers"
    ),
    example: Annotated[int, typer.Option(help="Number of the example to show, from 0.")] = 0,
) -> None:
    """Read a file and show lengths, labels and one example."""
    if labels not in ("answers", "all"):
        raise ValueError(f"--labels: expected one of answers, all, got '{labels}'")

    from lemo.data.check import check_file
    from lemo.settings.base import MOST
    from lemo.training.model import load_config, load_tokenizer

    if not 2 <= context_length <= MOST:
        raise ValueError(
            f"--context-length: expected an integer in [2, {MOST}], got {context_length}"
        )
    options.show_messages(options.console())
    vocab_size = load_config(model).get_text_config().vocab_size
    found = check_file(
        documents, load_tokenizer(model), context_length, vocab_size, labels, example
    )
    result = options.result_console()
    result.print(_table(found.rows))
    for line in found.remarks:
        result.print(printable(line), soft_wrap=True)
    result.print(printable(f"\n{found.name}, labels between {{+ and +}}:\n"), soft_wrap=True)
    result.print(printable(_shown(found.pieces)), soft_wrap=True)


def _table(rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    return table


def _shown(pieces: list[tuple[str, bool]]) -> str:
    """Texts of an example, marks around those with labels; long ones without their middle."""
    shown = ((_shortened(text), labelled) for text, labelled in pieces)
    return "".join(f"{{+{text}+}}" if labelled else text for text, labelled in shown)


def _shortened(text: str) -> str:
    if len(text) <= 2 * _SHOWN:
        return text
    return f"{text[:_SHOWN]} [... {len(text) - 2 * _SHOWN} characters ...] {text[-_SHOWN:]}"
