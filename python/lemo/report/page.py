"""The HTML page of a report: summary, plots and configuration in one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

import jinja2
import yaml

from lemo.files import write_file
from lemo.report import plots
from lemo.report.run import Run

ABSENT = "–"


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure of the page: file name without ending, heading, caption, how to draw it."""

    stem: str
    title: str
    caption: str
    draw: Callable[[plots.Theme], bytes]


def write_report(runs: Sequence[Run], output: str | Path) -> Path:
    """Write the plots (``*.png``) and the page (``index.html``) of some runs into a folder.

    The page carries every plot inside itself, in light and dark colours. Each file is replaced in
    one step, the page last, so that a reader never sees half a report. Only files of an earlier
    report are replaced.

    Args:
        runs: one run, or several to compare.
        output: the folder to write into; it is made when absent.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no run.
        FileExistsError: ``output`` is no folder, or a file of such a name is not of a report.
        OSError: the folder cannot be written.
    """
    if not runs:
        raise ValueError("runs: expected at least one run, got none")
    runs = _named_apart(runs)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: expected a folder, but '{output}' is a file")
    sections, files = [], {}
    for plot in _plots(runs):
        images = {theme.name: plot.draw(theme) for theme in (plots.LIGHT, plots.DARK)}
        files[output / f"{plot.stem}.png"] = images["light"]
        sections.append(
            {
                "title": plot.title,
                "caption": plot.caption,
                **{name: base64.b64encode(image).decode() for name, image in images.items()},
            }
        )
    page = output / "index.html"
    html = _template().render(_context(runs, sections))
    # Half of a surrogate pair, as in names that are no UTF-8, has no bytes of its own.
    files[page] = html.encode("utf-8", "backslashreplace")
    _check_replaceable(page, files)
    output.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        write_file(path, content)
    return page


def _check_replaceable(page: Path, files: Iterable[Path]) -> None:
    """Raise FileExistsError where a file would be replaced that is not of a report."""
    if _is_report(page):
        return
    for path in files:
        if path.exists() and not _is_report(path):
            raise FileExistsError(
                f"output: '{path}' is not of a report of lemo and is not replaced; choose another "
                "folder"
            )


def _is_report(path: Path) -> bool:
    return path.is_file() and plots.MARK.encode() in path.read_bytes()


def summary_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of (quantity, one text for each run): what a reader wants to know first."""
    rows = [
        ("method", [_method(run) for run in runs]),
        ("steps", [f"{len(run.records)}" for run in runs]),
        ("broken lines of the log", [f"{run.broken}" if run.broken else ABSENT for run in runs]),
        ("tokens", [f"{run.tokens:,}" if run.tokens else ABSENT for run in runs]),
        ("final loss", [_decimal(run.final_loss, 4) for run in runs]),
        ("seconds a step (median)", [_decimal(run.median("seconds"), 2) for run in runs]),
        ("tokens / s (median)", [_decimal(run.median("tokens_per_second"), 0) for run in runs]),
        ("peak memory", [_bytes(run.peak_memory_bytes) for run in runs]),
        ("token rows kept (mean)", [f"{run.kept_share:.0%}" for run in runs]),
    ]
    return [row for row in rows if any(text != ABSENT for text in row[1])]


def _context(runs: Sequence[Run], sections: list[dict]) -> dict:
    return {
        "title": " · ".join(run.name for run in runs),
        "names": [run.name for run in runs],
        "summary": summary_table(runs),
        "metrics": _metrics_table(runs),
        "sections": sections,
        "configs": [
            (run.name, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
            for run in runs
            if run.config
        ],
        "light": plots.LIGHT,
        "dark": plots.DARK,
    }


def _metrics_table(runs: Sequence[Run]) -> list[dict]:
    """Rows of held-out perplexity: kind, length, then (whole, last quarter) of each run."""
    keys = sorted(
        {(str(m.get("kind")), int(m.get("length", 0))) for run in runs for m in run.metrics}
    )
    rows = []
    for kind, length in keys:
        cells = []
        for run in runs:
            found = [
                m
                for m in run.metrics
                if (str(m.get("kind")), int(m.get("length", 0))) == (kind, length)
            ]
            metric = found[-1] if found else {}
            cells.append(
                [_decimal(metric.get(field), 3) for field in ("perplexity", "tail_perplexity")]
            )
        rows.append({"kind": kind, "length": f"{length:,}", "cells": cells})
    return rows


def _plots(runs: Sequence[Run]) -> list[Plot]:
    found = [
        Plot(
            "loss",
            "Loss",
            "Training loss of each step (thin) and its running mean (thick).",
            _draw(plots.loss, runs),
        )
    ]
    for index, run in enumerate(runs):
        suffix, of_run = ("", "") if len(runs) == 1 else (f"_{index + 1}", f" · {run.name}")
        if run.eliminated:
            found.append(
                Plot(
                    f"kept_share{suffix}",
                    f"Kept share of each layer{of_run}",
                    "Share of the tokens that took part in each layer, step by step.",
                    _draw(plots.kept_share, run),
                )
            )
        if run.kept_map is not None:
            found.append(
                Plot(
                    f"kept_map{suffix}",
                    f"Kept blocks of one document{of_run}",
                    f"{run.kept_map.tokens:,} tokens in blocks of {run.kept_map.block_size}: "
                    "filled blocks were kept by the layer, which leaves the others out.",
                    _draw(plots.kept_map, run.kept_map),
                )
            )
    found.append(
        Plot(
            "resources",
            "Memory and speed",
            "Peak memory since the first step (on a GPU what is allocated there, on the CPU what "
            "of the process is resident), and tokens of the documents for each second of training.",
            _draw(plots.resources, runs),
        )
    )
    return found


def _draw(function, subject) -> Callable[[plots.Theme], bytes]:
    return lambda theme: function(subject, theme)


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same name get their parent folder in front, then a number if need be."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({index})" for index, name in enumerate(names, start=1)]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _method(run: Run) -> str:
    elimination = run.config.get("elimination")
    if not elimination:
        return "dense LoRA"
    if elimination.get("layerwise", elimination).get("policy") == "threshold":
        return f"lemo, thresholds, {elimination.get('scorer')} scores"
    return f"lemo, keep {elimination.get('keep')}, {elimination.get('scorer')} scores"


def _decimal(value, digits: int) -> str:
    return ABSENT if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _bytes(value: float) -> str:
    if math.isnan(value):
        return ABSENT
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _template() -> jinja2.Template:
    source = resources.files("lemo.report").joinpath("page.html").read_text(encoding="utf-8")
    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).from_string(source)
