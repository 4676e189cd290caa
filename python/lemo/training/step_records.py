"""The record of each step, completed when its loss has come from the device."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lemo.training.behind import Copy, HostMemory
from lemo.training.run_log import RunLog

__all__ = ["StepRecords"]

_log = logging.getLogger("lemo")


class StepRecords:
    """Completes, logs and shows the records of a run's steps, in order.

    Args:
        steps: of the run.
        log: of the main process; None: another one.
        progress: gets each record, with "steps" and "seconds_left" added.
    """

    def __init__(
        self, steps: int, log: RunLog | None, progress: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self._steps, self._log, self._progress = steps, log, progress
        self._recent: deque[float] = deque(maxlen=20)
        self._waiting: tuple[dict[str, Any], Copy, Callable[[], None] | None] | None = None
        self._last = time.perf_counter()
        self._memory = HostMemory()

    def restart(self) -> None:
        """The time of the next step begins now."""
        self._last = time.perf_counter()

    def begin(
        self, record: dict[str, Any], loss: Tensor, then: Callable[[], None] | None = None
    ) -> None:
        """A step whose work is under way.

        Args:
            record: without the loss and times.
            loss: scalar on the device; may be overwritten afterwards.
            then: what to do when the step is complete and its loss is finite.
        """
        self._waiting = record, Copy(loss, self._memory), then

    def finish(self) -> None:
        """Waits for the step that began last, if there is one; its time is since the one before.

        Raises:
            FloatingPointError: its loss is not finite.
        """
        if self._waiting is None:
            return
        record, copy, then = self._waiting
        loss, step = copy.value().item(), record["step"]
        # Not before: an interrupt comes while the host waits, and `leave` asks again.
        self._waiting = None
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {step}: the loss is {loss}; earlier checkpoints stay as they are; a lower "
                "learning_rate or dtype bfloat16 may help"
            )
        tokens_per_second = record["tokens"] / seconds
        record |= {"loss": loss, "seconds": seconds, "tokens_per_second": tokens_per_second}
        self._recent.append(seconds)
        if self._log is not None:
            self._log.write(record)
            left = (self._steps - step) * sum(self._recent) / len(self._recent)
            if self._progress is not None:
                self._progress(record | {"steps": self._steps, "seconds_left": left})
        if then is not None:
            then()

    def leave(self) -> None:
        """Like `finish`, where the run ends by an error: one of its own is only logged."""
        try:
            self.finish()
        except Exception as error:
            _log.error("%s", error)
