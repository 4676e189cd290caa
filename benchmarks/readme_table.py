"""Write the figures of README.md from benchmarks/results: ``python benchmarks/readme_table.py``.

The blocks between the markers are replaced; a test checks that they are up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results/cpu.jsonl"
GPU_RESULTS = REPOSITORY / "benchmarks/results/h200_finetune.jsonl"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
GPU_BENCHES = ("finetune step", "finetune peak memory")
PEERS = {
    "lora": "Transformers + PEFT, nothing recomputed",
    "gc": "Transformers + PEFT, checkpointing",
    "sac": "Transformers + PEFT, selective checkpointing",
    "liger": "Liger kernels, checkpointing",
    "s2": "LongLoRA's S2-Attn, checkpointing",
    "checkpointing": "Transformers + PEFT, checkpointing",
}
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
    dtype = "the model's dtype" if latest["dtype"] == "model" else latest["dtype"]
    return (
        f"{table}\n\n"
        f"{shape['steps']} steps of {shape['batch']} x {shape['context']} tokens, LoRA rank "
        f"{shape['lora_rank']} on every linear layer; lemo with {elimination or 'its defaults'}; "
        f"{latest['cpu']}, {latest['threads']} threads, {dtype}, torch {latest['torch']}, "
        f"{latest['date']}, commit {latest['commit']}. Dense LoRA is plain Transformers + PEFT "
        "with scaled dot-product attention. Perplexity is of held-out documents, every token "
        "present."
    )


def gpu_table(results: Path) -> str:
    """Fine-tuning steps on a GPU as Markdown: of each length those of the latest commit."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    records = [record for record in map(json.loads, lines) if record["bench"] in GPU_BENCHES]
    if not records:
        return "No fine-tuning step has been recorded yet."
    latest = records[-1]
    commits = {record["shape"]["tokens"]: record["commit"] for record in records}
    # (tokens, method) -> quantity -> value; a peer stands in several lines of the same run.
    methods: dict[tuple[int, str], dict[str, float]] = {}
    for record in records:
        shape, quantity = record["shape"], record["bench"]
        if record["commit"] == commits[shape["tokens"]]:
            peer = PEERS.get(record["peer"], record["peer"])
            methods.setdefault((shape["tokens"], peer), {})[quantity] = record["peer_value"]
            methods.setdefault((shape["tokens"], _variant(shape)), {})[quantity] = record["ours"]
    table = ["| tokens | method | step, s | peak memory, GiB |", "| ---: | --- | ---: | ---: |"]
    for (tokens, method), values in sorted(methods.items(), key=_by_length_then_peers_first):
        step, memory = (values[bench] for bench in GPU_BENCHES)
        table.append(f"| {tokens} | {method} | {step / 1e3:.2f} | {memory:.1f} |")
    measured = ", ".join(f"{tokens}: {commit}" for tokens, commit in sorted(commits.items()))
    return "\n".join(table) + (
        "\n\nThe Llama-3-8B shape, bf16 (weights 15.0 GiB), LoRA rank 8 on q, k, v and o, batch 1; "
        f"{latest['gpu']}, torch {latest['torch']}, {latest['date']} (tokens: commit: {measured}). "
        "Random weights: time and memory only. With keep 0.5 every layer leaves out half of the "
        "blocks; keep 1 computes what dense LoRA computes."
    )


def _variant(shape: dict) -> str:
    scorer = "" if shape["scorer"] == "pooled" else f", scorer {shape['scorer']}"
    if shape.get("visible_keys") == "computed":
        scorer = ", the other tokens computed forward"
    kept = {"none": "nothing recomputed", "layer": "layers recomputed"}
    recompute = kept.get(shape["recompute"], "all but attention recomputed")
    return f"lemo, keep {shape['keep']:g}, {recompute}{scorer}"


def _by_length_then_peers_first(item: tuple[tuple[int, str], dict]) -> tuple[int, bool]:
    tokens, method = item[0]
    return tokens, method.startswith("lemo")


def replace_block(text: str, block: str, name: str = "figures") -> str:
    """``text`` with ``block`` between the markers; ValueError where a marker is missing."""
    begin_mark, end_mark = BEGIN.format(name), END.format(name)
    before, begin, rest = text.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"README.md: expected the markers {begin_mark} and {end_mark}")
    return f"{before}{begin_mark}\n{block}\n{end_mark}{after}"


def updated(text: str) -> str:
    """README with the tables of the recorded results."""
    text = replace_block(text, main_job_table(RESULTS))
    return replace_block(text, gpu_table(GPU_RESULTS), "GPU figures")


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
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
