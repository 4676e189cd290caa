"""Tables of the longest windows that trained, for docs/COMPARISON.md (`comparison_page.py`).

From the rows of benches "longest window" (`comparison_longest.py`) and "longest" (`longest.py`) in
benchmarks/results/memory.jsonl; of each setting the last row counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from common import records
from common.records import markdown
from comparison_longest import title_of
from contenders import CONTENDERS

__all__ = ["NOTHING", "RESULTS", "figures"]

RESULTS = records.RESULTS / "memory.jsonl"
NOTHING = "No longest window has been measured yet."
# Field of what was measured -> that of what was predicted, and what the column is called.
MEASURED = {
    "peak_gib": ("predicted_gib", "GPU, GiB, predicted / measured"),
    "host_gib": ("predicted_host_gib", "host, GiB"),
    "step_s": ("predicted_s", "step, s"),
}
# Of a longest window: how much longer one is that did not train.
NEAR = 1.06
# GiB of the host that are worth a word.
LEAST_PINNED = 1.0
# What ended a search before memory did.
BOUNDED = ("time", "most", "trials", "deadline")
# Cap and how weights are stored.
Column = tuple[float, str | None]


def figures(rows: Iterable[dict[str, Any]]) -> str:
    """Both tables."""
    kept = [row for row in rows if row["gpu"] is not None and not row.get("failed")]
    parts = []
    within = longest_within(kept)
    if within:
        parts += [
            "The longest window that trains within a cap of GPU memory, the seconds of its step, "
            "and the memory of the host that it pinned, from 1 GiB on; "
            f"{contexts(kept)} of the cap are the driver's and the context's. A peer's "
            "window is found by trials: one that is 3 to 6% longer ran out of memory. A + marks "
            "where the time of a step, or the number of trials, ended the search before. lemo's "
            "planned windows follow from predicted memory; a shorter one is tried only where that "
            "one does not train.",
            within,
        ]
    whole = whole_steps(kept)
    if whole:
        parts += ["Long contexts of lemo, each one whole step after a short one:", whole]
    return "\n\n".join(parts) or NOTHING


def contexts(rows: list[dict[str, Any]]) -> str:
    """GiB of a cap that are no tensors."""
    found = {row.get("context_gib", row["shape"].get("context")) for row in rows if is_within(row)}
    return " or ".join(f"{each:g} GiB" for each in sorted(found - {None})) or "what was measured"


def is_within(row: dict[str, Any]) -> bool:
    """Whether a row is a longest window, and not a chosen one."""
    return row["bench"] == "longest window" or row["shape"].get("share") is not None


def longest_within(rows: list[dict[str, Any]]) -> str:
    """Contenders by caps; empty where there is none."""
    cells: dict[str, dict[Column, str]] = {}
    order: list[str] = []
    for row in filter(is_within, rows):
        if row["bench"] == "longest window":
            name = title_of(row["contender"])
            column: Column = row["memory"], row["quantize"]
            tokens, is_bounded = row["tokens"], row.get("bounded_by") in BOUNDED
        else:
            shape = row["shape"]
            host = f", {row['host_gib']:.0f} GiB on the host" if shape["host_memory"] else ""
            name = f"lemo, keep {shape['keep']:g}, planned{host}"
            column = shape["memory"], shape["quantize"]
            tokens, is_bounded = shape["tokens"], False
        if tokens is None:
            continue
        order += [] if name in order else [name]
        bound = "+" if is_bounded and (row.get("too_long") or math.inf) > NEAR * tokens else ""
        pinned = row.get("pinned_gib") or 0.0
        host = f", host {pinned:.1f} GiB" if pinned >= LEAST_PINNED else ""
        cells.setdefault(name, {})[column] = f"{tokens}{bound} ({row['step_s']:.1f} s{host})"
    if not cells:
        return ""
    columns = sorted({column for of in cells.values() for column in of}, key=str_of)
    titles = [contender.title for contender in CONTENDERS.values()]
    places = {name: titles.index(name) if name in titles else len(titles) for name in order}
    lines = [
        [name, *(cells[name].get(column, "") for column in columns)]
        for name in sorted(order, key=lambda name: places[name])
    ]
    return markdown(["", *map(str_of, columns)], ["---", *["---:"] * len(columns)], lines)


def str_of(column: Column) -> str:
    """What a column is called."""
    memory, quantize = column
    return f"{memory:g} GiB, {quantize or 'bf16'}"


def whole_steps(rows: list[dict[str, Any]]) -> str:
    """Steps of chosen lengths, predicted and measured; empty where there is none."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        if is_within(row):
            continue
        shape = row["shape"]
        names = ("tokens", "keep", "memory", "host_memory", "quantize")
        found[tuple(shape[name] for name in names)] = [
            str(shape["tokens"]),
            f"{shape['keep']:g}",
            f"{shape['memory']:g}",
            *(
                f"{row[predicted]:.1f} / {row[what]:.1f}"
                for what, (predicted, _) in MEASURED.items()
            ),
            row["commit"],
        ]
    head = ["tokens", "keep", "cap, GiB", *(title for _, title in MEASURED.values()), "commit"]
    return markdown(head, ["---:"] * len(head), found.values()) if found else ""
