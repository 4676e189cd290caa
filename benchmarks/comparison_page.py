"""Write tables and plots of the comparison: `python benchmarks/comparison_page.py [--check]`.

docs/COMPARISON.md, the comparison in README.md and two plots in docs/images follow from the rows of
benchmarks/results/comparison.jsonl; of each contender and length the last row counts. The longest
windows in docs/COMPARISON.md are `longest_page.py`'s. --check writes nothing and names what is not
up to date. Takes a few seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import longest_page
from common import records
from common.records import markdown
from contenders import CONTENDERS
from readme_table import README, replace_block

RESULTS = records.RESULTS / "comparison.jsonl"
PAGE = records.REPOSITORY / "docs/COMPARISON.md"
IMAGES = records.REPOSITORY / "docs/images"
PLOTS = {"step_s": "comparison_time.svg", "peak_gib": "comparison_memory.svg"}
AXES = {"step_s": "seconds of a step", "peak_gib": "peak memory of the GPU, GiB"}
NOTHING = "Nothing has been measured yet."
OUT_OF_MEMORY = "out of memory"
# GiB of pinned host memory that are worth a line.
LEAST_PINNED = 0.1
# What README shows of it.
SHORT = ("plain", "checkpointing", "selective", "offload", "liger", "liger-selective")
SHORT += ("liger-tiled", "unsloth", "trl", "cce", "fa4", "s2", "lemo-1", "lemo-1-selective")
SHORT += ("lemo-1-planned", "lemo-0.5", "lemo-0.5-planned", "lemo-0.25", "lemo-0.25-planned")
# Groups of rows are of one model, bound of the memory and card.
Group = tuple[str, float | None, str | None]
Rows = dict[tuple[str, int], dict[str, Any]]


def group_of(row: dict[str, Any]) -> Group:
    return row["shape"]["model"], row["memory"], row["gpu"]


def groups_of(rows: Iterable[dict[str, Any]]) -> dict[Group, Rows]:
    """The last row of each contender and length, by group."""
    found: dict[Group, Rows] = {}
    for row in rows:
        found.setdefault(group_of(row), {})[row["contender"], row["tokens"]] = row
    return found


def title_of(name: str) -> str:
    return CONTENDERS[name].title if name in CONTENDERS else name


def names_of(rows: Rows, wanted: Iterable[str] | None = None) -> list[str]:
    """Contenders that have a figure or ran out of memory, in the order of `CONTENDERS`."""
    there = {name for name, tokens in rows if cell(rows, name, tokens)}
    return [name for name in CONTENDERS if name in there and (wanted is None or name in wanted)]


def lengths_of(rows: Rows) -> list[int]:
    return sorted({tokens for _, tokens in rows})


def cell(rows: Rows, name: str, tokens: int) -> str:
    """Time and memory; empty where there is no figure, with a star where it is too long."""
    row = rows.get((name, tokens), {})
    if row.get("failed") == OUT_OF_MEMORY:
        return OUT_OF_MEMORY
    if row.get("step_s") is None:
        return ""
    memory = row["peak_gib"]
    time = f"{row['step_s']:.2f}{'*' if pinned_in(row) else ''} s"
    return time + ("" if memory is None else f", {memory:.1f} GiB")


def pinned_in(row: dict[str, Any]) -> bool:
    """Whether a step was the first of its length and pinned memory of the host besides."""
    return row.get("warmed") is False and (row.get("pinned_gib") or 0.0) >= LEAST_PINNED


def table(rows: Rows, wanted: Iterable[str] | None = None) -> str:
    """Contenders by lengths."""
    lengths, names = lengths_of(rows), names_of(rows, wanted)
    lines = [[title_of(name), *(cell(rows, name, each) for each in lengths)] for name in names]
    head = ["", *(f"{each} tokens" for each in lengths)]
    return markdown(head, ["---", *["---:"] * len(lengths)], lines)


def fastest_exact(rows: Rows, tokens: int) -> str | None:
    """The fastest contender that computes what dense LoRA computes and is not lemo."""
    peers = {
        name: row["step_s"]
        for (name, length), row in rows.items()
        if length == tokens and row["step_s"] is not None
        if name in CONTENDERS and CONTENDERS[name].exact and not name.startswith("lemo")
    }
    return min(peers, key=lambda name: peers[name]) if peers else None


def shares(rows: Rows) -> str:
    """Steps of lemo as shares of the fastest exact contender's; empty where there are none."""
    peers = {tokens: fastest_exact(rows, tokens) for tokens in lengths_of(rows)}
    lines = []
    for name in names_of(rows):
        steps = [rows.get((name, tokens), {}).get("step_s") for tokens in peers]
        cells = [
            "" if step is None or peer is None else f"{step / rows[peer, tokens]['step_s']:.3f}"
            for step, (tokens, peer) in zip(steps, peers.items())
        ]
        if name.startswith("lemo") and any(cells):
            lines.append([title_of(name), *cells])
    if not lines:
        return ""
    fastest = [
        "" if peer is None else f"{title_of(peer)}, {rows[peer, tokens]['step_s']:.2f} s"
        for tokens, peer in peers.items()
    ]
    head = ["", *(f"{tokens} tokens" for tokens in peers)]
    return markdown(
        head, ["---", *["---:"] * len(peers)], [["fastest exact method", *fastest], *lines]
    )


