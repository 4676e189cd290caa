"""Draws the figures of docs/DESIGN.md as SVG: ``python docs/figures/draw.py``.

A test compares the files with what this script draws, and their names with the code.
"""

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent
TEXT, LINE, MUTED = "#1f2933", "#52606d", "#7b8794"
KEPT, LEFT_OUT, STEP, SIDE = "#7cb5ec", "#e4e7eb", "#fdf3d8", "#e3f4e1"
STYLE = "font-family='Helvetica, Arial, sans-serif' font-size='14'"


class Figure:
    """An SVG drawing on a white ground, so that it is legible in dark pages, too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
            f"width='{width}' height='{height}' role='img' {STYLE}>",
            f"<title>{escape(title)}</title>",
            "<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' "
            f"markerHeight='7' orient='auto'><path d='M0 0L10 5L0 10z' fill='{LINE}'/></marker>"
            "</defs>",
            f"<rect width='{width}' height='{height}' fill='white'/>",
        ]

    def box(self, x, y, width, height, fill, lines=(), mono=False) -> None:
        """A box with centred lines of text."""
        self._parts.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='4' fill='{fill}' "
            f"stroke='{LINE}'/>"
        )
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * number, line, anchor="middle", mono=mono)

    def text(self, x, y, line, anchor="start", mono=False, bold=False, color=TEXT) -> None:
        """One line of text."""
        style = " font-family='Menlo, Consolas, monospace' font-size='12.5'" if mono else ""
        style += " font-weight='bold'" if bold else ""
        self._parts.append(
            f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' fill='{color}'{style}>"
            f"{escape(line)}</text>"
        )

    def arrow(self, *points, dashed=False, head=True) -> None:
        """A line through points."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        style = " stroke-dasharray='4 4'" if dashed else ""
        style += " marker-end='url(#head)'" if head else ""
        self._parts.append(
            f"<path d='{path}' fill='none' stroke='{LINE}' stroke-width='1.4'{style}/>"
        )

    def svg(self) -> str:
        """The text of the file."""
        return "\n".join([*self._parts, "</svg>", ""])


def method() -> str:
    """One sub-block on the kept blocks of a sequence."""
    figure = Figure(960, 560, "A sub-block of a layer works on the kept blocks only")
    kept, left, pitch, size = {1, 3, 4, 7}, 300, 78, 68

    def residual(y: int) -> None:
        for block in range(8):
            fill = KEPT if block in kept else LEFT_OUT
            figure.box(left + pitch * block, y, size, 34, fill, [f"block {block}"])

    figure.text(20, 67, "residual [T, H]", bold=True)
    figure.text(20, 85, "all tokens of a sequence, in blocks", color=MUTED)
    residual(50)

    figure.box(20, 118, 250, 40, SIDE, ["scorer: a score for each block"])
    figure.box(
        20, 182, 250, 58, SIDE, ["token_select: the best share", "of the blocks (keep = 0.5)"]
    )
    figure.arrow((145, 158), (145, 180))
    figure.arrow((270, 211), (left + 74, 211))
    figure.text(322, 203, "rows", anchor="middle", color=MUTED)

    compact = {block: left + 78 + pitch * place for place, block in enumerate(sorted(kept))}
    for block, x in compact.items():
        figure.box(x, 194, size, 34, KEPT, [f"block {block}"])
        figure.arrow((left + pitch * block + size / 2, 84), (x + size / 2, 192))
    figure.text(left + 410, 183, "select_norm:", color=TEXT, mono=True)
    figure.text(left + 410, 201, "x = norm(residual[rows])", mono=True)
    figure.text(left + 410, 219, "the kept rows, side by side", color=MUTED)

    figure.box(left + 78, 264, 302, 64, STEP, ["attention (or the MLP)", "of the kept rows"])
    figure.arrow((left + 229, 228), (left + 229, 262))
    figure.text(left + 410, 284, "segment_attention:", mono=True)
    figure.text(left + 410, 302, "causal among the kept rows,", color=MUTED)
    figure.text(left + 410, 320, "at their original positions", color=MUTED)

    figure.text(20, 374, "residual_scatter:", mono=True)
    figure.text(20, 392, "residual[rows] += y", mono=True)
    figure.text(20, 410, "added to the kept rows, in place", color=MUTED)
    figure.text(20, 467, "residual [T, H]", bold=True)
    figure.text(20, 485, "the same memory as above", color=MUTED)
    residual(450)
    for block, x in compact.items():
        figure.arrow((x + size / 2, 328), (left + pitch * block + size / 2, 448))

    for block in {0, 2, 5, 6}:
        x = left + pitch * block + size / 2
        figure.arrow((x, 484), (x, 506), dashed=True, head=False)
    figure.text(left, 524, "Grey blocks are left out: unchanged, nothing computed, nothing stored.")
    figure.text(left, 544, "The MLP follows in the same way, then the next layer.", color=MUTED)
    return figure.svg()


