"""Time lemo's operators on one GPU beside what PyTorch and Liger offer.

    python benchmarks/gpu_ops.py --output FILE.jsonl [--only STEM ...]

Measured: milliseconds of a call at the sizes of Llama-3-8B with 64K tokens, the share of the
device's copy bandwidth, and for linear_cross_entropy also memory and errors. Against: PyTorch's
operators and, where liger-kernel is installed, Liger's; the modules of `benchmarks/gpu` say which.
Takes about three minutes on an H200. An operator whose result is not its peer's is not timed, and
the run fails. Times are medians of CUDA events, ours and the peers' in turns, on data several times
the L2 cache. One JSON line is appended for each operator and peer, with the range of the repeats.

    python benchmarks/gpu_ops.py --device cpu --shrink 64 --output /dev/null

tries everything on the CPU at a 64th of the sizes; such times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

import torch

from common import records
from gpu.bench import Bench

STEMS = sorted(
    path.stem
    for path in (Path(__file__).parent / "gpu").glob("*.py")
    if path.stem not in ("__init__", "bench")
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.BUILD / "gpu_ops.jsonl")
    parser.add_argument("--only", nargs="+", choices=STEMS, default=STEMS, metavar="STEM")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes by this")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    common, failed = records.provenance(options.commit, options.device), []
    bench = Bench(options.device, options.shrink)
    for stem in options.only:
        torch.manual_seed(0)
        try:
            for row in importlib.import_module(f"gpu.{stem}").rows(bench):
                records.append(options.output, [row | common])
                records.show(row)
        except Exception:
            traceback.print_exc()
            failed.append(stem)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
