"""``lemo prepare``: exact scores, predictors and thresholds, written to one folder."""

from __future__ import annotations

from typing import Any

from lemo.cli import options
from lemo.cli.from_settings import Given, with_settings
from lemo.cli.streams import printable
from lemo.settings.preparation import PrepareConfig

# The settings that have an option; the others are for --set and --config.
_OPTIONS = (
    *("model", "documents", "output", "heads", "held_out_documents", "lengths", "windows"),
    *("held_out_windows", "keep", "block_size", "rank", "target", "steps", "prune_to"),
    *("dense_layers", "search_rounds", "rope_scaling", "dtype", "device", "seed", "overwrite"),
)


@with_settings(PrepareConfig, _OPTIONS, "learning_rate=1e-3")
def prepare(given: Given) -> None:
    """Train predictors that score blocks by their content.

    With --heads: one predictor of what answers need, from conversations. Otherwise one for each
    sub-block of each layer of the frozen model, with thresholds, as in the paper. Settings come
    from --set, then from the other options, then from --config, then from the defaults.
    """
    settings = given.settings(PrepareConfig)

    from lemo.cli.progress import StageProgress
    from lemo.preparation.documents import prepare_from_documents, prepare_from_examples

    of_relevance = settings.target == "relevance"
    prepare_from = prepare_from_examples if of_relevance else prepare_from_documents
    screen = options.console()
    options.show_messages(screen)
    with StageProgress(screen) as progress:
        description = prepare_from(settings, progress)
    result = options.result_console()
    result.print(_table_of_relevance(description) if of_relevance else _table(description))
    result.print(printable(_summary(description, settings.output)), soft_wrap=True)


def _table(description: dict[str, Any]) -> Any:
    from rich.table import Table

    keep = description["settings"]["keep"]
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


def _table_of_relevance(description: dict[str, Any]) -> Any:
    from rich.table import Table

    keep = description["settings"]["keep"]
    table = Table(
        "examples",
        title=f"share of what answers need that keep {keep:g} holds, held out",
        caption="most: by the heads' own attention, which is what is learned",
    )
    for column in ("predictor", "words", "most"):
        table.add_column(column, justify="right")
    for kind, recall in description["recall"].items():
        table.add_row(kind, *(f"{recall[name]:.3f}" for name in ("predicted", "words", "most")))
    return table


def _summary(description: dict[str, Any], output: str) -> str:
    recall, search = description["recall"], description.get("threshold_search", {"losses": []})
    lines = []
    if "attention" in recall:
        lines.append(f"mean recall: attention {recall['attention']:.3f}, MLP {recall['mlp']:.3f}")
    lines += [
        f"size: {description['parameters']:,} parameters, {description['bytes'] / 2**20:.2f} MiB, "
        f"{description['share_of_model']:.2%} of the model's bytes",
    ]
    mean = recall.get("mean")
    if mean is not None and mean["predicted"] <= mean["words"]:
        lines.append(
            "warning: this predictor finds no more than words alone (scorer lexical) do; train it "
            "longer, or on more examples"
        )
    if search["losses"]:
        lines.append(
            f"threshold search: loss {search['losses'][0]:.4f} -> {search['losses'][-1]:.4f} "
            f"in {search['evaluations']} evaluations"
        )
    lines.append(f"written: {output}")
    return "\n".join(lines)
