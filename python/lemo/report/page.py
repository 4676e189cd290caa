"""The HTML page of a report: summary, plots and configuration in one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path

import jinja2
import yaml

from lemo.files import check_above, write_file
from lemo.planner.text import action_text, layers_text
from lemo.report import plots
from lemo.report.run import RecordedPlan, RelevanceMap, Run
from lemo.training.run_report import PAGE_NAME, has_mark, is_of_report

ABSENT = "–"


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure of the page: file name without ending, heading, caption, how to draw it, and what
    stands in a table beneath it."""

    stem: str
    title: str
    caption: str
    draw: Callable[[plots.Theme], bytes]
    questions: Sequence[dict] = ()


def write_report(
    runs: Sequence[Run], output: str | Path, before: Sequence[dict] = (), note: str = ""
) -> Path:
    """Write the plots (``*.png``) and the page (``index.html``) of some runs into a folder.

    The page carries every plot inside itself, in light and dark colours. Each file is replaced in
    one step, the page last, so that a reader never sees half a report. Only files of an earlier
    report are replaced; plots of it that the new one lacks are removed.

    Args:
        runs: one run, or several to compare.
        output: the folder to write into; it is made when absent.
        before: rows of an evaluation of the model before all of these runs, as `Run.metrics`.
        note: what the runs are about, below the title.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no run.
        FileExistsError: ``output`` is no folder, or a file of such a name is not of a report.
        NotADirectoryError: a file is where a folder above ``output`` has to be.
        OSError: the folder cannot be written.
    """
    if not runs:
        raise ValueError("runs: expected at least one run, got none")
    runs = _named_apart(runs)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: expected a folder, but '{output}' is a file")
    check_above(output, f"output: '{output}'")
    sections, files = [], {}
    for plot in _plots(runs):
        images = {theme.name: plot.draw(theme) for theme in (plots.LIGHT, plots.DARK)}
        files[output / f"{plot.stem}.png"] = images["light"]
        sections.append(
            {
                "title": plot.title,
                "caption": plot.caption,
                "questions": plot.questions,
                **{name: base64.b64encode(image).decode() for name, image in images.items()},
            }
        )
    page = output / PAGE_NAME
    html = _template().render(note=note, **_context(runs, sections, before))
    # Half of a surrogate pair, as in names that are no UTF-8, has no bytes of its own.
    files[page] = html.encode("utf-8", "backslashreplace")
    _check_replaceable(page, files)
    output.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        write_file(path, content)
    for path in output.iterdir():
        if path not in files and is_of_report(path):
            path.unlink()
    return page


def _check_replaceable(page: Path, files: Iterable[Path]) -> None:
    """Raise FileExistsError where a file would be replaced that is not of a report."""
    if has_mark(page):
        return
    for path in files:
        if path.exists() and not has_mark(path):
            raise FileExistsError(
                f"output: '{path}' is not of a report of lemo and is not replaced; choose another "
                "folder"
            )