def host_table(rows: Rows) -> str:
    """Memory of the host at the longest measured length, of those that pin some; empty where none
    does."""
    lines = []
    for name in names_of(rows):
        mine = {tokens: row for (other, tokens), row in rows.items() if other == name}
        measured = [tokens for tokens, row in mine.items() if row["step_s"] is not None]
        if not measured:
            continue
        row = mine[max(measured)]
        pinned = row.get("pinned_gib") or 0.0
        if pinned >= LEAST_PINNED:
            cells = [str(max(measured)), f"{row['host_gib']:.1f}", f"{pinned:.1f}"]
            lines.append([title_of(name), *cells])
    if not lines:
        return ""
    head = ["", "tokens", "process, GiB", "of it pinned, GiB"]
    return markdown(head, ["---", "---:", "---:", "---:"], lines)


def left_out(groups: dict[Group, Rows]) -> str:
    """Contenders without a figure, and why."""
    why = {name: each.why_not for name, each in CONTENDERS.items() if each.why_not is not None}
    for rows in groups.values():
        for (name, tokens), row in rows.items():
            failed = row.get("failed")
            if failed is None or failed == OUT_OF_MEMORY or name not in CONTENDERS:
                continue
            if not has_run_since(name, row, groups):
                why[name] = f"{failed} (at {tokens} tokens)"
    seen = {name for rows in groups.values() for name, _ in rows}
    lines = [f"- {title_of(name)}: {why[name]}." for name in CONTENDERS if name in why]
    later = [title_of(name) for name in CONTENDERS if name not in seen and name not in why]
    if later and groups:
        lines.append(f"- Not measured yet: {'; '.join(later)}.")
    return "\n".join(lines)


def has_run_since(name: str, failure: dict[str, Any], groups: dict[Group, Rows]) -> bool:
    """Whether a contender ran at another commit than the one it failed at, and not before."""
    return any(
        other == name
        and row["step_s"] is not None
        and row["commit"] != failure["commit"]
        and row["date"] >= failure["date"]
        for rows in groups.values()
        for (other, _), row in rows.items()
    )


def version_table(groups: dict[Group, Rows]) -> str:
    found = {
        (package, version)
        for rows in groups.values()
        for row in rows.values()
        for package, version in row.get("versions", {}).items()
        if package != "lemo"
    }
    return markdown(["package", "version"], ["---", "---"], [list(pair) for pair in sorted(found)])


def measured_on(group: Group, rows: Rows) -> str:
    """Model, bound of the memory, card, days and commits of a group."""
    model, memory, gpu = group
    card = "CPU" if gpu is None else gpu.removeprefix("NVIDIA ")
    days = sorted({row["date"] for row in rows.values()})
    commits = sorted({row["commit"] for row in rows.values()})
    steps = sorted({row["steps"] for row in rows.values() if row.get("steps")})
    bound = "" if memory is None else f", of whose memory PyTorch may take {memory:g} GiB"
    counted = f"measured steps: {' to '.join(map(str, steps[:1] + steps[1:][-1:]))}"
    measured = [row for row in rows.values() if row["step_s"] is not None]
    first = sum(row.get("warmed") is False for row in measured)
    # Kernels were compiled, and loaded, by a shorter one.
    counted += (
        f" (the first of their length in {first} of {len(measured)} figures)" if first else ""
    )
    if any(map(pinned_in, measured)):
        counted += "; *: pinning memory of the host took a part of it, once"
    return f"{model}, {card}{bound}; {counted}; {', '.join(days)}, commit {', '.join(commits)}"


def is_drawn(groups: dict[Group, Rows]) -> bool:
    """Whether there is a line to draw: more than one length in the first group."""
    return bool(groups) and len(lengths_of(next(iter(groups.values())))) > 1


