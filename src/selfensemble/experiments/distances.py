"""Networks compared by the distance that C&W with binary search is allowed."""

from collections.abc import Callable, Sequence

import numpy as np

from ..report.figures import Line
from ..report.intervals import Share, mean
from ..report.page import Table
from .judged import accuracy, wrong
from .records import Record

RADII = (0.1, 0.25, 0.5, 0.75, 1.0)
# What ours is compared with image by image.
_RIVALS = ("rse", "gaussian", "smoothadv", "adversarial", "trades", "rse-learned")
_CAPTION = """\
Accuracy in % under C&W with binary search over c, averaged over noise, within each distance: the nearest
image that the attack found is moved on in the same direction as far as the distance allows, and judged on
fresh noise; images that it did not fool within the distance stay unchanged. The last column is the median
distance of the nearest images found, over all images."""


def by_radius(record: Record) -> dict[float, str]:
    """Keys of the entries of C&W with binary search by radius; no attack is 0."""
    found = {
        entry["eps"]: key
        for key, entry in record.facts.entries.items()
        if entry["attack"] == "cw" and entry["eps"] is not None
    }
    return {0.0: "clean"} | dict(sorted(found.items()))


def median_distance(record: Record) -> float:
    """Median distance of the nearest images found; 0 where none is needed, infinite where there is none."""
    entries = record.facts.entries.items()
    keys = [key for key, entry in entries if entry["attack"] == "cw" and entry["eps"] is None]
    if not keys:
        raise ValueError(f"{record.facts.network}: no C&W with binary search among the stored results")
    distance = record.numbers(f"{keys[0]}.l2")
    # An image that has moved was confirmed while the attack ran; at the boundary one answer proves little.
    found = (distance > 0) | wrong(record, keys[0])
    return float(np.median(np.where(found, distance, np.inf)))


def distance_table(records: Sequence[Record]) -> list[Table]:
    """Accuracy by the distance that the attack is allowed, for all networks."""
    keys = [by_radius(record) for record in records]
    radii = sorted({radius for each in keys for radius in each})
    rows = []
    for record, own in zip(records, keys, strict=True):
        shares = [accuracy(record, own[radius]).text if radius in own else "\N{EN DASH}" for radius in radii]
        median = median_distance(record)
        rows.append([record.facts.title, *shares, f"{median:.3f}" if np.isfinite(median) else "not fooled"])
    head = ["defense", *(f"L2 {radius:g}" if radius else "no attack" for radius in radii), "median L2"]
    return [Table("Accuracy by distance", _CAPTION, head, rows)]


def distance_lines(records: Sequence[Record]) -> list[Line]:
    """A line a network: accuracy at every distance."""
    lines = []
    for look, record in enumerate(records):
        shares: dict[float, Share] = {r: accuracy(record, key) for r, key in by_radius(record).items()}
        lines.append(Line(record.facts.title, look, list(shares), list(shares.values())))
    return lines


def gain_table(
    records: Sequence[Record], more: Callable[[Record], dict[str, str]] = lambda _: {}
) -> list[Table]:
    """Ours against RSE and rivals on the same images: of the entries that `more` names, then by distance."""
    named = {record.facts.network: record for record in records}
    if not {"rse", "ours"} <= named.keys():
        return []
    ours, others = named["ours"], [named[name] for name in _RIVALS if name in named]
    keys = more(ours) | {f"C&W, L2 {radius:g}": key for radius, key in by_radius(ours).items() if radius}
    rows = []
    for what, key in keys.items():
        mine = ours.bits(f"{key}.right")[:, 0].astype(float)
        gains = [mean(mine - record.bits(f"{key}.right")[:, 0]) for record in others]
        each = [
            f"{100 * gain.value:+z.1f} ({100 * gain.low:+z.1f} to {100 * gain.high:+z.1f})" for gain in gains
        ]
        rows.append([what, *each])
    caption = "Accuracy of ours less that of the other, in points, with the paired 95 % interval."
    return [Table("Ours against others", caption, ["", *(record.facts.title for record in others)], rows)]
