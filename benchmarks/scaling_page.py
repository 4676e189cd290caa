"""Writes the tables and the figure of docs/MULTI_GPU.md: what was measured, and what is computed.

    python benchmarks/scaling_page.py

Measured are the latest rows of benchmarks/results/multi_gpu.jsonl. Computed are the settings of
scaling.py by `lemo.planner`, with its nominal rates of an H200. Takes a few seconds, on the CPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any
from xml.sax.saxutils import escape

import scaling
from common import records
from common.models import LLAMA_3_8B
from readme_table import replace_block
from scaling import COUNTS, GIB, NAMES, SETTINGS, Setting

PAGE = records.REPOSITORY / "docs/MULTI_GPU.md"
FIGURE = records.REPOSITORY / "docs/figures/scaling.svg"
RESULTS = records.RESULTS / "multi_gpu.jsonl"
WORDS = {
    "data": "data parallelism",
    "fsdp": "sharded weights",
    "context": "context parallelism",
}
# Of the figure: settings, colours.
SHOWN = {
    ("Llama-3-8B", 131072, 1.0, "layer"): "#1f77b4",
    ("Llama-3-8B", 131072, 0.5, "layer"): "#2ca02c",
    ("Llama-3-8B", 1048576, 1.0, "auto"): "#7b3294",
    ("Llama-3-8B", 1048576, 0.5, "auto"): "#d95f02",
    ("Llama-3-8B", 1048576, 0.25, "auto"): "#c2a000",
}
TEXT, LINE, GRID = "#1f2933", "#52606d", "#e4e7eb"

Key = tuple[str, str, int, float, str]


def key_of(row: Mapping[str, Any]) -> Key:
    return row["bench"], row["shape"], row["tokens"], row["keep"], row["recompute"]


def measured(rows: Iterable[Mapping[str, Any]]) -> dict[Key, dict[int, dict[str, Any]]]:
    """By setting and number of GPUs, the latest rows; those of one GPU alone, too."""
    found: dict[Key, dict[int, dict[str, Any]]] = {}
    for row in rows:
        # Other ways than those that lemo takes by itself are not a part of the table.
        if row["bench"] not in WORDS or row.get("max_ctas") or row.get("head_groups", 4) != 4:
            continue
        if row["layers"] != scaling_layers(row) or row["shrink"] != 1:
            continue
        of_setting = found.setdefault(key_of(row), {})
        if row["gpus"] > 1 and row["one_gpu_s"] is not None:
            names = {"one_gpu_s": "step_s", "one_gpu_gib": "peak_gib", "one_gpu_loss": "loss"}
            one = {new: row[old] for old, new in names.items()}
            of_setting[1] = {**row, "gpus": 1, **one}
        of_setting[row["gpus"]] = dict(row)
    return {key: dict(sorted(group.items())) for key, group in sorted(found.items())}


def scaling_layers(row: Mapping[str, Any]) -> int:
    """Layers of the whole model."""
    return 36 if row["shape"] == "Qwen3-8B" else 32


def measured_table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = []
    for key, group in measured(rows).items():
        bench, shape, tokens, keep, recompute = key
        least, most = group[min(group)], group[max(group)]
        peaks = [group[count]["peak_gib"] for count in (min(group), max(group))]
        lines.append(
            [
                WORDS[bench],
                shape,
                str(tokens),
                f"{keep:g}",
                recompute,
                *(f"{group[count]['step_s']:.3f}" if count in group else "" for count in COUNTS),
                " to ".join("?" if peak is None else f"{peak:.1f}" for peak in peaks),
                "" if least is most else f"{scaling.efficiency(most, least):.3f}",
            ]
        )
    head = ["", "shape", "tokens", "keep", "recompute", *(f"{count} GPU, s" for count in COUNTS)]
    rule = ["---", "---", "---:", "---:", "---", *["---:"] * (len(COUNTS) + 2)]
    return records.markdown([*head, "memory, GiB", "efficiency"], rule, lines)


def computing() -> argparse.Namespace:
    """Options of scaling.py for a whole model on H200s."""
    return argparse.Namespace(shorten=1, shrink=1, layers=None, device="cuda", memory=None)


def received(setting: Setting, gpus: int, plan: Any) -> float:
    """Bytes that a GPU receives from the others in a step."""
    from common.models import config_of_shape
    from lemo.planner.shape import Adapters, shape_of, weight_bytes

    shape = shape_of(config_of_shape(setting.shape, setting.tokens))
    adapters = 2 * Adapters(scaling.RANK, frozenset(scaling.TARGETS)).parameters(shape)
    share = (gpus - 1) / gpus
    # All-reduce: everything comes once to be summed, and once as a sum.
    total = 2 * share * adapters
    if setting.bench == "fsdp":
        return total / 2 + 2 * share * weight_bytes(shape, 2)
    if setting.bench == "context":
        rows = setting.tokens * setting.keep
        gathers = sum(4 if mode == "layer" else 3 for mode in plan.modes)
        total += gathers * share * rows * 2 * shape.keys * 2
    return total


def computed_table() -> str:
    options, lines = computing(), []
    for setting in SETTINGS:
        plans = {count: scaling.plan_of(setting, count, options) for count in COUNTS}
        there = {count: plan for count, plan in plans.items() if plan is not None}
        bytes_ = (
            f"{received(setting, count, plans[count]) / GIB:.2g}" if count in there else ""
            for count in (2, 8)
        )
        lines.append(
            [
                WORDS[setting.bench],
                NAMES[setting.shape],
                str(setting.tokens),
                f"{setting.keep:g}",
                setting.recompute,
                *(f"{plan.seconds:.3g}" if plan else "does not fit" for plan in plans.values()),
                f"{there[min(there)].peak / GIB:.0f} to {there[max(there)].peak / GIB:.0f}",
                *bytes_,
            ]
        )
    head = ["", "shape", "tokens", "keep", "recompute", *(f"{count} GPU, s" for count in COUNTS)]
    head += ["memory, GiB", "received of 2, GiB", "of 8"]
    rule = ["---", "---", "---:", "---:", "---", *["---:"] * (len(COUNTS) + 3)]
    return records.markdown(head, rule, lines)


# Shapes by name, and the windows that are asked about.
ASKED = {
    "Llama-3-8B": (
        {**LLAMA_3_8B, "num_hidden_layers": 32},
        ((32768, 0.5), (131072, 0.5), (131072, 1.0), (524288, 0.5), (1048576, 0.5), (1048576, 1.0)),
    ),
    "Llama-3-70B": (
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
        },
        ((32768, 0.5), (131072, 0.5), (262144, 0.25)),
    ),
}


def combination_table() -> str:
    """What `lemo plan --gpus` puts first."""
    from transformers import LlamaConfig

    import lemo
    from lemo.planner.combinations import combinations
    from lemo.planner.plan import NOMINAL
    from lemo.planner.request import Request
    from lemo.planner.shape import Adapters, shape_of

    limit, lines = round((139 - scaling.RESERVED) * GIB), []
    for name, (sizes, windows) in ASKED.items():
        shape = shape_of(LlamaConfig(**sizes, tie_word_embeddings=False))
        for tokens, keep in windows:
            elimination = lemo.LemoConfig(keep=keep).resolved(answers=False)
            request = Request(shape, Adapters(), elimination, NOMINAL)
            cells = []
            for count in COUNTS:
                best = combinations(request, tokens, count, limit)[0]
                if best.plan is None:
                    cells.append("does not fit")
                    continue
                shards = ", shard" if best.shards > 1 else ""
                way = f"{best.groups} x {best.size}{shards}"
                cells.append(f"{way}: {best.plan.seconds:.3g} s, {best.rate / 1e3:.3g}K")
            lines.append([name, str(tokens), f"{keep:g}", *cells])
    head = ["shape", "tokens", "keep", *(f"{count} GPU" for count in COUNTS)]
    return records.markdown(head, ["---", "---:", "---:", *["---"] * len(COUNTS)], lines)


# --- the figure

LEFT, TOP, WIDTH, HEIGHT = 70, 50, 420, 330
LEAST, MOST = 1.0, 1000.0


def place(gpus: float, seconds: float) -> tuple[float, float]:
    """Both axes are logarithmic."""
    x = LEFT + WIDTH * math.log2(gpus) / math.log2(COUNTS[-1])
    share = (math.log10(seconds) - math.log10(LEAST)) / (math.log10(MOST) - math.log10(LEAST))
    return round(x, 1), round(TOP + HEIGHT * (1 - share), 1)


def figure(rows: Iterable[Mapping[str, Any]]) -> str:
    """Seconds of a step by the number of GPUs: computed ones as lines, measured ones as dots."""
    title = "Seconds of a step of the Llama-3-8B shape by the number of GPUs"
    style = "font-family='Helvetica, Arial, sans-serif' font-size='13'"
    width, height = LEFT + WIDTH + 210, TOP + HEIGHT + 60
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}' role='img' {style}>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]

    def text(x: float, y: float, line: str, anchor: str = "start", fill: str = TEXT) -> None:
        parts.append(f"<text x='{x}' y='{y}' text-anchor='{anchor}' fill='{fill}'>{line}</text>")

    def line(points: list[tuple[float, float]], colour: str, dashed: bool = False) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        more = " stroke-dasharray='5 4'" if dashed else ""
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.6'{more}/>"
        )

    for seconds in (1, 10, 100, 1000):
        line([place(1, seconds), place(COUNTS[-1], seconds)], GRID)
        text(LEFT - 8, place(1, seconds)[1] + 4, f"{seconds} s", "end")
    for gpus in COUNTS:
        line([place(gpus, LEAST), place(gpus, MOST)], GRID)
        text(place(gpus, LEAST)[0], TOP + HEIGHT + 20, str(gpus), "middle")
    text(LEFT + WIDTH / 2, TOP + HEIGHT + 42, "GPUs", "middle")
    text(LEFT, 24, "A step with context parallelism: lines computed, dots measured")
    found, options = measured(rows), computing()
    for (shape, tokens, keep, recompute), colour in SHOWN.items():
        [setting] = [
            each
            for each in SETTINGS
            if each.bench == "context"
            and (NAMES[each.shape], each.tokens, each.keep, each.recompute)
            == (shape, tokens, keep, recompute)
        ]
        plans = {count: scaling.plan_of(setting, count, options) for count in COUNTS}
        points = [place(count, plan.seconds) for count, plan in plans.items() if plan is not None]
        line(points, colour, dashed=True)
        if len(points) == 1:
            x, y = points[0]
            line([(x - 6, y), (x + 6, y)], colour)
        label = f"{tokens // 1024}K tokens, keep {keep:g}"
        text(points[-1][0] + 12, points[-1][1] + 4, label, fill=colour)
        for gpus, row in found.get(("context", shape, tokens, keep, recompute), {}).items():
            x, y = place(gpus, row["step_s"])
            parts.append(f"<circle cx='{x}' cy='{y}' r='4' fill='{colour}'/>")
    line([place(1, LEAST), place(COUNTS[-1], LEAST)], LINE)
    line([place(1, LEAST), place(1, MOST)], LINE)
    return "\n".join([*parts, "</svg>", ""])


def updated(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with what is recorded and what is computed."""
    text = replace_block(text, measured_table(rows), "measured on several GPUs")
    text = replace_block(text, computed_table(), "computed for several GPUs")
    return replace_block(text, combination_table(), "combinations of several GPUs")


def main() -> None:
    rows = records.read(RESULTS)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    FIGURE.write_text(figure(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
