"""The record of each step, completed when its loss has come from the device."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo.training.behind import Copy, HostMemory, Moment
from lemo.training.run_log import RunLog

__all__ = ["AHEAD", "StepRecords"]

# Steps that a GPU may still have to do when the host begins to issue the next one: what holds the
# host up for less than a step, such as a thread that writes a checkpoint, costs no time then.
AHEAD = 2

_CPU = torch.device("cpu")

_log = logging.getLogger("lemo")


@dataclass
class _Step:
    """A step whose work is under way, or done.

    Attributes:
        record: without the loss and times, until it is complete.
        loss: what the device copies to the host.
        is_complete: its loss and times are in the record.
        is_logged: its record is in the log, where there is one.
    """

    record: dict[str, Any]
    loss: Copy
    is_complete: bool = False
    is_logged: bool = False


class StepRecords:
    """Completes, logs and shows the records of a run's steps, in order.

    Args:
        steps: of the run.
        log: of the main process; None: another one.
        progress: gets each record, with "steps" and "seconds_left" added.
        reason: tells, where a loss is not finite, where that comes from; None: nobody knows.
        device: where the steps run.
    """

    def __init__(
        self,
        steps: int,
        log: RunLog | None,
        progress: Callable[[dict[str, Any]], None] | None,
        reason: Callable[[], str | None] = lambda: None,
        device: torch.device = _CPU,
    ) -> None:
        self._steps, self._log, self._progress = steps, log, progress
        self._reason = reason
        self._recent: deque[float] = deque(maxlen=20)
        self._waiting: deque[_Step] = deque()
        self._device = device
        self._last = Moment(device)
        self._memory = HostMemory()
        # Whoever comes first completes a step: `finish`, or the thread that writes its checkpoint.
        self._lock = threading.Lock()

    def restart(self) -> None:
        """The time of the next step begins now."""
        self._last = Moment(self._device)

    def begin(self, record: dict[str, Any], loss: Tensor) -> None:
        """A step whose work is under way.

        Args:
            record: without the loss and times.
            loss: scalar on the device; may be overwritten afterwards.
        """
        self._waiting.append(_Step(record, Copy(loss, self._memory)))

    def when_done(self, act: Callable[[], None]) -> Callable[[], None]:
        """For another thread: waits for the steps that have begun and logs them, and does `act` if
        their losses are finite. Otherwise `finish` says so."""
        steps = list(self._waiting)
        assert steps

        def wait() -> None:
            # In order, and none behind one that is not finite.
            if all(map(self._complete, steps)):
                act()

        return wait

    def _complete(self, step: _Step) -> bool:
        """Waits for a step and logs it, once; whether its loss is finite."""
        # Outside of the lock: the other thread may wait for an earlier step.
        step.loss.wait()
        with self._lock:
            loss = step.loss.value().item()
            if not step.is_complete:
                # Not the time until the host has looked, which may be that of two steps at once.
                seconds, self._last = step.loss.done.since(self._last), step.loss.done
                tokens_per_second = step.record["tokens"] / seconds
                step.record |= {
                    "loss": loss,
                    "seconds": seconds,
                    "tokens_per_second": tokens_per_second,
                }
                step.is_complete = True
                self._recent.append(seconds)
            if not step.is_logged and math.isfinite(loss):
                if self._log is not None:
                    self._log.write(step.record)
                # Only now: without its line in the log no checkpoint may count the step.
                step.is_logged = True
        return math.isfinite(loss)

    def finish(self, leave: int = 0) -> None:
        """Waits for the steps that have begun, but for some; their times are since the ones before.

        Args:
            leave: how many of the latest steps are not waited for.

        Raises:
            FloatingPointError: the loss of one is not finite; later ones are forgotten.
        """
        while len(self._waiting) > leave:
            step = self._waiting[0]
            is_finite = self._complete(step)
            # Not before: an interrupt comes while the host waits, and `leave` asks again.
            self._waiting.popleft()
            record = step.record
            if not is_finite:
                self._waiting.clear()
                reason = self._reason()
                raise FloatingPointError(
                    f"step {record['step']}: the loss is {record['loss']}; "
                    + ("" if reason is None else f"{reason}; ")
                    + "earlier checkpoints stay as they are; a lower learning_rate or dtype "
                    "bfloat16 may help"
                )
            if self._log is not None and self._progress is not None:
                left = (self._steps - record["step"]) * sum(self._recent) / len(self._recent)
                self._progress(record | {"steps": self._steps, "seconds_left": left})

    def leave(self) -> None:
        """Like `finish`, where the run ends by an error: one of its own is only logged."""
        try:
            self.finish()
        except Exception as error:
            _log.error("%s", error)
