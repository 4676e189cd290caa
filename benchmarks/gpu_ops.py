"""Check and time lemo's CUDA ops on one GPU against what PyTorch offers.

    python benchmarks/gpu_ops.py --output h200_ops.jsonl [--commit HASH] [--only STEM ...]

Every op is compared with the fp32 oracle first; an op that fails is not timed, and the run fails.
Times are medians of CUDA-event measurements, ours and the peer's in turn, on data several times the
L2 cache. Bandwidth is a share of the device copy measured in the same run. One JSON line a figure
is appended, with the range of the repeats. The modules of `benchmarks/gpu` say what is compared.
"""

import argparse
import datetime
import importlib
import json
import sys
import traceback
from pathlib import Path

import torch

from gpu.harness import copy_bandwidth

STEMS = sorted(
    path.stem
    for path in (Path(__file__).parent / "gpu").glob("*.py")
    if path.stem not in ("__init__", "harness")
)


def measure(stem: str, bandwidth: float) -> list[dict]:
    """The figures of one op family, after its check."""
    module = importlib.import_module(f"gpu.{stem}")
    torch.manual_seed(0)
    module.check()
    print(f"{stem}: checks passed", flush=True)
    return module.bench(bandwidth)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--commit", default="unknown", help="commit of the measured tree")
    parser.add_argument("--only", nargs="+", choices=STEMS, default=STEMS, metavar="STEM")
    options = parser.parse_args()
    common = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": options.commit,
        "date": datetime.date.today().isoformat(),
    }
    bandwidth, failed = copy_bandwidth(), []
    with options.output.open("a") as lines:
        for stem in options.only:
            try:
                results = measure(stem, bandwidth)
            except Exception:
                traceback.print_exc()
                failed.append(stem)
                continue
            finally:
                torch.cuda.empty_cache()
            for result in results:
                lines.write(json.dumps(result | common) + "\n")
                print(
                    f"{result['bench']:<40} {result['ours']:>9} {result['unit']:<5} "
                    f"{result['peer']:<20} {result['peer_value']:>9} ratio {result['ratio']}"
                )
            lines.flush()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
