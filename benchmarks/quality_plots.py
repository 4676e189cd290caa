"""Table and plots of docs/QUALITY.md: ``python benchmarks/quality_plots.py``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from quality import table
from readme_table import replace_block

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results/quality.jsonl"
PAGE = REPOSITORY / "docs/QUALITY.md"
IMAGES = REPOSITORY / "docs/images"
PARTS = {"book": "books", "book_tail": "books, last quarter", "tex": "TeX"} | {
    "tex_tail": "TeX, last quarter"
}
COLORS = dict(zip(PARTS, ("tab:blue", "lightskyblue", "tab:orange", "navajowhite")))
TARGET = 1.01
SHOWN = ("dense", "s2", "spans-0.5", "long-spans-0.5", "spans-0.3")


def shares(rows: list[dict], dense: dict) -> dict[str, float]:
    """Mean perplexity of `rows` by part, as a share of dense LoRA's."""
    return {
        part: sum(row["perplexity"][part] for row in rows) / len(rows) / dense["perplexity"][part]
        for part in PARTS
    }


def of_protocol(rows: list[dict], context: int, steps: int, rate: float) -> list[dict]:
    return [
        row
        for row in rows
        if (row["shape"]["context"], row["protocol_steps"]) == (context, steps)
        and row["shape"]["learning_rate"] == rate
    ]


def block_size_plot(rows: list[dict], path: Path) -> None:
    """Perplexity against the length of the spans, half of the tokens in every layer."""
    rows = of_protocol(rows, 16384, 100, 1e-3)
    dense = next(row for row in rows if row["method"] == "dense")
    sizes: dict[int, list[dict]] = {}
    for row in rows:
        elimination = row["settings"].get("elimination") or {}
        plain = {"keep": 0.5, "dense_layers": [], "scorer": "random"} | {
            "keep_first": 0,
            "keep_last": 0,
        }
        others = {
            key: value for key, value in elimination.items() if key not in ("block_size", "seed")
        }
        if others == plain and "settings" not in row["settings"]:
            sizes.setdefault(elimination.get("block_size", 64), []).append(row)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for part, label in PARTS.items():
        values = [shares(sizes[size], dense)[part] for size in sorted(sizes)]
        axes.plot(sorted(sizes), values, "o-", color=COLORS[part], label=label)
    axes.axhline(TARGET, color="gray", linestyle=":", label="target, 1.01")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(sizes), [f"{size}" for size in sorted(sizes)])
    axes.set_xlabel("tokens of a block")
    axes.set_ylabel("perplexity, share of dense LoRA's")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def methods_plot(rows: list[dict], path: Path) -> None:
    """Methods at equal steps and in equal time, a panel for each comparison that has been made."""
    panels: dict[tuple, dict[str, list[dict]]] = {}
    for protocol in compared_protocols(rows):
        for row in of_protocol(rows, *protocol):
            if row["method"] != "dense":
                panel = panels.setdefault((*protocol, row["equal"]), {})
                panel.setdefault(row["method"], []).append(row)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for (*protocol, equal), place in zip(panels, axes.flat):
        context, steps, _ = protocol
        methods = panels[(*protocol, equal)]
        dense = next(row for row in of_protocol(rows, *protocol) if row["method"] == "dense")
        for i, part in enumerate(PARTS):
            places = [number + (i - 1.5) * 0.2 for number in range(len(methods))]
            values = [100 * (shares(runs, dense)[part] - 1) for runs in methods.values()]
            place.bar(places, values, 0.2, color=COLORS[part], label=PARTS[part])
        place.axhline(0, color="black", linewidth=0.8)
        if equal == "steps":
            place.axhline(100 * (TARGET - 1), color="gray", linestyle=":")
        place.set_xticks(range(len(methods)), list(methods), fontsize="small")
        place.set_ylabel("perplexity over dense LoRA's, %")
        whose = f"{steps} steps" if equal == "steps" else f"the time of {steps} dense steps"
        place.set_title(f"{context} tokens, {whose}", fontsize="medium")
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compared_protocols(rows: list[dict]) -> list[tuple[int, int, float]]:
    """Context, steps and learning rate of the comparisons that the page shows."""
    return sorted(
        {
            (row["shape"]["context"], row["protocol_steps"], row["shape"]["learning_rate"])
            for row in rows
            if row["method"] in SHOWN and row["method"] not in ("dense", "s2")
        }
    )


def updated(text: str, rows: list[dict]) -> str:
    """The page with the tables of the recorded results."""
    compared = [row for each in compared_protocols(rows) for row in of_protocol(rows, *each)]
    return replace_block(text, "\n" + table(compared) + "\n", "quality")


def read_rows() -> list[dict]:
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    others = len(SHOWN)
    return sorted(
        rows, key=lambda row: SHOWN.index(row["method"]) if row["method"] in SHOWN else others
    )


def main() -> None:
    rows = read_rows()
    IMAGES.mkdir(exist_ok=True)
    block_size_plot(rows, IMAGES / "quality_block_size.png")
    methods_plot(rows, IMAGES / "quality_methods.png")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