def summary_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of (quantity, one text for each run): what a reader wants to know first."""
    rows = [
        ("method", [_method(run) for run in runs]),
        ("steps", [f"{len(run.records)}" for run in runs]),
        ("broken lines of the log", [f"{run.broken}" if run.broken else ABSENT for run in runs]),
        ("tokens", [f"{run.tokens:,}" if run.tokens else ABSENT for run in runs]),
        (
            "final loss (mean of the last tenth of the steps)",
            [_decimal(run.final_loss, 4) for run in runs],
        ),
        ("seconds a step (median)", [_decimal(run.median("seconds"), 2) for run in runs]),
        (
            "seconds a step (predicted)",
            [ABSENT if run.plan is None else _decimal(run.plan.seconds, 2) for run in runs],
        ),
        ("tokens / s (median)", [_decimal(run.median("tokens_per_second"), 0) for run in runs]),
        ("peak memory", [_bytes(run.peak_memory_bytes) for run in runs]),
        (
            "peak memory (predicted)",
            [ABSENT if run.plan is None else _bytes(run.plan.peak_bytes) for run in runs],
        ),
        (
            "host memory (predicted)",
            [
                ABSENT
                if run.plan is None or not any(run.plan.host_bytes)
                else _bytes(sum(run.plan.host_bytes))
                for run in runs
            ],
        ),
        ("token rows kept (mean)", [f"{run.kept_share:.0%}" for run in runs]),
    ]
    return [row for row in rows if any(text != ABSENT for text in row[1])]


def _context(runs: Sequence[Run], sections: list[dict], before: Sequence[dict]) -> dict:
    names = [run.name for run in runs]
    evaluated = [*([before] if before else []), *(run.metrics for run in runs)]
    return {
        "title": " · ".join(run.name for run in runs),
        "names": names,
        "evaluated": [*(["before"] if before else []), *names],
        "summary": summary_table(runs),
        "tables": [
            {
                "title": "Exact answers, held-out prompts",
                "note": "Every token present, no elimination: answers of which each token is the "
                "most likely one, and the perplexity of their tokens.",
                "columns": ("exact", "perplexity"),
                "rows": _answers(evaluated),
            },
            {
                "title": "Held-out perplexity",
                "note": "Every token present, no elimination: over the whole window, and over its "
                "last quarter.",
                "columns": ("whole", "last quarter"),
                "rows": _perplexities(evaluated),
            },
        ],
        "plans": [_plan(run.name, run.plan) for run in runs if run.plan is not None],
        "sections": sections,
        "configs": [
            (run.name, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
            for run in runs
            if run.config
        ],
        "light": plots.LIGHT,
        "dark": plots.DARK,
    }


def _plan(name: str, plan: RecordedPlan) -> dict:
    """What each run of layers that are alike does, and what one of them stores."""
    rows, first = [], 0
    host = plan.host_bytes or [0] * len(plan.modes)
    for (mode, kept, moved), group in groupby(zip(plan.modes, plan.kept_bytes, host)):
        end = first + len(list(group))
        rows.append((layers_text(range(first, end)), action_text(mode, moved), _bytes(kept)))
        first = end
    return {"name": name, "limit": _bytes(plan.limit_bytes), "rows": rows}


def _perplexities(evaluated: Sequence[Sequence[dict]]) -> list[dict]:
    """Rows of held-out perplexity: kind, length, then (whole, last quarter) of each evaluation."""

    def cells(metric: dict) -> list[str]:
        return [_decimal(metric.get(field), 3) for field in ("perplexity", "tail_perplexity")]

    return _metrics_rows(evaluated, lambda metric: "exact" not in metric, cells)


def _answers(evaluated: Sequence[Sequence[dict]]) -> list[dict]:
    """Rows of held-out answers: kind, length, then (exact, perplexity) of each evaluation."""

    def cells(metric: dict) -> list[str]:
        exact = metric.get("exact")
        return [
            ABSENT if exact is None else f"{exact:.1%}",
            _decimal(metric.get("perplexity"), 3),
        ]

    return _metrics_rows(evaluated, lambda metric: "exact" in metric, cells)


def _metrics_rows(
    evaluated: Sequence[Sequence[dict]],
    wanted: Callable[[dict], bool],
    cells: Callable[[dict], list[str]],
) -> list[dict]:
    """The rows that are wanted, with cells of each evaluation: one for each kind and length, and
    where there are several, for each source."""

    def key(metric: dict) -> tuple[str, int, str]:
        source = str(metric.get("source", ""))
        return str(metric.get("kind")), int(metric.get("length", 0)), source

    found = [{key(m): m for m in metrics if wanted(m)} for metrics in evaluated]
    places = sorted({place for of in found for place in of})
    names = {source: Path(source).name for *_, source in places}
    if len(set(names.values())) < len(names):
        names = {source: source for source in names}
    return [
        {
            "kind": f"{kind} ({names[source]})" if len(names) > 1 and source else kind,
            "length": f"{length:,}",
            "cells": [cells(of.get((kind, length, source), {})) for of in found],
        }
        for kind, length, source in places
    ]


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
        if run.relevance is not None:
            found.append(_relevance(run.relevance, suffix, of_run))
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


def _relevance(found: RelevanceMap, suffix: str, of_run: str) -> Plot:
    """The picture of one prompt, with its questions and why blocks were kept for them."""

    def place(block: int) -> str:
        end = min((block + 1) * found.block_size, found.tokens)
        return f"{block * found.block_size:,} to {end - 1:,}"

    questions = [
        {
            "question": question.question,
            "answer": question.answer,
            "blocks": [
                {
                    "place": place(best.block),
                    "share": f"{best.score:.0%}",
                    "kept": best.block in found.kept,
                    "words": ", ".join(best.words) or ABSENT,
                }
                for best in question.blocks
            ],
        }
        for question in found.questions
    ]
    return Plot(
        f"relevance{suffix}",
        f"What the answers of one prompt need{of_run}",
        f"{found.tokens:,} tokens in {len(found.scores)} blocks of {found.block_size}. Bars: the "
        "largest share that a block has of the relevance to an answer. Shaded: the "
        f"{len(found.kept)} blocks that a training step keeps; those with answers always are.",
        _draw(plots.relevance, found),
        questions,
    )


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
    elimination = run.elimination
    if not elimination:
        return "dense LoRA"
    if elimination.get("layerwise", elimination).get("policy") == "threshold":
        return f"lemo, thresholds, {elimination.get('scorer')} scores"
    keep = elimination.get("keep")
    # Runs that did not write what was left open.
    kept = "" if keep is None else f"keep {keep}, "
    return f"lemo, {kept}{elimination.get('scorer')} scores"


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
