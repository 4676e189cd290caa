"""Several processes: one long sequence shared out by its kept rows."""

from lemo.distributed.context import ContextParallel

__all__ = ["ContextParallel"]
