"""One fine-tuning run of the demo in a process of its own: ``python -m lemo.demo.job CONFIG.yaml``.

Prints JSON lines: the resident memory before the run, then the record of every step.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from lemo.training import memory
from lemo.training.config import FinetuneConfig, read_yaml
from lemo.training.finetune import finetune


def main(config_path: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What the imported libraries take is no property of a method: the caller subtracts it.
    memory.reset_peak(device)
    _print({"baseline_bytes": memory.peak_bytes(device)})
    finetune(FinetuneConfig.from_dict(read_yaml(config_path)), progress=_print)


def _print(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
