"""What token elimination kept during one optimizer step, as the logs show it."""

from __future__ import annotations

from collections.abc import Sequence

from lemo.selection.statistics import LayerStatistics


class KeptShares:
    """Sums the statistics of the forward passes of a step, without a read-back from the device."""

    def __init__(self) -> None:
        self._last: Sequence[LayerStatistics] | None = None
        self.clear()

    @property
    def last(self) -> Sequence[LayerStatistics] | None:
        """Those of the last forward pass that eliminated anything; None: there was none."""
        return self._last

    def clear(self) -> None:
        """Begin another step; the map stays."""
        self._tokens = 0
        self._rows: list[dict[str, int]] = []

    def add(self, statistics: Sequence[LayerStatistics]) -> None:
        """Count one forward pass."""
        if not self._rows:
            self._rows = [{"attention": 0, "mlp": 0} for _ in statistics]
        self._tokens += statistics[0].tokens
        for rows, layer in zip(self._rows, statistics, strict=True):
            rows["attention"] += layer.attention_rows
            rows["mlp"] += layer.mlp_rows
        if any(layer.eliminated for layer in statistics):
            self._last = statistics

    def by_layer(self) -> list[dict[str, float]]:
        """Share of the step's tokens that each sub-block kept; empty without elimination."""
        return [{name: n / self._tokens for name, n in rows.items()} for rows in self._rows]

    def share(self) -> float:
        """Mean of :meth:`by_layer` over layers and sub-blocks; 1 without elimination."""
        shares = [share for layer in self.by_layer() for share in layer.values()]
        return sum(shares) / len(shares) if shares else 1.0
