"""Which plots a report shows of its runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.certified import Certified
from ..evaluation.certified import Point as CertifiedPoint
from ..evaluation.results import Entry, Impossible, Results
from .alike import is_of
from .published import COHEN, is_theirs
from .svg import Line, Plot, Point, line

NORMS = {"linf": "L\N{INFINITY}", "l2": "L2", "l1": "L1"}
_CLEAN_DASH = "3.5 2"


Bounds = tuple[float, float] | None


def threat_model(entry: Entry | Impossible, bounds: Bounds = None) -> str:
    """What the attacker of `entry` may do, in words; `bounds` of the inputs, None for [0, 1]."""
    if entry.attack == "none":
        return "No attack"
    norm = NORMS.get(entry.norm, entry.norm) if entry.norm else None
    if norm and entry.eps is not None:
        return f"{norm}, \N{GREEK SMALL LETTER EPSILON} = {radius_text(entry.eps, entry.norm, bounds)}"
    if isinstance(entry, Entry) and entry.c is not None:
        return "Fixed strength c"
    return f"Minimum distance, {norm}" if norm else "Minimum distance"


def row_title(entry: Entry) -> str:
    """The title of an entry within its threat model."""
    return entry.title if entry.c is None else f"{entry.title}, c = {entry.c:g}"


def radius_text(eps: float, norm: str | None, bounds: Bounds = None) -> str:
    """A radius as it is usually named: in 1/255 where it is one of single pixels in [0, 1]."""
    if bounds is not None:
        return f"{eps:.6g} of inputs in [{bounds[0]:g}, {bounds[1]:g}]"
    steps = 255 * eps
    if norm != "linf" or not eps:
        return f"{eps:.6g}"
    return f"{round(steps)}/255" if abs(steps - round(steps)) < 1e-4 else f"{eps:.6g} ({steps:.3g}/255)"


def _name(entry: Entry, among: Sequence[Entry], bounds: Bounds) -> str:
    """The title of an entry, with its threat model where others bear the same title."""
    title = row_title(entry)
    same = [other for other in among if row_title(other) == title]
    return f"{title} ({threat_model(entry, bounds)})" if len(same) > 1 else title


def protocol_plots(runs: Mapping[str, Results]) -> list[Plot]:
    """The plots that the runs of one protocol, by their labels, have data for."""
    norms = {entry.norm for results in runs.values() for entry in results.attacks if entry.eps is not None}
    plots = [_against_c(runs), *(_against_eps(runs, norm) for norm in NORMS if norm in norms)]
    plots += [_against_distortion(runs), _against_draws(runs), *_persistent(runs)]
    return [plot for plot in plots if plot.lines]


def certified_plot(certified: Mapping[str, Certified], runs: Mapping[str, Results]) -> Plot:
    """Certified accuracy by radius, beside what attacks leave of the same networks and what others published.

    Args:
        certified: runs of `certify`, by their labels.
        runs: evaluations, by their labels.
    """
    lines = [
        line(
            number, 0, f"{label}, certified by {each.settings.get('method', 'mean')}",
            tuple(Point(point.radius, point.accuracy, point.low, point.high) for point in each.known),
            2, thick=True, steps=True,
        )
        for number, (label, each) in enumerate(certified.items())
    ]  # fmt: skip
    for label, results in runs.items():
        lowest = _lowest(results)
        of = [number for number, each in enumerate(certified.values()) if is_of(each, results)]
        if of and lowest:
            points = (_point(0, results.clean), *(_point(eps, entry) for eps, entry in lowest.items()))
            number = of[0]
            lines.append(line(number, 1, f"{label}, under attack", points, 2, dash=_CLEAN_DASH))
    dashed = (
        "Dashed: the accuracy that attacks within that distance leave, which no certificate can exceed. "
        if len(lines) > len(certified)
        else ""
    )
    if any(is_theirs(each.data.source) for each in certified.values()):
        for number, (std, known) in enumerate(COHEN.items(), len(certified)):
            points = tuple(Point(radius, share / 100) for radius, share in known.items())
            lines.append(line(number, 2, f"Cohen et al., std {std:g} (published, ResNet-110)", points, 2))
    caption = (
        "Share of images that are classified correctly with a certificate of at least that radius; between "
        "two radii, what is certified at the larger one. "
        f"{dashed}Bars: 95 % intervals."
    )
    return Plot("Certified accuracy", caption, "L2 radius (images in [0, 1])", "accuracy", tuple(lines))


@dataclass(frozen=True)
class Between:
    """What is known of a network at a radius: at least `certified`, at most `attacked`.

    Attributes:
        radius: L2.
        certified: share that is classified correctly with a certificate of that radius or a larger one; None
            where the curve ends before.
        attacked: the attack that leaves least.
    """

    radius: float
    certified: CertifiedPoint | None
    attacked: Entry


def between(certified: Certified, runs: Mapping[str, Results]) -> dict[str, list[Between]]:
    """By labels of the evaluations of the same network, a row for each radius that was attacked."""
    found = {}
    for label, results in runs.items():
        lowest = _lowest(results)
        if is_of(certified, results) and lowest:
            found[label] = [Between(eps, _at_least(certified, eps), entry) for eps, entry in lowest.items()]
    return found


def _at_least(certified: Certified, eps: float) -> CertifiedPoint | None:
    return next((point for point in certified.curve if point.radius >= eps - 1e-9), None)


def _lowest(results: Results) -> dict[float, Entry]:
    """By L2 radius, what is left within it.

    The worst case, which is judged again after the choice among attacks; where there is none, what the
    strongest attack leaves.
    """
    lowest: dict[float, Entry] = {}
    worst = {id(each) for each in results.worst_case}
    entries = [each for each in (*results.attacks, *results.worst_case) if each.norm == "l2" and each.eps]
    for entry in sorted(entries, key=lambda each: (each.eps or 0, id(each) not in worst, each.accuracy)):
        lowest.setdefault(entry.eps or 0, entry)
    return lowest


def _against_c(runs: Mapping[str, Results]) -> Plot:
    caption = (
        "Accuracy under attacks of a fixed strength c; c = 0 is no attack. What a c does depends on the "
        "scale of a network's logits: compare networks by distortion instead. Bars: 95 % intervals."
    )
    lines = _curves(runs, lambda entry: entry.c, lambda entry: entry.c)
    label = "strength c of the attack"
    return Plot("Accuracy against the strength c", caption, label, "accuracy", lines, "symlog")


def _against_eps(runs: Mapping[str, Results], norm: str) -> Plot:
    usual = all(results.bounds is None for results in runs.values())
    unit = 255 if norm == "linf" and usual else 1
    caption = (
        f"Accuracy under attacks that may change an image by at most \N{GREEK SMALL LETTER EPSILON} in "
        f"{NORMS[norm]}. The worst case takes for every image the attack that harms it most; single attacks "
        "are in the table. Bars: 95 % intervals."
    )

    def radius(entry: Entry) -> float | None:
        return entry.eps * unit if entry.norm == norm and entry.eps is not None else None

    x_label = f"\N{GREEK SMALL LETTER EPSILON} ({NORMS[norm]})" + (
        ", in 1/255" if unit == 255 else "" if usual else ", in the units of the inputs"
    )
    lines = _curves(runs, radius, radius)
    return Plot(f"Accuracy against the radius, {NORMS[norm]}", caption, x_label, "accuracy", lines)


def _against_distortion(runs: Mapping[str, Results]) -> Plot:
    caption = (
        "Accuracy against the distance that attacks without a fixed radius needed; 0 is no attack. "
        "A line farther right is a network that needs larger changes. An attack that seeks the minimum "
        "distance is a single mark. Bars: 95 % intervals."
    )

    def order(entry: Entry) -> float | None:
        return (entry.c or 0.0) if entry.eps is None and entry.norm in (None, "l2") else None

    lines = _curves(runs, order, lambda entry: entry.rms_l2)
    x_label = "distortion, RMS L2 (images in [0, 1])"
    return Plot("Accuracy against distortion", caption, x_label, "accuracy", lines)


def _against_draws(runs: Mapping[str, Results]) -> Plot:
    """Lines join runs of one network: other differences would pass for an effect of the draws."""
    networks: list[list[Results]] = []
    for results in runs.values():
        same = [group for group in networks if all(_differ_in_draws_alone(results, each) for each in group)]
        if same:
            same[0].append(results)
        else:
            networks.append([results])
    several = [group for group in networks if len({each.model.draws for each in group}) > 1]
    kinds: dict[str, int] = {}
    lines = []
    for number, group in enumerate(several):
        entries: dict[str, list[tuple[int, Entry]]] = {}
        for results in group:
            shown = (results.clean, *(results.worst_case or results.attacks))
            for entry in shown:
                entries.setdefault(_name(entry, shown, results.bounds), []).append(
                    (results.model.draws, entry)
                )
        for title, pairs in entries.items():
            points = tuple(sorted(_point(draws, entry) for draws, entry in pairs))
            label = f"{group[0].model.name}, {title}" if len(several) > 1 else title
            kind = kinds.setdefault(title, len(kinds))
            lines.append(line(number, kind, label, points, len(several)))
    caption = (
        "Accuracy by the number of noise draws per prediction, for runs with the same model name and noise. "
        "Bars: 95 % intervals."
    )
    x_label = "draws a prediction"
    return Plot("Accuracy against the number of draws", caption, x_label, "accuracy", tuple(lines), "log")


def _differ_in_draws_alone(one: Results, other: Results) -> bool:
    same = (one.data.digest, one.model.precision) == (other.data.digest, other.model.precision)
    return same and is_of(one, other)


def _persistent(runs: Mapping[str, Results]) -> list[Plot]:
    """A plot for the worst cases of each norm, or one of unchanged images alone."""
    norms = {entry.norm for results in runs.values() for entry in results.worst_case}
    return [_persistent_within(runs, norm) for norm in NORMS if norm in norms] or [
        _persistent_within(runs, None)
    ]


def _persistent_within(runs: Mapping[str, Results], norm: str | None) -> Plot:
    caption = (
        "The persistent attacker: the share of images for which at least one of k queries gets a wrong "
        "answer. Dashed: unchanged images, which get wrong answers now and then, too."
        + (" Solid: worst case under attack." if norm else "")
    )
    kinds: dict[str, int] = {}
    lines = []
    for number, (label, results) in enumerate(runs.items()):
        shown = (results.clean, *results.worst_case)
        for entry in shown:
            if entry is not results.clean and entry.norm != norm:
                continue
            points = tuple(Point(k, share) for k, share in sorted(entry.persistent.items()) if k > 0)
            title = _name(entry, shown, results.bounds)
            kind = kinds.setdefault(title, len(kinds))
            name = f"{label}, {title}" if len(runs) > 1 else title
            if len(points) > 1:
                dash = _CLEAN_DASH if entry is results.clean else None
                lines.append(line(number, kind, name, points, len(runs), dash=dash))
    title = f"The persistent attacker, {NORMS[norm]}" if norm else "The persistent attacker"
    return Plot(title, caption, "queries k", "images with a wrong answer", tuple(lines), "log")


def _curves(
    runs: Mapping[str, Results],
    order: Callable[[Entry], float | None],
    x: Callable[[Entry], float | None],
) -> tuple[Line, ...]:
    """A line per run and kind of attack, from no attack at x = 0 on.

    Args:
        runs: by their labels.
        order: the strength of an attack, None where it does not belong on the plot.
        x: where it stands on the plot.
    """
    kinds = {"worst case": 0}
    lines = []
    for number, (label, results) in enumerate(runs.items()):
        worst = [entry for entry in results.worst_case if order(entry) is not None]
        # What is left at a radius is the worst case; single attacks stand in the table.
        wanted = worst or [entry for entry in results.attacks if order(entry) is not None]
        for kind, entries in _families(wanted, order):
            shown = [_point(x(entry) or 0.0, entry) for entry in entries]
            # An attack of minimum distance is a point: no line leads there.
            if all(entry.eps is not None or entry.c is not None for entry in entries) and min(shown).x > 0:
                shown.append(_point(0.0, results.clean))
            name = f"{label}, {kind}" if len(runs) > 1 else kind
            place = kinds.setdefault(kind, len(kinds))
            lines.append(
                line(number, place, name, tuple(sorted(shown)), len(runs), thick=kind == "worst case")
            )
    return tuple(lines)


def _families(
    entries: Sequence[Entry], order: Callable[[Entry], float | None]
) -> Iterator[tuple[str, list[Entry]]]:
    """Entries of one title, apart by the settings in which entries of equal strength differ."""
    by_title: dict[str, list[Entry]] = {}
    for entry in entries:
        by_title.setdefault(entry.title, []).append(entry)
    for title, members in by_title.items():
        differing: set[str] = set()
        for one in members:
            for other in members:
                if order(one) == order(other):
                    names = one.settings.keys() | other.settings.keys()
                    differing |= {n for n in names if one.settings.get(n) != other.settings.get(n)}
        families: dict[str, list[Entry]] = {}
        for entry in members:
            values = ", ".join(f"{name}={entry.settings.get(name)}" for name in sorted(differing))
            families.setdefault(f"{title} ({values})" if values else title, []).append(entry)
        yield from families.items()


def _point(x: float, entry: Entry) -> Point:
    return Point(float(x), entry.accuracy, entry.low, entry.high)
