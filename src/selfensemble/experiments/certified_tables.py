"""Tables of certificates: accuracy by radius, probabilities, draws, means against votes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..certainty.certification import METHODS, Method
from ..certainty.search import largest_radius
from ..report.intervals import mean, share
from ..report.page import Table
from ..report.published import CERTIFIED, COHEN, is_theirs
from .records import Record

RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25)
_LEVELS = (0.5, 0.7, 0.9, 0.99, 0.999)  # probabilities
_SHARE = 2  # a radius is looked for if this part of n draws can certify it


def sought(radii: Sequence[float], std: float, alpha: float, n: int) -> tuple[float, ...]:
    """Those of the radii that are looked for.

    Not those for which most of n draws have to agree: the images that are certified draw nearly to the end.
    """
    most = largest_radius(std, alpha, max(2, n // _SHARE))
    return tuple(radius for radius in radii if radius <= most)


def looked_for(record: Record, radius: float) -> bool:
    """Whether the certificates of a record can tell anything about a radius."""
    radii = record.facts.entries["certificate"].get("sought")
    return not radii or radius <= max(radii)


def reach(record: Record, method: Method) -> NDArray[np.float64]:
    """(N,) certified radius of each image; -1 where the answer is wrong or missing."""
    right = record.numbers(f"{method}.answer") == record.numbers("label")
    radii: NDArray[np.float64] = np.where(right, record.numbers(f"{method}.radius"), -1.0)
    return radii


def row(record: Record, method: Method) -> list[str]:
    """Certified accuracy of a network at each radius, and its draws."""
    radii = reach(record, method)
    accuracies = [share(radii >= radius).text if looked_for(record, radius) else "" for radius in RADII]
    abstained = share(record.numbers(f"{method}.answer") < 0)
    settings, drawn = record.facts.settings, f"{method}.all-draws"
    draws = record.numbers(drawn).mean() if drawn in record.columns else settings["n0"] + settings["n"]
    return [
        f"{record.facts.title}, {method}",
        *accuracies,
        f"{100 * abstained.value:.1f}",
        f"{settings['n']:,}",
        f"{draws:,.0f}",
    ]


def published(records: Sequence[Record]) -> list[list[str]]:
    """What others published, of all or every 20th of the test images."""
    if not is_theirs(records[0].facts.source):
        return []
    theirs = {f"Cohen et al., ResNet-110, std {std:g}": known for std, known in COHEN.items()}
    theirs |= {f"{name}, ResNet-110, std 0.25": known for name, known in CERTIFIED.items()}
    return [
        [name, *(f"{known[radius]}" if radius in known else "" for radius in RADII), "", "100,000", ""]
        for name, known in theirs.items()
    ]


def probabilities(records: Sequence[Record]) -> list[Table]:
    """How sure the networks are of the right answer; older records do not say."""
    rows = []
    for record in (each for each in records if "vote.estimate" in each.columns):
        for method in METHODS:
            right = record.numbers(f"{method}.answer") == record.numbers("label")
            values = np.where(right, record.numbers(f"{method}.estimate"), 0.0)
            rows.append(
                [f"{record.facts.title}, {method}", *(f"{100 * (values >= p).mean():.1f}" for p in _LEVELS)]
            )
    caption = (
        "Share of the images, in per cent, that are answered correctly and whose answer had at least that "
        "share of the votes, or that mean probability, in the draws: estimates, not bounds."
    )
    head = ["network", *(f"{p:g}" for p in _LEVELS)]
    return [Table("Probability of the right answer", caption, head, rows)] if rows else []


def draws_head() -> list[str]:
    """Names of the columns of `draws`."""
    return ["network", "n", *(f"{what}, {by}" for by in METHODS for what in ("certified", "mean draws"))]


def draws(record: Record) -> list[str]:
    """Images of which the wanted radius is certified, and draws for it."""
    cells = [record.facts.title, f"{record.facts.settings['n']:,}"]
    for method in METHODS:
        reached = share(record.numbers(f"{method}.reached") > 0)
        cells += [reached.text, f"{record.numbers(f'{method}.draws').mean():,.0f}"]
    return cells


def against_votes(record: Record) -> list[str]:
    """Paired differences at each radius."""
    vote, means = (reach(record, method) for method in METHODS)
    return [
        points((means >= radius).astype(float) - (vote >= radius)) if looked_for(record, radius) else ""
        for radius in RADII
    ]


def points(differences: NDArray[np.float64]) -> str:
    """Their mean with its interval, in points."""
    figure = mean(differences)
    return f"{100 * figure.value:+z.1f} ({100 * figure.low:+z.1f} to {100 * figure.high:+z.1f})"
