"""Loads liblemo_ops.so, which registers torch.ops.lemo.*."""

import ctypes
from pathlib import Path

import scipy_openblas32
import torch

_LIBRARY = Path(__file__).resolve().parent.parent / "liblemo_ops.so"


def load() -> None:
    """Registers the ops once; raises ImportError with the remedy where the library is absent."""
    if not _LIBRARY.exists():
        raise ImportError(
            f"lemo's compiled ops are missing: expected {_LIBRARY}. Install lemo with "
            "'pip install .' from its source folder, or build in place with 'make develop'."
        )
    # The ops link against this BLAS by soname; loading it first makes any install location work.
    ctypes.CDLL(str(Path(scipy_openblas32.get_lib_dir()) / "libscipy_openblas.so"))
    torch.ops.load_library(str(_LIBRARY))


load()
