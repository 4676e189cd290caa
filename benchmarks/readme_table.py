"""Write the figures of README.md from benchmarks/results: ``python benchmarks/readme_table.py``.

The block between the two markers is replaced; a test checks that it is up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results/cpu.jsonl"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PARTS = {"whole": "whole window", "tail": "last quarter"}


def main_job_table(results: Path) -> str:
    """The latest measurement of the main job as Markdown, from a file of JSON lines."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    records = [
        record for record in map(json.loads, lines) if record["bench"].startswith("main_job.")
    ]
    if not records:
        return "The main job has not been recorded yet."
    latest = records[-1]
    by_keep: dict[float, dict[str, dict]] = {}
    for record in records:
        if _setting(record) == _setting(latest):
            by_keep.setdefault(record["shape"]["keep"], {})[record["bench"]] = record
    shape = latest["shape"]
    columns = [by_keep[keep] for keep in sorted(by_keep)]
    rows = [
        ["", "before", "dense LoRA", *(f"lemo, keep {keep:g}" for keep in sorted(by_keep))],
        ["---", *["---:"] * (2 + len(columns))],
    ]
    # Each column is paired with a peer of its own run; the dense column shows the first one.
    for bench in columns[0]:
        peer = columns[0][bench]
        digits = 3 if peer["unit"] == "perplexity" else 2
        cells = [
            f"{_value(column[bench], 'ours')} ({column[bench]['ratio']:.{digits}f}x)"
            for column in columns
        ]
        before = f"{peer['before']:.2f}" if "before" in peer else ""
        rows.append([_label(bench), before, _value(peer, "peer_value"), *cells])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    elimination = ", ".join(
        f"`{name}={value!r}`"
        for name, value in shape.items()
        if name not in ("model", "context", "batch", "steps", "lora_rank", "keep")
    )
    return (
        f"{table}\n\n"
        f"{shape['steps']} steps of {shape['batch']} x {shape['context']} tokens, LoRA rank "
        f"{shape['lora_rank']} on every linear layer; lemo with {elimination}; "
        f"{latest['cpu']}, {latest['threads']} threads, torch {latest['torch']}, "
        f"{latest['date']}, commit {latest['commit']}. Dense LoRA is plain Transformers + PEFT "
        "with scaled dot-product attention. Perplexity is of held-out documents, every token "
        "present."
    )


def replace_block(text: str, block: str) -> str:
    """``text`` with ``block`` between the markers; ValueError where a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def _setting(record: dict) -> tuple:
    shape = {name: value for name, value in record["shape"].items() if name != "keep"}
    return json.dumps(shape, sort_keys=True), record["cpu"], record["threads"], record["commit"]


def _label(bench: str) -> str:
    quantity, *rest = bench.removeprefix("main_job.").split(".")
    if quantity == "perplexity":
        kind, part = rest
        return f"perplexity, {kind}, {PARTS[part]}"
    return {"step": "seconds a step", "memory": "memory above the weights, MiB"}[quantity]


def _value(record: dict, field: str) -> str:
    if record["unit"] == "bytes":
        return f"{record[field] / 2**20:.0f}"
    return f"{record[field]:.2f}"


if __name__ == "__main__":
    README.write_text(
        replace_block(README.read_text(encoding="utf-8"), main_job_table(RESULTS)), encoding="utf-8"
    )
