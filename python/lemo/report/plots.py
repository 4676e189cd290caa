"""The plots of a report: each function draws one figure in a :class:`Theme`, as PNG bytes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lemo.report.run import SUB_BLOCKS, KeptMap, RelevanceMap, Run
from lemo.training.run_report import MARK

GIB = 2**30
WIDTH_INCHES = 6.4
DOTS_PER_INCH = 160
TITLES = {"attention": "Attention", "mlp": "MLP"}


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of the page and of the plots in it."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    absent: str
    kept: str
    series: tuple[str, ...]


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1c2024",
    muted="#697077",
    grid="#e4e7ea",
    absent="#eef0f2",
    kept="#0b6e75",
    series=("#0b6e75", "#c2571a", "#5b4fa2", "#8a6d00", "#b0305c"),
)
DARK = Theme(
    name="dark",
    background="#16191c",
    ink="#e6e8ea",
    muted="#99a1a8",
    grid="#2b3035",
    absent="#23282c",
    kept="#45c0c5",
    series=("#45c0c5", "#f0924f", "#a99df0", "#d9b740", "#f07aa0"),
)


def loss(runs: Sequence[Run], theme: Theme) -> bytes:
    """Loss over the steps of every run: each step thin, the running mean thick."""
    figure, (axes,) = _figure(theme, 1, height=3.1)
    for run, color in zip(runs, _cycle(theme.series), strict=False):
        steps, values = np.array(run.steps), np.array(run.series("loss"))
        window = max(1, len(steps) // 20)
        if window > 1:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(
            steps, _running_mean(values, window), color=color, linewidth=1.8, label=_label(run.name)
        )
        _mark_single(axes, steps, values, color)
    _style(axes, theme, xlabel="step", ylabel="training loss (nats per token)")
    _legend(axes, theme, len(runs))
    return _png(figure)


def resources(runs: Sequence[Run], theme: Theme) -> bytes:
    """Peak memory and throughput over the steps of every run, one above the other."""
    figure, (memory, speed) = _figure(theme, 2, height=4.4)
    for run, color in zip(runs, _cycle(theme.series), strict=False):
        steps = np.array(run.steps)
        for axes, values in (
            (memory, np.array(run.series("peak_memory_bytes")) / GIB),
            (speed, np.array(run.series("tokens_per_second"))),
        ):
            axes.plot(steps, values, color=color, linewidth=1.6, label=_label(run.name))
            _mark_single(axes, steps, values, color)
    _style(memory, theme, xlabel="", ylabel="peak memory (GiB)")
    _style(speed, theme, xlabel="step", ylabel="tokens / s")
    for axes in (memory, speed):
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
    memory.tick_params(labelbottom=False)
    _legend(memory, theme, len(runs))
    return _png(figure)


def kept_share(run: Run, theme: Theme) -> bytes:
    """Heat map of the share of tokens that each layer kept over the steps, attention and MLP."""
    figure, panels = _figure(theme, 2, height=_heat_height(len(run.kept_by_layer("attention"))))
    colors = LinearSegmentedColormap.from_list("kept", [theme.absent, theme.kept])
    steps = np.array(run.steps)
    edges = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)) - 0.5
    for axes, sub_block in zip(panels, SUB_BLOCKS, strict=True):
        shares = np.ma.masked_invalid(run.kept_by_layer(sub_block))
        layers = np.arange(shares.shape[0] + 1) - 0.5
        mesh = axes.pcolormesh(edges, layers, shares, cmap=colors, vmin=0, vmax=1)
        axes.invert_yaxis()
        axes.set_title(TITLES[sub_block], loc="left", fontsize=10, color=theme.ink)
        _style(axes, theme, xlabel="step", ylabel="layer", grid=False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].tick_params(labelbottom=False)
    panels[0].set_xlabel("")
    _color_bar(figure, mesh, panels, theme, "share of tokens kept")
    return _png(figure)


def kept_map(kept: KeptMap, theme: Theme) -> bytes:
    """Which blocks of one document each layer kept: layers down, blocks of the document across."""
    figure, panels = _figure(theme, 2, height=_heat_height(len(kept.layers)))
    colors = ListedColormap([theme.absent, theme.kept])
    for axes, sub_block in zip(panels, SUB_BLOCKS, strict=True):
        grid = np.zeros((len(kept.layers), kept.blocks))
        for layer, blocks in enumerate(kept.layers):
            grid[layer, blocks[sub_block]] = 1
        axes.pcolormesh(
            np.arange(kept.blocks + 1) * kept.block_size,
            np.arange(len(kept.layers) + 1) - 0.5,
            grid,
            cmap=colors,
            vmin=0,
            vmax=1,
            edgecolors=theme.background,
            # Thin lines between blocks, as long as the blocks are wide enough to show any.
            linewidth=0.5 if kept.blocks <= 160 else 0,
        )
        axes.invert_yaxis()
        share = grid.mean()
        axes.set_title(
            f"{TITLES[sub_block]}: {share:.0%} of the blocks",
            loc="left",
            fontsize=10,
            color=theme.ink,
        )
        _style(axes, theme, xlabel="token of the document", ylabel="layer", grid=False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0, kept.blocks * kept.block_size)
    panels[0].tick_params(labelbottom=False)
    panels[0].set_xlabel("")
    return _png(figure)


def relevance(found: RelevanceMap, theme: Theme) -> bytes:
    """Relevance of the blocks of one prompt: bars, kept blocks shaded, planted facts marked."""
    figure, (axes,) = _figure(theme, 1, height=3.4)
    size, top = found.block_size, max([*found.scores, 1e-9])
    for block in found.kept:
        axes.axvspan(block * size, (block + 1) * size, color=theme.absent, linewidth=0, zorder=0)
    starts = np.arange(len(found.scores)) * size
    colors = [theme.kept if n in set(found.kept) else theme.muted for n in range(len(starts))]
    axes.bar(starts, found.scores, width=0.92 * size, align="edge", color=colors, zorder=2)
    for asked, marker, label in (
        (True, "v", "fact that is asked for"),
        (False, "|", "fact that is not"),
    ):
        places = [fact.token for fact in found.facts if fact.asked == asked]
        axes.plot(
            places,
            [1.08 * top] * len(places),
            color=theme.series[1],
            marker=marker,
            markersize=6,
            linestyle="none",
            label=label,
        )
    _style(axes, theme, xlabel="token of the prompt", ylabel="relevance to the answers")
    axes.set_xlim(0, len(found.scores) * size)
    axes.set_ylim(0, 1.2 * top)
    axes.legend(
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.ink,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
    )
    return _png(figure)


def _figure(theme: Theme, rows: int, height: float):
    # Figure without pyplot: no global state, no display, safe in any thread.
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    figure.set_facecolor(theme.background)
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    return figure, panels


def _label(name: str) -> str:
    """A name as it is: Matplotlib sets what is between dollars and hides leading underscores."""
    if len(name) > 60:
        name = f"{name[:28]}…{name[-28:]}"
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return (" " if plain.startswith("_") else "") + plain.replace("$", r"\$")


def _heat_height(layers: int) -> float:
    return min(9.0, 1.9 + 2 * max(0.7, 0.16 * layers))


def _style(axes, theme: Theme, xlabel: str, ylabel: str, grid: bool = True) -> None:
    axes.set_facecolor(theme.background)
    axes.set_xlabel(xlabel, color=theme.muted, fontsize=9)
    axes.set_ylabel(ylabel, color=theme.muted, fontsize=9)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0 if grid else 3)
    for side, spine in axes.spines.items():
        spine.set_visible(grid and side == "bottom")
        spine.set_color(theme.grid)
    if grid:
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _legend(axes, theme: Theme, runs: int) -> None:
    if runs > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink)


def _color_bar(figure, mesh, panels, theme: Theme, label: str) -> None:
    bar = figure.colorbar(
        mesh, ax=list(panels), fraction=0.035, pad=0.02, ticks=[0, 0.25, 0.5, 0.75, 1]
    )
    bar.ax.set_yticklabels(["0", "25%", "50%", "75%", "100%"])
    bar.ax.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    bar.set_label(label, color=theme.muted, fontsize=9)
    bar.outline.set_visible(False)


def _mark_single(axes, steps, values, color: str) -> None:
    """A line through one point is invisible; show the point."""
    if len(steps) == 1:
        axes.plot(steps, values, color=color, marker="o", markersize=4)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values at each place (fewer at the beginning)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _cycle(colors: Sequence[str]):
    while True:
        yield from colors


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.family": "sans-serif"}):
        # No creation date or version in the file: the same run gives the same bytes.
        figure.savefig(
            buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": MARK}
        )
    return buffer.getvalue()
