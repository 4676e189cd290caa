"""Time and memory of steps with shifted groups on the kept rows, beside the same without groups.

    python benchmarks/sparsity.py [--tokens 32768 65536 131072] [--keep 0.5 0.25]

Measured: an optimizer step of the Llama-3-8B shape with random weights, LoRA of rank 8 on q, k, v
and o, layers recomputed, batch 1; attention within shifted groups of a quarter of the sequence
(LongLoRA's choice, --parts), at the same kept share. Against: the same step without groups. Either
in blocks of a quarter of the sequence (the default) and in blocks of 64 tokens; all in one process,
in turn. Quality is `quality.py`'s part: methods "groups-..." of `quality.yaml`.

Appends rows of bench "shifted groups" to --output: "ours" with groups, "peer_value" without, for
milliseconds of a step and for GiB.

    python benchmarks/sparsity.py --page

writes the tables and the recommendation of docs/SHIFTED_GROUPS.md from the results, those of
quality.py among them. Takes a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from common import records
from gpu_finetune import GIB, RANK, TARGETS
from quality_table import share_of
from readme_table import replace_block

RESULTS = records.RESULTS / "sparsity.jsonl"
PAGE = records.REPOSITORY / "docs/SHIFTED_GROUPS.md"
BENCH = "shifted groups"
# Methods of quality.yaml with groups, and the same without them.
PAIRS = {
    "groups-0.5": "tail-0.5",
    "wide-groups-0.5": "tail-0.5",
    "groups-0.3": "tail-0.3",
}
# What the page calls the models of quality.jsonl.
MODELS = {"model": "28M", "smollm2": "SmolLM2-135M"}
# Groups are recommended where a step takes at most this share of the time, and every perplexity is
# at most this share of that without groups.
TIME, PERPLEXITY = 0.95, 1.01


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, RESULTS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--blocks", type=float, nargs="+", default=[0.25, 64])
    parser.add_argument("--parts", type=int, default=4, help="groups of a sequence")
    records.add_shape(parser)
    parser.add_argument("--reps", type=int, default=2, help="steps of either kind that count")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--page", action="store_true", help="write the page")
    return parser.parse_args(arguments)


# --- steps


def measured(options: argparse.Namespace) -> None:
    """Appends a row for each length, share and block size as soon as it is known."""
    import torch

    import lemo
    from common.models import llama_config, random_llama, training_step, with_lora
    from common.timing import milliseconds

    config = llama_config(max(options.tokens), options.layers, options.shrink)
    model = with_lora(random_llama(config, options.device), RANK, TARGETS).train()
    step, on_gpu = training_step(model), options.device.startswith("cuda")

    def once(ids, keep: float, block: float, group: int | None) -> tuple[float, float]:
        """(milliseconds, GiB) of a step."""
        settings: dict[str, Any] = {"keep": keep, "recompute": "layer", "scorer": "random"}
        settings["block_size"] = block if block < 1 else int(block)
        handle = lemo.enable(model, lemo.LemoConfig(**settings, layerwise={"group_size": group}))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = milliseconds(lambda: step(ids), options.device)
        handle.remove()
        return taken, torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0

    provenance = records.provenance(options.commit, options.device)
    for tokens in options.tokens:
        ids = torch.randint(0, config.vocab_size, (1, tokens), device=options.device)
        group = tokens // options.parts
        for keep in options.keep:
            for block in options.blocks:
                once(ids, keep, block, group)  # warms up
                runs: dict[int | None, list[tuple[float, float]]] = {group: [], None: []}
                for _ in range(options.reps):
                    for each, found in runs.items():
                        found.append(once(ids, keep, block, each))
                shape = {
                    "model": "Llama-3-8B shape",
                    "tokens": tokens,
                    "layers": options.layers,
                    "keep": keep,
                    "block_size": block,
                    "group_size": group,
                    "recompute": "layer",
                }
                for index, unit in enumerate(("ms", "GiB")):
                    ours, peers = ([run[index] for run in found] for found in runs.values())
                    row = records.figure(
                        BENCH,
                        shape,
                        unit,
                        statistics.median(ours),
                        "without groups",
                        statistics.median(peers),
                        range=[round(min(ours), 4), round(max(ours), 4)],
                        peer_range=[round(min(peers), 4), round(max(peers), 4)],
                    )
                    records.append(options.output, [row | provenance])
                    records.show(row, f"{tokens:>7} keep {keep:<5} blocks {block:<6g} ")


# --- the page


def step_table(rows: list[dict[str, Any]]) -> str:
    """Steps with groups beside steps without, the latest of each setting."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        shape = row["shape"]
        key = tuple(shape[name] for name in ("tokens", "keep", "block_size", "group_size"))
        found.setdefault(key, {})[row["unit"]] = row
    if not found:
        return "No step has been recorded yet."
    lines = []
    for (tokens, keep, block, group), units in sorted(found.items(), key=lambda item: item[0]):
        time_, memory = units["ms"], units["GiB"]
        lines.append(
            [
                f"{tokens}",
                f"{keep:g}",
                f"{block:g}" if block > 1 else f"{block:g} of the window",
                f"{group}",
                f"{time_['peer_value'] / 1e3:.2f}",
                f"{time_['ours'] / 1e3:.2f} ({time_['ratio']:.2f})",
                f"{memory['peer_value']:.1f}",
                f"{memory['ours']:.1f} ({memory['ratio']:.2f})",
            ]
        )
    head = ["tokens", "keep", "blocks", "groups of", "s a step", "with groups"]
    head += ["GiB", "with groups"]
    latest = rows[-1]
    return (
        records.markdown(head, ["---:"] * len(head), lines)
        + f"\n\n{latest['shape']['model']}, {latest['shape']['layers']} layers, recompute "
        f'"{latest["shape"]["recompute"]}", {latest["gpu"]}, torch {latest["torch"]}, '
        f"{latest['date']}, commit {latest['commit']}. In brackets: as a share."
    )


