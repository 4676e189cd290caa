"""Runs of quality.py as Markdown tables: which may be compared, and how they compare."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from common.records import markdown_line

__all__ = ["protocol_of", "share_of", "table", "table_of"]

Rows = list[dict]


def protocol_of(row: dict) -> tuple:
    """What rows have in common that may be compared."""
    shape = row["shape"]
    return (
        shape["context"],
        row["protocol_steps"],
        shape["batch"],
        shape["learning_rate"],
        shape.get("copies", False),
        row["equal"],
    )


def share_of(rows: Rows, dense: Rows, kind: str) -> float | None:
    """Mean over runs of their perplexity as a share of dense LoRA's on the same windows.

    Windows and their order are a seed's; None where dense LoRA has not run on any.
    """
    base: dict[int, list[float]] = {}
    for row in dense:
        base.setdefault(row["seed"], []).append(row["perplexity"][kind])
    shares = [
        row["perplexity"][kind] / statistics.mean(base[row["seed"]])
        for row in rows
        if row["seed"] in base
    ]
    return statistics.mean(shares) if shares else None


def table(rows: Iterable[dict]) -> str:
    """A table for each protocol: means over seeds, perplexities also as shares of dense LoRA's."""
    groups: dict[tuple, dict[str, Rows]] = {}
    for row in rows:
        groups.setdefault(protocol_of(row), {}).setdefault(row["method"], []).append(row)
    for protocol, methods in groups.items():
        # At equal time the table begins with dense LoRA's own steps.
        same = groups.get((*protocol[:-1], "steps"), {})
        if "dense" in same:
            groups[protocol] = {"dense": same["dense"]} | methods
    return "\n\n".join(table_of(protocol, methods) for protocol, methods in groups.items())


def table_of(protocol: tuple, methods: dict[str, Rows]) -> str:
    """The table of one protocol, from the rows of each method."""
    kinds = list(next(iter(methods.values()))[0]["perplexity"])
    dense = methods.get("dense", [])
    context, steps, batch, rate, copies, equal = protocol
    whose = f"{steps} steps" if equal == "steps" else f"the time of {steps} steps of dense LoRA"
    timed = [row for rows in methods.values() for row in rows if "step_seconds" in row]
    # Times of runs that shared a GPU stand where no run had one alone, and with how many it was.
    fewest = min((row["runs_at_a_time"] for row in timed), default=1)

    def perplexity(rows: Rows, kind: str) -> str:
        share = share_of(rows, dense, kind)
        value = statistics.mean(row["perplexity"][kind] for row in rows)
        return f"{value:.3f}" + ("" if share is None else f" ({share:.4f})")

    lines = [
        [
            name + (f" ({len(rows)} runs)" if len(rows) > 1 else ""),
            f"{rows[0]['shape']['steps']}",
            _cell(rows, "kept_share", ".2f"),
            _times(rows, fewest),
            _cell(rows, "peak_memory_gib", ".1f"),
            *(perplexity(rows, kind) for kind in kinds),
            f"{statistics.mean(row['retrieval']['mean'] for row in rows):.1f}%",
        ]
        for name, rows in methods.items()
    ]
    head = ["steps", "kept", "s a step", "GiB", *kinds, "retrieval"]
    title = f"{context} tokens, {whose}, {batch} windows a step, learning rate {rate:g}"
    title += ", texts with copies in them" if copies else ""
    rule = "|---" + "|---:" * len(head) + "|"
    return "\n".join([title, "", f"| {markdown_line(head)}", rule, *map(markdown_line, lines)])


def _cell(rows: Rows, name: str, form: str) -> str:
    if name not in rows[0]:
        return ""
    return format(statistics.mean(row[name] for row in rows), form)


def _times(rows: Rows, at_a_time: int) -> str:
    """Seconds of a step of the runs that were so many at a time, for each kind of GPU."""
    times: dict[str, list[float]] = {}
    shared = f" shared by {at_a_time}" if at_a_time > 1 else ""
    for row in rows:
        if "step_seconds" in row and row["runs_at_a_time"] == at_a_time:
            gpu = (row["gpu"] or "CPU").removeprefix("NVIDIA ").split()[0] + shared
            times.setdefault(gpu, []).append(row["step_seconds"])
    return ", ".join(f"{statistics.mean(values):.3f} {gpu}" for gpu, values in times.items())
