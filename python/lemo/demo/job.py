"""One fine-tuning run of the demo in a process of its own: ``python -m lemo.demo.job CONFIG.yaml``.

Prints JSON lines: the resident memory before the run, then the record of every step.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

from lemo.files import json_text
from lemo.settings.finetune import FinetuneConfig
from lemo.training import memory
from lemo.training.finetune import finetune
from lemo.training.processes import process_state

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_MAPPED_BYTES = 1 << 20


def main(config_path: str) -> None:
    _map_large_tensors()
    config = FinetuneConfig.from_yaml(config_path)
    device = process_state(config).device
    # What the imported libraries take is no property of a method: the caller subtracts it.
    memory.reset_peak(device)
    _print({"baseline_bytes": memory.peak_bytes(device)})
    finetune(config, progress=_print)


def _map_large_tensors() -> None:
    """Have glibc map every large tensor on its own, so that a freed one leaves the resident memory.

    Otherwise freed tensors stay in a heap that grows with its holes, step by step, and the peak
    tells about the allocator, not about the method. Another C library keeps its own way.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _print(record: dict[str, Any]) -> None:
    print(json_text(record), end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
