"""How a preparation tells how far it is."""

from collections.abc import Callable

__all__ = ["CountReport", "Report"]

# Called as report(stage, done, total, message) for every unit of work.
Report = Callable[[str, int, int, str], None]
# Called as report(done, total) for every unit of work, where all are of one kind.
CountReport = Callable[[int, int], None]
