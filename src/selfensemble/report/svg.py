"""Line plots of evaluation results, drawn as SVG for light and dark pages.

An SVG holds no text of users: names of runs are in the legend, which is HTML and wraps on a phone.
"""

import io
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..runtime.packages import needs

with needs("selfensemble[report]"):
    import matplotlib
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinguishable with any colour vision, without its black and its yellow: one
# vanishes on a dark page, the other on a light one. Markers tell the lines apart in grey.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# By matplotlib's name, the same marker as a path in a box of 24 x 12 around (12, 6).
_MARKERS = {
    "o": "M9 6a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "s": "M9 3h6v6h-6z",
    "^": "M12 2.5l3.5 6.5h-7z",
    "D": "M12 2l4 4l-4 4l-4-4z",
    "v": "M12 9.5l3.5-6.5h-7z",
    "P": "M11 2.5h2v2.5h2.5v2h-2.5v2.5h-2v-2.5h-2.5v-2h2.5z",
}
_DASHES = ("none", "6 2", "2 1.5", "6 2 1.5 2")

# Text and axes take the colour of the page's text; this one stands for it until the SVG is made.
_INK = "#010203"
_INCHES = (4.8, 3.3)
VIEW_BOX = " ".join(f"{side:g}" for side in (0, 0, 72 * _INCHES[0], 72 * _INCHES[1]))
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "selfensemble",
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}


class Point(NamedTuple):
    """A point of a line; shares in [0, 1], the ends of the interval None where there is none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """The share with its interval, in per cent."""
        share = f"{100 * self.y:z.1f}"
        if self.low is None or self.high is None:
            return share
        return f"{share} [{100 * self.low:z.1f}, {100 * self.high:z.1f}]"


@dataclass(frozen=True)
class Line:
    """One line and its look; `kind` is the number of its attack among the attacks of the plot.

    `steps`: between two points it has the second one's y.
    """

    kind: int
    label: str
    points: tuple[Point, ...]
    color: str
    width: float
    dash: str
    steps: bool = False

    @property
    def marker(self) -> str:
        return list(_MARKERS)[self.kind % len(_MARKERS)]

    @property
    def swatch(self) -> str:
        """The marker as the data of an SVG path, for the legend."""
        return _MARKERS[self.marker]


@dataclass(frozen=True)
class Plot:
    """A plot with what stands around it on the page."""

    title: str
    caption: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    scale: str = "linear"  # or "symlog", "log"

    @property
    def description(self) -> str:
        """The plot in words, for those who do not see it."""
        parts = []
        for line in self.lines:
            ends = dict.fromkeys((line.points[0], line.points[-1]))
            values = " and ".join(f"{100 * point.y:z.1f} % at {point.x:.4g}" for point in ends)
            parts.append(f"{line.label}: {values}.")
        return f"{self.y_label} against {self.x_label}. " + " ".join(parts)

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """The data as the head and the rows of a table, its first column naming the rows."""
        xs = sorted({point.x for line in self.lines for point in line.points})
        by_x = [{point.x: point.text for point in line.points} for line in self.lines]
        if 2 * sum(map(len, by_x)) < len(xs) * len(by_x):  # hardly a point stands below another
            rows = [[line.label, f"{p.x:.4g}", p.text] for line in self.lines for p in line.points]
            return ["line", self.x_label, f"{self.y_label}, %"], rows
        labels = [line.label for line in self.lines]
        cells = [[values.get(x, "\N{EN DASH}") for x in xs] for values in by_x]
        names = [f"{x:.4g}" for x in xs]
        if len(xs) > 10:
            labels, names, cells = names, labels, [list(column) for column in zip(*cells, strict=True)]
        head = f"{self.y_label}, %, by {self.x_label}"
        return [head, *names], [[label, *row] for label, row in zip(labels, cells, strict=True)]

    def svg(self, identity: str) -> str:
        """The content of an `<svg>` with `VIEW_BOX`; its ids begin with `identity`."""
        buffer = io.StringIO()
        # The only way to tell the SVG backend; left as it was afterwards.
        with matplotlib.rc_context(_RC):
            self._figure().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :].partition(">")[2].rpartition("</svg>")[0]
        # The style would reach the whole page, and the metadata say nothing new.
        text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>", "", text, flags=re.DOTALL)
        text = re.sub(r"font-family: [^;\"]*; ?", "", text)
        text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{identity}-", text)
        return text.replace("xlink:href", "href").replace(_INK, "currentColor")

    def _figure(self) -> Figure:
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.subplots()
        for line in self.lines:
            x = [point.x for point in line.points]
            y = np.array([100 * point.y for point in line.points])
            ends = [
                (100 * (p.y if p.low is None else p.low), 100 * (p.y if p.high is None else p.high))
                for p in line.points
            ]
            bars = None if all(p.low is None for p in line.points) else np.abs(np.array(ends).T - y)
            dash = (0, [float(part) for part in line.dash.split()]) if line.dash != "none" else "-"
            axes.errorbar(
                x, y, yerr=bars, color=line.color, marker=line.marker, markersize=4.5, capsize=2,
                linewidth=line.width, elinewidth=1, linestyle=dash, zorder=2 + line.width,
                drawstyle="steps-pre" if line.steps else "default",
            )  # fmt: skip
        self._scale(axes)
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label + ", %")
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
        return figure

    def _scale(self, axes: Any) -> None:
        xs = sorted({point.x for line in self.lines for point in line.points})
        if self.scale == "log":
            axes.set_xscale("log")
        elif self.scale == "symlog" and any(x > 0 for x in xs):
            smallest = min(x for x in xs if x > 0)
            axes.set_xscale("symlog", linthresh=smallest)
            axes.set_xlim(left=-smallest / 4)
        elif xs and xs[-1] > 0:
            axes.set_xlim(-0.04 * xs[-1], 1.04 * xs[-1])
        if self.scale != "linear":
            axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, position: "")
        if self.scale == "log" and len(xs) <= 6:
            axes.set_xticks(xs)


def line(
    run: int,
    kind: int,
    label: str,
    points: tuple[Point, ...],
    runs: int,
    *,
    thick: bool = False,
    dash: str | None = None,
    steps: bool = False,
) -> Line:
    """Colours tell runs apart, or kinds where there is one run; dashes where the colours are used up."""
    chosen = run if runs > 1 else kind
    if dash is None:
        dash = _DASHES[chosen // len(_COLORS) % len(_DASHES)]
    return Line(kind, label, points, _COLORS[chosen % len(_COLORS)], 2.8 if thick else 1.3, dash, steps)
