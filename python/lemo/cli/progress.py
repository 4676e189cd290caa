"""Progress of a command: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from lemo.cli.streams import printable


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(record: dict[str, Any]) -> str:
    """What one step's record says, in one line."""
    return (
        f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"{record['peak_memory_bytes'] / 2**30:.2f} GiB  kept {record['kept_share']:.0%}  "
        f"{duration(record['seconds_left'])} left"
    )


class StepProgress:
    """Shows step, loss, tokens a second, peak memory, kept share and time left.

    Call it with the record of each step; use it as a context manager, so that the terminal is
    left in order after an error.

    Args:
        screen: where to print.
        every: steps between lines where ``screen`` is not a terminal.
    """

    def __init__(self, screen: Console, every: int = 1):
        self._screen = screen
        self._every = every
        self._live = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=screen,
            transient=False,
            disable=not screen.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> StepProgress:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        step, steps = record["step"], record["steps"]
        if not self._screen.is_terminal:
            if step % self._every == 0 or step == steps:
                self._screen.print(f"step {step}/{steps}  {describe(record)}")
            return
        if self._task is None:
            self._task = self._live.add_task("", total=steps)
        self._live.update(self._task, completed=step, description=describe(record))


class StageProgress:
    """One live bar for each stage on a terminal, one line for each stage elsewhere."""

    def __init__(self, screen: Any):
        self._screen = screen
        self._live = Progress(
            TextColumn("{task.fields[stage]}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=screen,
            disable=not screen.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> StageProgress:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __call__(self, stage: str, done: int, total: int, message: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._live.add_task("", total=total, stage=printable(stage))
        text = printable(message)
        self._live.update(self._tasks[stage], completed=done, total=total, description=text)
        if not self._screen.is_terminal and done == total:
            self._screen.print(printable(f"{stage}: {done} of {total}  {message}"))