# What a batch passes, from the call of the model to its loss: code, what it does, operators.
PATH = [
    (
        "lemo.models.calls.replaced_forward.ReplacedForward",
        "model(input_ids, labels) in training: lemo answers",
        "",
    ),
    (
        "lemo.models.calls.arguments.ForwardArguments",
        "the call's arguments as one typed object, checked",
        "",
    ),
    (
        "lemo.models.training_forward.TrainingForward",
        "which kind of call it is: loss, logits, hidden states",
        "",
    ),
    (
        "lemo.packing.batch.PackedBatch",
        "[B, S] with padding becomes T rows of N sequences",
        "",
    ),
    (
        "lemo.models.layers.batch.Batch",
        "the rows in blocks (BlockLayout), with rotary tables",
        "",
    ),
    (
        "lemo.selection.selector.Selector",
        "which blocks the sub-block keeps: a Selection of rows",
        "token_select",
    ),
    (
        "lemo.models.layers.sub_blocks.Attention",
        "project, attend, output; MLP likewise",
        "select_norm, rope, segment_attention, swiglu",
    ),
    (
        "lemo.models.layers.execution.Execution",
        "how the unit runs: Stored, Recomputed, Checkpointed",
        "residual_scatter, gather_rows",
    ),
    (
        "lemo.models.layers.loss.causal_lm_loss",
        "the loss in chunks of rows, only where labels are",
        "linear_cross_entropy",
    ),
    (
        "lemo.models.calls.outputs.EliminatedOutput",
        "loss; logits are computed if they are read",
        "",
    ),
]
# Steps that are repeated for every layer, in lemo.models.layers.decoder.Decoder.
REPEATED = (5, 7)


def batch() -> str:
    """The way of one batch through the code."""
    step, top, left, width = 68, 56, 60, 400
    first, last = REPEATED
    # Room for the title of the repeated steps, and after them.
    tops = [top + step * i + 24 * (i >= first) + 16 * (i > last) for i in range(len(PATH))]
    figure = Figure(1060, tops[-1] + 60, "The way of one batch through the code")
    figure.text(left, 34, "code", bold=True)
    figure.text(left + width + 30, 34, "what happens there", bold=True)
    figure.box(left - 44, tops[first] - 34, 1034, tops[last] - tops[first] + 92, "#f5f7fa")
    layers = "for every layer, in lemo.models.layers.decoder.Decoder:"
    figure.text(left + width + 30, tops[first] - 14, layers, bold=True)
    for number, (code, what, operators) in enumerate(PATH):
        y = tops[number]
        figure.box(left, y, width, 44, SIDE if first <= number <= last else STEP, [code], mono=True)
        figure.text(left + width + 30, y + (20 if operators else 27), what)
        if operators:
            figure.text(left + width + 30, y + 39, operators, mono=True, color=LINE)
        if number + 1 < len(PATH):
            figure.arrow((left + width / 2, y + 44), (left + width / 2, tops[number + 1] - 1))
    # Back from the last repeated step to the first.
    start, end = tops[last] + 22, tops[first] + 22
    figure.arrow((left, start), (left - 26, start), (left - 26, end), (left - 2, end))
    return figure.svg()


FIGURES = {"method.svg": method, "batch.svg": batch}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
