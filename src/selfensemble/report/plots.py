"""Plots as PNG files, without touching matplotlib's global state."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..evaluation.results import Entry
from ..runtime.files import atomic_write
from ..runtime.packages import needs

with needs("selfensemble[report]"):
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinguishable with any colour vision; markers tell the lines apart in grey.
_STYLES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, all of it or nothing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    atomic_write(path, buffer.getvalue())


def accuracy_curves(curves: Mapping[str, Sequence[Entry]], title: str) -> Figure:
    """Accuracy with its 95 % interval, against c on the left and against distortion on the right."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, points), (color, marker) in zip(curves.items(), _STYLES, strict=False):
        accuracy = np.array([100 * point.accuracy for point in points])
        intervals = np.array([(point.low, point.high) for point in points]).T * 100
        bars = np.abs(intervals - accuracy)
        style: dict[str, Any] = {
            "color": color, "marker": marker, "markersize": 5, "capsize": 3, "label": name,
        }  # fmt: skip
        left.errorbar([point.c or 0.0 for point in points], accuracy, yerr=bars, **style)
        right.errorbar([point.rms_l2 for point in points], accuracy, yerr=bars, **style)
    smallest = min(point.c for points in curves.values() for point in points if point.c)
    left.set_xscale("symlog", linthresh=smallest)
    left.set_xlim(left=0)
    left.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    left.set_xlabel("strength c of the attack (0: no attack)")
    right.set_xlabel("distortion, RMS L2 (images in [0, 1])")
    left.set_ylabel("accuracy, % (bars: 95 % interval)")
    left.set_ylim(-2, 102)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(title)
    return figure


def gallery(rows: Mapping[str, tuple[Tensor, Sequence[str]]], title: str) -> Figure:
    """A grid of images.

    Args:
        rows: by its label, the images (N, C, H, W) of a row in [0, 1] with a caption for each.
        title: above the grid.
    """
    count = max(len(captions) for _, captions in rows.values())
    figure = Figure(figsize=(1.15 * count + 1.9, 1.4 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, (images, captions)) in zip(grid, rows.items(), strict=True):
        for column, axes in enumerate(line):
            axes.set_xticks([])
            axes.set_yticks([])
            if column >= len(captions):
                axes.axis("off")
                continue
            picture = images[column].permute(1, 2, 0).squeeze(-1).cpu().numpy()
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_title(captions[column], fontsize=8)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