def figures(rows: Iterable[dict[str, Any]]) -> str:
    """All that the page shows of the rows."""
    groups = groups_of(rows)
    parts = []
    if not groups:
        parts.append(NOTHING)
    for group, of_group in groups.items():
        parts += [f"### {measured_on(group, of_group)}", table(of_group)]
        compared = shares(of_group)
        if compared:
            parts += ["Steps of lemo in shares of the fastest exact method's step:", compared]
        pinned = host_table(of_group)
        if pinned:
            parts += ["Who uses memory of the host, at the longest measured length:", pinned]
    if is_drawn(groups):
        for value, name in PLOTS.items():
            parts.append(f"![{AXES[value]} over the window's length](images/{name})")
    parts += ["### What did not run", left_out(groups)]
    if groups:
        parts += ["### Versions", version_table(groups)]
    return "\n\n".join(parts)


def short_figures(rows: Iterable[dict[str, Any]]) -> str:
    """What README shows of the rows: the first group."""
    groups = groups_of(rows)
    if not groups:
        return f"{NOTHING} What would be, and how: [docs/COMPARISON.md](docs/COMPARISON.md)."
    group, of_group = next(iter(groups.items()))
    return (
        f"{table(of_group, SHORT)}\n\n"
        f"{measured_on(group, of_group)}. Random weights: time and memory only. "
        "All contenders, settings and versions: [docs/COMPARISON.md](docs/COMPARISON.md)."
    ) + (
        f"\n\n![{AXES['step_s']} over the window's length](docs/images/{PLOTS['step_s']})"
        if is_drawn(groups)
        else ""
    )


def digest(rows: Iterable[dict[str, Any]]) -> str:
    """What tells whether a plot is of these rows."""
    drawn = [
        [list(map(str, group)), name, tokens, row["step_s"], row["peak_gib"]]
        for group, of_group in groups_of(rows).items()
        for (name, tokens), row in of_group.items()
    ]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def plot(rows: Iterable[dict[str, Any]], value: str, path: Path) -> None:
    """A quantity of all contenders over the length, both axes logarithmic: the first group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = list(rows)
    of_group = next(iter(groups_of(kept).values()))
    figure, axes = pyplot.subplots(figsize=(9.5, 5.2), layout="constrained")
    markers = "osv^D<>pP*Xhd"
    for index, name in enumerate(names_of(of_group)):
        points = [
            (tokens, of_group[name, tokens][value])
            for tokens in lengths_of(of_group)
            if of_group.get((name, tokens), {}).get(value) is not None
            and of_group[name, tokens]["step_s"] is not None
        ]
        if not points:
            continue
        is_ours = name.startswith("lemo")
        axes.plot(
            *zip(*points),
            label=title_of(name),
            color=pyplot.get_cmap("tab20")(index % 20),
            linewidth=2 if is_ours else 1,
            linestyle="-" if is_ours else "--",
            marker=markers[index % len(markers)],
            markersize=4,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths_of(of_group), [f"{each // 1024}K" for each in lengths_of(of_group)])
    axes.set_xlabel("tokens of the window")
    axes.set_ylabel(AXES[value])
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": "comparison"}):
        figure.savefig(path, metadata={"Date": None, "Description": digest(kept)})
    pyplot.close(figure)


def texts(rows: list[dict[str, Any]]) -> dict[Path, str]:
    """Files with the figures of the rows."""
    page, readme = (path.read_text(encoding="utf-8") for path in (PAGE, README))
    return {
        PAGE: replace_block(replace_block(page, figures(rows)), longest(), "longest"),
        README: replace_block(readme, short_figures(rows), "comparison"),
    }


def longest() -> str:
    """What the page shows of the longest windows."""
    return longest_page.figures(records.read(longest_page.RESULTS, "longest"))


def out_of_date(rows: list[dict[str, Any]], images: Path = IMAGES) -> list[str]:
    """Names of the files that do not follow from the rows."""
    found = [
        path.name for path, text in texts(rows).items() if path.read_text(encoding="utf-8") != text
    ]
    for name in PLOTS.values() if is_drawn(groups_of(rows)) else ():
        path = images / name
        if not path.exists() or digest(rows) not in path.read_text(encoding="utf-8"):
            found.append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="name what is not up to date")
    options = parser.parse_args()
    rows = records.read(RESULTS, "comparison")
    if options.check:
        old = out_of_date(rows)
        print(*(f"{name}: not up to date" for name in old), sep="\n", end="\n" if old else "")
        return 1 if old else 0
    for path, text in texts(rows).items():
        path.write_text(text, encoding="utf-8")
    for value, name in PLOTS.items() if is_drawn(groups_of(rows)) else ():
        plot(rows, value, IMAGES / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
