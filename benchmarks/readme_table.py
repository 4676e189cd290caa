"""Write the figures of README.md from benchmarks/results: `python benchmarks/readme_table.py`.

Rows: quantities of the main job, and methods of fine-tuning steps on a GPU; columns: methods, and
time and memory. The blocks between the markers are replaced; a test checks that they are up to
date. Takes a second.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import records
from common.records import markdown

RESULTS = records.RESULTS / "cpu.jsonl"
GPU_RESULTS = records.RESULTS / "h200_finetune.jsonl"
README = records.REPOSITORY / "README.md"
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
GPU_BENCHES = ("finetune step", "finetune peak memory")
PEERS = {
    "lora": "Transformers + PEFT, nothing recomputed",
    "gc": "Transformers + PEFT, checkpointing",
    "sac": "Transformers + PEFT, selective checkpointing",
    "liger": "Liger kernels, checkpointing",
    "liger-tiled": "Liger kernels, tiled MLP, checkpointing",
    "s2": "LongLoRA's S2-Attn, checkpointing",
    "checkpointing": "Transformers + PEFT, checkpointing",
}
PARTS = {"whole": "whole window", "tail": "last quarter"}


def main_job_table(results: Path) -> str:
    """The latest measurement of the main job as Markdown, from a file of JSON lines."""
    found = records.read(results, "main_job.")
    if not found:
        return "The main job has not been recorded yet."
    latest = found[-1]
    by_keep: dict[float, dict[str, dict]] = {}
    for record in found:
        if _setting(record) == _setting(latest):
            by_keep.setdefault(record["shape"]["keep"], {})[record["bench"]] = record
    shape, keeps = latest["shape"], sorted(by_keep)
    rows = []
    # Each column is paired with a peer of its own run; the dense column shows the first one.
    for bench, peer in by_keep[keeps[0]].items():
        digits = 3 if peer["unit"] == "perplexity" else 2
        ours = [by_keep[keep][bench] for keep in keeps]
        cells = [f"{_value(each, 'ours')} ({each['ratio']:.{digits}f}x)" for each in ours]
        before = f"{peer['before']:.2f}" if "before" in peer else ""
        rows.append([_label(bench), before, _value(peer, "peer_value"), *cells])
    head = ["", "before", "dense LoRA", *(f"lemo, keep {keep:g}" for keep in keeps)]
    table = markdown(head, ["---", *["---:"] * (len(head) - 1)], rows)
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
    found = [
        record
        for record in records.read(results)
        if record["bench"] in GPU_BENCHES and record["shape"].get("products", "dtype") == "dtype"
    ]
    if not found:
        return "No fine-tuning step has been recorded yet."
    commits = {record["shape"]["tokens"]: record["commit"] for record in found}
    # (tokens, method) -> quantity -> value; a peer stands in several lines of the same run.
    methods: dict[tuple[int, str], dict[str, float]] = {}
    measured: dict[tuple[int, str], str] = {}
    for record in found:
        tokens = record["shape"]["tokens"]
        if record["commit"] != commits[tokens]:
            continue
        values = {_variant(record["shape"]): record["ours"]}
        if record["peer"] is not None:
            values[PEERS.get(record["peer"], record["peer"])] = record["peer_value"]
        card = record["gpu"].removeprefix("NVIDIA ")
        for method, value in values.items():
            methods.setdefault((tokens, method), {})[record["bench"]] = value
            measured[tokens, method] = f"{record['date']}, {record['commit']}, {card}"
    rows = []
    # By length, and of each the peers first.
    for key in sorted(methods, key=lambda key: (key[0], key[1].startswith("lemo"))):
        step, memory = (methods[key][bench] for bench in GPU_BENCHES)
        rows.append([f"{key[0]}", key[1], f"{step / 1e3:.2f}", f"{memory:.1f}", measured[key]])
    head = ["tokens", "method and settings", "step, s", "peak memory, GiB", "measured"]
    table = markdown(head, ["---:", "---", "---:", "---:", "---"], rows)
    versions = ", ".join(sorted({r["torch"] for r in found if r["commit"] in commits.values()}))
    return (
        f"{table}\n\n"
        "The Llama-3-8B shape, bf16 (weights 15.0 GiB), LoRA rank 8 on q, k, v and o, batch 1; "
        f"torch {versions}. Random weights: time and memory only. Keep 0.5: every layer works on "
        "half of the blocks; keep 1 computes what dense LoRA computes. Beyond 131072 tokens one "
        "step was measured, and no other method was tried."
    )


def _variant(shape: dict) -> str:
    """A method of lemo with every setting that is not its default."""
    parts = [f"keep {shape['keep']:g}"]
    if shape["keep"] < 1:
        size, scorer = shape.get("block_size", 64), shape["scorer"]
        share = {0.25: "quarters"}.get(size, f"shares of {size:g}")
        blocks = share if isinstance(size, float) else f"blocks of {size} tokens"
        chosen = {"random": "drawn at random"}.get(scorer, f"chosen by scorer {scorer}")
        parts.append(f"{blocks} {chosen}")
    kept = {"none": "nothing recomputed", "layer": "layers recomputed"}
    parts.append(kept.get(shape["recompute"], "all but attention recomputed"))
    if shape.get("visible_keys") == "computed":
        parts.append("the other tokens computed forward")
    if shape.get("loss") == "outside":
        parts.append("loss outside the model")
    return "lemo: " + ", ".join(parts)


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
