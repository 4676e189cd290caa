"""Write the tables and plots of docs/QUALITY.md: `python benchmarks/quality_page.py`.

Shown are the rows of benchmarks/results/quality.jsonl whose method is in `SHOWN`
and whose protocol is in `PROTOCOLS`. Takes a few seconds.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from common import records
from quality_table import protocol_of, share_of, table_of
from readme_table import replace_block

PAGE = records.REPOSITORY / "docs/QUALITY.md"
IMAGES = records.REPOSITORY / "docs/images"
PARTS = {"book": "books", "book_tail": "books, last quarter", "tex": "TeX"} | {
    "tex_tail": "TeX, last quarter"
}
COLORS = dict(zip(PARTS, ("tab:blue", "lightskyblue", "tab:orange", "navajowhite")))
TARGET = 1.01
# What the page shows: methods, and (context, steps, windows a step, learning rate, copies, equal).
SHOWN = {
    "dense": "black",
    "s2": "tab:red",
    "tail-0.5": "tab:blue",
    "spans-0.5": "tab:cyan",
    "tail-0.3": "tab:green",
    "burn-0.3": "yellowgreen",
    "twice-0.5": "navy",
    "twice-0.3": "darkgreen",
    "computed-0.5": "tab:purple",
    "computed8-0.5": "mediumorchid",
    "computed-0.3": "tab:orange",
    "computed16-0.3": "sandybrown",
    "even16-0.3": "saddlebrown",
    "paper": "gray",
    "drop4096": "steelblue",
}
PROTOCOLS = (
    (16384, 160, 8, 2e-3, False, "steps"),
    (32768, 160, 4, 2e-3, False, "steps"),
    (16384, 160, 8, 2e-3, False, "time"),
    (32768, 100, 4, 2e-3, False, "steps"),
    (32768, 100, 4, 2e-3, False, "time"),
    (65536, 100, 2, 2e-3, False, "steps"),
    (16384, 100, 8, 1e-3, False, "steps"),
    (16384, 400, 8, 4e-3, True, "steps"),
    (16384, 400, 8, 4e-3, True, "time"),
)


def block_size_plot(rows: list[dict], path: Path) -> None:
    """Perplexity against the length of the spans, half of the tokens in every layer."""
    rows = [row for row in rows if protocol_of(row) == (16384, 100, 8, 1e-3, False, "steps")]
    dense = next(row for row in rows if row["method"] == "dense")
    ends = {"keep_first": 0, "keep_last": 0}
    plain = {"keep": 0.5, "dense_layers": [], "scorer": "random"} | ends
    sizes: dict[int, list[dict]] = {}
    for row in rows:
        elimination = dict(row["settings"].get("elimination") or {})
        size = elimination.pop("block_size", 64)
        elimination.pop("seed", None)
        if elimination == plain and "settings" not in row["settings"]:
            sizes.setdefault(size, []).append(row)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for part, label in PARTS.items():
        values = [share_of(sizes[size], [dense], part) for size in sorted(sizes)]
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
    """Methods at equal steps, a panel for each length."""
    protocols = [each for each in PROTOCOLS if each[1] == 160 and each[-1] == "steps"]
    figure, axes = pyplot.subplots(
        1, len(protocols), figsize=(5.2 * len(protocols), 3.8), layout="constrained"
    )
    for protocol, place in zip(protocols, axes):
        methods = _methods(rows, protocol)
        dense = methods.pop("dense")
        for i, part in enumerate(PARTS):
            places = [number + (i - 1.5) * 0.2 for number in range(len(methods))]
            values = [100 * (share_of(runs, dense, part) - 1) for runs in methods.values()]
            place.bar(places, values, 0.2, color=COLORS[part], label=PARTS[part])
        place.axhline(0, color="black", linewidth=0.8)
        place.axhline(100 * (TARGET - 1), color="gray", linestyle=":")
        # S2-Attn is far out.
        place.set_ylim(-3, 10)
        place.set_xticks(
            range(len(methods)), list(methods), fontsize="small", rotation=30, ha="right"
        )
        place.set_ylabel("perplexity over dense LoRA's, %")
        place.set_title(f"{protocol[0]} tokens, {protocol[1]} steps", fontsize="medium")
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def time_plot(rows: list[dict], path: Path) -> None:
    """Perplexity of the last quarter against the time of training: every run that was alone."""
    figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 6.4), layout="constrained")
    for context, line in zip((16384, 32768), axes):
        for part, place in zip(("book_tail", "tex_tail"), line):
            for name, color in SHOWN.items():
                runs = [
                    row
                    for row in rows
                    if (row["method"], row["runs_at_a_time"]) == (name, 1)
                    and row["shape"]["context"] == context
                    and row["shape"]["learning_rate"] == 2e-3
                ]
                for gpu, marker in (("H100", "s"), ("H200", "o")):
                    points = [row for row in runs if gpu in row["gpu"]]
                    if points:
                        x = [row["training_seconds"] for row in points]
                        y = [row["perplexity"][part] for row in points]
                        place.plot(x, y, marker, color=color, label=f"{name}, {gpu}")
            # S2-Attn ends far above.
            place.set_ylim(top=1.3 * place.dataLim.ymin)
            place.set_xlabel("seconds of training")
            place.set_ylabel("perplexity")
            place.set_title(f"{context} tokens: {PARTS[part]}", fontsize="medium")
    shown = {
        label: line
        for place in axes.flat
        for line, label in zip(*place.get_legend_handles_labels())
    }
    figure.legend(shown.values(), shown, loc="outside lower center", fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _methods(rows: list[dict], protocol: tuple) -> dict[str, list[dict]]:
    methods: dict[str, list[dict]] = {name: [] for name in SHOWN}
    for row in rows:
        if row["method"] in SHOWN and protocol_of(row) == protocol:
            methods[row["method"]].append(row)
    return {name: runs for name, runs in methods.items() if runs}


def updated(text: str, rows: list[dict]) -> str:
    """The page with the tables of the recorded results."""
    tables = []
    for protocol in PROTOCOLS:
        # At equal time the table begins with dense LoRA's own steps.
        dense = _methods(rows, (*protocol[:-1], "steps"))["dense"]
        tables.append(table_of(protocol, {"dense": dense} | _methods(rows, protocol)))
    return replace_block(text, "\n" + "\n\n".join(tables) + "\n", "quality")


def read_rows() -> list[dict]:
    return records.read(records.RESULTS / "quality.jsonl")


def main() -> None:
    rows = read_rows()
    IMAGES.mkdir(exist_ok=True)
    block_size_plot(rows, IMAGES / "quality_block_size.png")
    methods_plot(rows, IMAGES / "quality_methods.png")
    time_plot(rows, IMAGES / "quality_time.png")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
