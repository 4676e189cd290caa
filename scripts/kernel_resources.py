#!/usr/bin/env python3
"""Registers, shared memory, spills and occupancy of the portable CUDA kernels, without a GPU.

    python scripts/kernel_resources.py --cutlass INCLUDE [--architectures 80 86 89] [--jobs 2]
        [--only segment_attention] [--output FILE.jsonl]

Compiles every portable source for each architecture with nvcc and reads what the compiler reports.
A row for each kernel and architecture: registers of a thread, bytes of static shared memory, of
spills (stores and loads) and of the stack, threads of a block as the source bounds them, and the
warps of a multiprocessor that can be there at once, as far as registers and threads allow; dynamic
shared memory may allow fewer. Exits with 1 where a kernel's static shared memory is more than a
block of that architecture can have. Takes about a minute a source.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REGISTERS, ALLOCATED, WARP = 65536, 256, 32
# Warps of a multiprocessor, and KiB of shared memory that a block can have.
LIMITS = {80: (64, 163), 86: (48, 99), 89: (48, 99), 90: (64, 227)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cutlass", type=Path, required=True, help="folder of CUTLASS's headers")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 86, 89])
    parser.add_argument("--only", default="", help="sources whose path has this in it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "build/kernel_resources.jsonl")
    options = parser.parse_args()
    for architecture in options.architectures:
        if architecture not in LIMITS:
            known = ", ".join(map(str, LIMITS))
            parser.error(f"--architectures: expected some of {known}, got {architecture}")
    if not (options.cutlass / "cutlass/cutlass.h").exists():
        parser.error(f"--cutlass: expected a folder with cutlass/cutlass.h, got {options.cutlass}")
    return options


def sources(only: str) -> list[Path]:
    """The sources that are compiled for every architecture."""
    found = sorted((ROOT / "cuda").rglob("*.cu"))
    return [path for path in found if "hopper" not in path.parts and only in str(path)]


def resources(source: Path, architecture: int, cutlass: Path) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a source."""
    include = [f"-I{path}" for path in (ROOT / "cpp/include", ROOT / "cuda", cutlass)]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-cubin", f"-arch=sm_{architecture}", "-O3", "-DNDEBUG", "-std=c++20"]
        command += ["--expt-relaxed-constexpr", "-Xptxas", "-v", "--keep", f"--keep-dir={folder}"]
        command += [*include, str(source), "-o", f"{folder}/kernels.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    bounds = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx))
    warps, _ = LIMITS[architecture]
    entries = re.split(r"Compiling entry function '", done.stderr)[1:]
    for entry in entries:
        name = entry.partition("'")[0]
        threads = int(bounds[name]) if name in bounds else None
        registers = number(r"Used (\d+) registers", entry)
        yield {
            "source": str(source.relative_to(ROOT)),
            "kernel": demangled(name),
            "architecture": f"sm_{architecture}",
            "registers": registers,
            "shared": number(r"(\d+) bytes smem", entry),
            "spill_stores": number(r"(\d+) bytes spill stores", entry),
            "spill_loads": number(r"(\d+) bytes spill loads", entry),
            "stack": number(r"(\d+) bytes stack frame", entry),
            "threads": threads,
            "warps": resident_warps(registers, threads, warps),
            "most_warps": warps,
        }


def number(pattern: str, text: str) -> int:
    """The number that the compiler reports; 0 where it does not mention it."""
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def demangled(name: str) -> str:
    done = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True)
    name = done.stdout.strip().removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.sub(r"\(.*", "", name)


def resident_warps(registers: int, threads: int | None, most: int) -> int:
    """Warps of a multiprocessor by registers, in whole blocks where those are known."""
    of_warp = -(-registers * WARP // ALLOCATED) * ALLOCATED
    warps = min(most, REGISTERS // of_warp) if of_warp else most
    if threads is None:
        return warps
    of_block = -(-threads // WARP)
    return warps // of_block * of_block


def main() -> int:
    options = parse_arguments()
    jobs = [(path, each) for each in options.architectures for path in sources(options.only)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    too_large = []
    with ThreadPoolExecutor(options.jobs) as pool, options.output.open("w") as file:
        for rows in pool.map(lambda job: list(resources(*job, options.cutlass)), jobs):
            for row in rows:
                file.write(json.dumps(row) + "\n")
                file.flush()
                limit = 1024 * LIMITS[int(row["architecture"][3:])][1]
                if row["shared"] > limit:
                    too_large.append(row)
                spilled = row["spill_stores"] + row["spill_loads"]
                print(
                    f"{row['architecture']} {row['registers']:>4} registers, "
                    f"{spilled:>5} B spilled, {row['warps']:>2} of "
                    f"{row['most_warps']} warps  {row['kernel'][:90]}",
                    flush=True,
                )
    for row in too_large:
        print(f"{row['kernel']}: {row['shared']} bytes of shared memory on {row['architecture']}")
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
