"""Networks compared by the distance that C&W with binary search needs to fool them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .figures import Line
from .intervals import Share, robust_at, share
from .judged import accuracy, wrong
from .page import Table
from .records import Record

RADII = (0.1, 0.25, 0.5, 0.75, 1.0)


def search_key(record: Record) -> str | None:
    """Key of the entry of C&W with binary search, of its largest radius."""
    keys = [key for key, entry in record.facts.entries.items() if entry["attack"] == "cw"]
    return max(keys, key=lambda key: record.facts.entries[key]["eps"] or np.inf, default=None)


def accuracy_within(record: Record, radii: Sequence[float]) -> list[Share]:
    """Share of the images that are not fooled within each radius."""
    key = search_key(record)
    if key is None:
        raise ValueError(f"{record.facts.network}: no C&W with binary search among the stored results")
    distance: NDArray[np.float64] = record.numbers(f"{key}.l2")
    return [share(row) for row in robust_at(wrong(record, key), distance, np.array(radii))]


def distance_table(records: Sequence[Record]) -> list[Table]:
    """Accuracy by the distance that the attack may go, for all networks."""
    rows = []
    for record in records:
        key = search_key(record)
        lost = np.where(wrong(record, key), record.numbers(f"{key}.l2"), np.inf) if key else np.array([])
        median = float(np.median(lost))
        middle = f"{median:.3f}" if np.isfinite(median) else "not fooled"
        shares = [accuracy(record, "clean"), *accuracy_within(record, RADII)]
        rows.append([record.facts.title, *(each.text for each in shares), middle])
    caption = (
        "Share of the images, in %, whose nearest adversarial image found by C&W with binary search over c "
        "and expectation over noise lies farther than the distance, or is answered rightly; the last column "
        "is the median distance over all images."
    )
    head = ["defense", "no attack", *(f"L2 {radius:g}" for radius in RADII), "median L2"]
    return [Table("Accuracy by distance", caption, head, rows)]


def distance_lines(records: Sequence[Record], farthest: float = 1.5) -> list[Line]:
    """A line a network: accuracy at every distance up to `farthest`."""
    radii = [float(radius) for radius in np.linspace(0, farthest, 31)]
    return [
        Line(record.facts.title, look, radii, [each.value for each in accuracy_within(record, radii)])
        for look, record in enumerate(records)
    ]
