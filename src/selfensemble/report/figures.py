"""Line plots as SVG files whose bytes depend on their data alone."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.packages import needs
from .intervals import Share

with needs("selfensemble[report]"):
    import matplotlib
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinguishable with any colour vision; markers and dashes tell lines apart in grey.
_COLORS = ("#000000", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Line:
    """One line; `look` numbers its colour, marker and dash; `steps`: between points it has the next y."""

    label: str
    look: int
    x: Sequence[float]
    y: Sequence[Share | float]
    steps: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot of a figure; shares are drawn in per cent."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    scale: str = "linear"  # or "log", "symlog"
    percent: bool = True


def draw(panels: Sequence[Sequence[Panel]], *, share_x: bool = False) -> Figure:
    """A grid of panels with one legend below them; `share_x`: those of a row have the same axis."""
    rows, columns = len(panels), max(len(row) for row in panels)
    figure = Figure(figsize=(5.2 * columns, 3.7 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex="row" if share_x else "none")
    shown: dict[str, Any] = {}
    for row, cells in zip(panels, grid, strict=True):
        for axes in cells[len(row) :]:
            axes.axis("off")
        for panel, axes in zip(row, cells, strict=False):
            for line in panel.lines:
                shown.setdefault(line.label, _draw_line(axes, line, 100 if panel.percent else 1))
            _draw_axes(axes, panel)
    for ncols in range(min(4, len(shown) or 1), 0, -1):  # the most columns that fit
        legend = figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=ncols)
        if ncols == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    return figure


def _draw_line(axes: matplotlib.axes.Axes, line: Line, unit: float) -> Any:
    shares = [y if isinstance(y, Share) else Share(y, y, y) for y in line.y]
    y = [unit * share.value for share in shares]
    below = [max(0.0, unit * (share.value - share.low)) for share in shares]
    above = [max(0.0, unit * (share.high - share.value)) for share in shares]
    return axes.errorbar(
        list(line.x), y, yerr=[below, above] if any(below + above) else None, label=line.label,
        color=_COLORS[line.look % len(_COLORS)], marker=_MARKERS[line.look % len(_MARKERS)],
        linestyle=_DASHES[line.look // len(_COLORS) % len(_DASHES)],
        drawstyle="steps-pre" if line.steps else "default",
        markersize=4, markevery=max(1, len(y) // 12), linewidth=1.4, elinewidth=0.8, capsize=2,
    )  # fmt: skip


def _draw_axes(axes: matplotlib.axes.Axes, panel: Panel) -> None:
    positive = [x for line in panel.lines for x in line.x if x > 0]
    if panel.scale == "symlog" and positive:
        axes.set_xscale("symlog", linthresh=min(positive))
        axes.set_xlim(left=-min(positive) / 4)
    elif panel.scale == "log":
        axes.set_xscale("log")
    if panel.scale != "linear":
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, position: "")
    if panel.percent:
        axes.set_ylim(-3, 103)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(alpha=0.3)


def svg(figure: Figure) -> bytes:
    """The figure as an SVG with text as text, without the time."""
    buffer = io.BytesIO()
    # The only way to tell the SVG backend; left as it was afterwards.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "selfensemble"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
