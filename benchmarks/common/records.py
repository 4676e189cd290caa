"""Records of measurements: JSON objects, one a line, that say what was measured on what and when.

The fields of a record are bench, shape, ours, range, peer, peer_value, peer_range, ratio, unit, and
those of `provenance`: gpu, torch, commit, date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = [
    "BUILD",
    "REPOSITORY",
    "RESULTS",
    "above_zero",
    "add_documents",
    "add_repeats",
    "add_shape",
    "append",
    "at_least",
    "commit_of_tree",
    "device",
    "existing",
    "figure",
    "from_zero",
    "markdown",
    "markdown_line",
    "parser",
    "provenance",
    "read",
    "show",
]

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS, BUILD = REPOSITORY / "benchmarks/results", REPOSITORY / "build"


def parser(description: str | None, output: Path) -> argparse.ArgumentParser:
    """A parser with --output and --commit.

    Args:
        description: the script's docstring.
        output: where records are appended by default.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--output", type=_file, default=output, help="JSON lines, appended (%(default)s)"
    )
    made.add_argument(
        "--commit", default=commit_of_tree(), help="commit of the measured tree (%(default)s)"
    )
    return made


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Adds --layers and --shrink, of the Llama-3-8B shape."""
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divide the model's sizes by this")


def add_repeats(parser: argparse.ArgumentParser) -> None:
    """Adds --warmup and --reps."""
    parser.add_argument("--warmup", type=int, default=1, help="steps that do not count")
    parser.add_argument("--reps", type=int, default=3, help="steps that count")


def add_documents(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --train and --eval."""
    for name, what in (
        ("model", "folder of a causal LM"),
        ("train", "documents to train on, {id, kind, text} a line"),
        ("eval", "held-out documents, the same format"),
    ):
        parser.add_argument(f"--{name}", type=existing, required=True, help=what)


def existing(path: str) -> Path:
    """An option's path to a file or folder that has to exist."""
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"expected an existing path, got '{path}'")
    return Path(path)


def _file(path: str) -> Path:
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder '{path}'")
    return Path(path)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is an integer and not below `least`."""

    def parsed(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} on, got '{text}'")
        return number

    return parsed


def above_zero(text: str) -> float:
    """An option's number above 0."""
    return _number(text, "above 0", lambda number: number > 0)


def from_zero(text: str) -> float:
    """An option's number that is 0 or more."""
    return _number(text, "of 0 or more", lambda number: number >= 0)


def _number(text: str, what: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and fits(number)):
        raise argparse.ArgumentTypeError(f"expected a number {what}, got '{text}'")
    return number


def device(text: str) -> str:
    """An option's device."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:NUMBER, got '{text}'")
    return text


def commit_of_tree() -> str:
    """Short hash of this repository's commit, "-dirty" where files differ; or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "--short", "HEAD").strip()
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return (commit + ("-dirty" if changed else "")) if commit else "unknown"


def provenance(commit: str, device: str) -> dict[str, Any]:
    """Card (None on the CPU), version of torch, commit of the measured tree, and today's date."""
    gpu = None
    if device.startswith("cuda"):
        import torch

        gpu = torch.cuda.get_device_name()
    return {
        "gpu": gpu,
        "torch": version("torch"),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def figure(
    bench: str,
    shape: Mapping[str, Any],
    unit: str,
    ours: float,
    peer: str | None,
    peer_value: float | None,
    digits: int = 4,
    **more: Any,
) -> dict[str, Any]:
    """A record of one quantity beside a peer's, without its provenance."""
    return {
        "bench": bench,
        "shape": shape,
        "ours": round(ours, digits),
        "peer": peer,
        "peer_value": None if peer_value is None else round(peer_value, digits),
        "ratio": round(ours / peer_value, 4) if peer_value else None,
        "unit": unit,
        **more,
    }


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds records to a file of JSON lines."""
    from lemo.files import json_text

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(json_text, records))


def read(path: Path, bench: str = "") -> list[dict[str, Any]]:
    """The objects of a file of JSON lines whose `bench` begins so; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [each for each in map(json.loads, lines) if each.get("bench", "").startswith(bench)]


def show(record: Mapping[str, Any], name: str = "") -> None:
    """Prints a record in a line, after `name` where its bench does not say all."""
    print(
        f"{name}{record['bench']:<40} {record['ours']:>12} {record['unit']:<10} "
        f"{record['peer'] or 'alone':<24} {record['peer_value'] or '':>12} ratio {record['ratio']}",
        flush=True,
    )


def markdown_line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def markdown(head: Sequence[str], rule: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `rule` aligns its columns ("---", "---:")."""
    return "\n".join(map(markdown_line, [head, rule, *rows]))