def quality_pairs(rows: list[dict[str, Any]]) -> list[tuple[dict, dict, dict[str, float]]]:
    """(a run with groups, one without of the same protocol and commit, shares of perplexity)."""
    pairs = []
    for row in rows:
        plain = [
            other
            for other in rows
            if other["method"] == PAIRS.get(row["method"])
            and all(other[name] == row[name] for name in ("shape", "seed", "commit", "equal"))
        ]
        if plain:
            kinds = row["perplexity"]
            shares = {kind: share_of([row], [plain[-1]], kind) or 0.0 for kind in kinds}
            pairs.append((row, plain[-1], shares))
    return pairs


def quality_table(pairs: list[tuple[dict, dict, dict[str, float]]]) -> str:
    """Perplexities with groups beside those without, of the same windows."""
    if not pairs:
        return "No quality has been recorded yet."
    kinds = list(pairs[0][2])
    lines = [
        [
            MODELS.get(row["shape"]["model"], row["shape"]["model"]),
            f"{row['method']} beside {plain['method']}",
            f"{row['shape']['context']}",
            f"{row['shape']['steps']}",
            f"{row['kept_share']:.2f}",
            f"{row['settings']['elimination']['layerwise']['group_size']}",
            *(f"{row['perplexity'][kind]:.3f} ({shares[kind]:.4f})" for kind in kinds),
        ]
        for row, plain, shares in pairs
    ]
    head = ["model", "method", "tokens", "steps", "kept", "groups of", *kinds]
    return records.markdown(head, ["---", "---", *["---:"] * (len(head) - 2)], lines)


def recommendation(
    steps: list[dict[str, Any]], pairs: list[tuple[dict, dict, dict[str, float]]]
) -> str:
    """What follows from the figures, by `TIME` and `PERPLEXITY`."""
    times = [row["ratio"] for row in steps if row["unit"] == "ms"]
    if not times or not pairs:
        return "Nothing is recommended yet: time or quality has not been recorded."
    shares = [share for _, _, of_parts in pairs for share in of_parts.values()]
    rule = (
        f"Groups are recommended where a step takes at most {TIME:g} of the time, and every "
        f"perplexity is at most {PERPLEXITY:g} of that without groups. Measured: steps take "
        f"{min(times):.2f} to "
        f"{max(times):.2f} of the time without groups, and perplexities are {min(shares):.3f} to "
        f"{max(shares):.3f} of those without groups at the same kept share and steps."
    )
    good = sorted(
        {row["method"] for row, _, of_parts in pairs if max(of_parts.values()) <= PERPLEXITY}
    )
    bad = {row["method"] for row, _, of_parts in pairs} - {*good}
    if good and not bad and min(times) <= TIME:
        return f"**Use groups** where attention is much of a step ({', '.join(good)}). {rule}"
    if good and min(times) <= TIME:
        methods = ", ".join(good)
        return f"**Use groups with care**: {methods} alone stays within the bound. {rule}"
    return f"**Leave `group_size` at null.** {rule}"


def updated(text: str, steps: list[dict[str, Any]], quality: list[dict[str, Any]]) -> str:
    """The page with what is recorded."""
    pairs = quality_pairs(quality)
    text = replace_block(text, recommendation(steps, pairs), "recommendation")
    text = replace_block(text, step_table(steps), "steps")
    return replace_block(text, quality_table(pairs), "quality of groups")


def read_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of steps, and of quality."""
    quality = records.read(RESULTS, "quality") + records.read(records.RESULTS / "quality.jsonl")
    return records.read(RESULTS, BENCH), quality


def main() -> None:
    options = parse_arguments()
    if options.page:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), *read_rows()), encoding="utf-8")
        return
    start = time.perf_counter()
    measured(options)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
