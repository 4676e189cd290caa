"""``lemo eval``: dense perplexity of documents, or exact answers, at given lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli import options
from lemo.cli.streams import printable


def eval(
    documents: Annotated[
        str, typer.Option(help="Documents or conversations, in the files that finetune reads.")
    ],
    lengths: Annotated[str, typer.Option(help="Window lengths in tokens, such as 4096,8K.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or hub name.", show_default="the one that the adapter names"
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="PEFT adapter, or a run folder (which gets the results, too)."),
    ] = None,
    rope_scaling: Annotated[
        str,
        typer.Option(
            help="How a model is extended that is shorter than the longest of --lengths (by one "
            "factor for all of them), unless its adapter says: linear, yarn, dynamic or none."
        ),
    ] = "none",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    limit: Annotated[
        int | None,
        typer.Option(help="At most this many documents of each kind, or conversations."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file, too.")
    ] = None,
) -> None:
    """Measure perplexity, or exact answers, with every token present.

    Of documents: perplexity of their first tokens, over the window and its last quarter. Of
    conversations: the share of exact answers. An answer is exact if each of its tokens is the most
    likely one; the middle of longer prompts is cut.
    """
    wanted = options.parse_integers(lengths, "--lengths")
    if model is None and adapter is None:
        raise ValueError("--model, --adapter: expected at least one of the two, got none")
    if output is not None:
        options.check_output_file("--json", output)

    from rich.progress import Progress

    from lemo.data.reading import called
    from lemo.settings.finetune import Device, Dtype, RopeScaling
    from lemo.training.adapter import base_model_name, find_adapter
    from lemo.training.answers import evaluate_answers, has_answers
    from lemo.training.evaluate import evaluate
    from lemo.training.metrics import add_metrics, read_metrics, write_metrics
    from lemo.training.run_folder import METRICS_NAME, absolute, reading, recorded_model

    options.check_choice("--rope-scaling", rope_scaling, RopeScaling)
    options.check_choice("--dtype", dtype, Dtype)
    options.check_choice("--device", device, Device)
    screen = options.console()
    options.show_messages(screen)
    run = None if adapter is None or find_adapter(adapter) == adapter else adapter
    name = "model"
    if model is None and adapter is not None:
        name = "adapter: the model that it names"
        model = (run and recorded_model(run)) or base_model_name(adapter)
    with reading(run) as writable:
        if run is not None and writable:
            read_metrics(run / METRICS_NAME)  # What cannot be added to is refused before.
        with Progress(console=screen, disable=not screen.is_terminal) as progress:
            task = progress.add_task("windows", total=None)
            with called(name, "model"):
                results = (evaluate_answers if has_answers(documents) else evaluate)(
                    model,
                    documents,
                    wanted,
                    adapter=adapter,
                    rope_scaling=rope_scaling,
                    dtype=dtype,
                    device=device,
                    limit=limit,
                    progress=lambda done, total: progress.update(task, completed=done, total=total),
                )
        # On the screen first: no file that cannot be written loses them.
        options.result_console().print(_table(results))
        results = [row | {"source": absolute(documents)} for row in results]
        if output is not None:
            write_metrics(output, results)
        if run is not None and writable:
            add_metrics(run / METRICS_NAME, results)


def _table(results: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    of_answers = "exact" in results[0]
    table = Table(title="answers" if of_answers else "perplexity")
    # A long name takes several lines; figures are never cut.
    table.add_column("kind", overflow="fold")
    names = (
        ("answers", "exact", "right tokens", "perplexity")
        if of_answers
        else ("whole window", "last quarter")
    )
    for column in ("length", "documents", *names):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results:
        cells = (
            (
                str(row["answers"]),
                f"{row['exact']:.1%}",
                f"{row['right_tokens']:.1%}",
                f"{row['perplexity']:.3f}",
            )
            if of_answers
            else (f"{row['perplexity']:.3f}", f"{row['tail_perplexity']:.3f}")
        )
        table.add_row(printable(row["kind"]), str(row["length"]), str(row["documents"]), *cells)
    return table
