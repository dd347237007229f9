"""What a report says first: what holds, at which radius, against what, and how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..evaluation.certified import Certified
from ..evaluation.certified import Point as CertifiedPoint
from ..evaluation.results import Entry, Results, is_weak
from .alike import answering_alike, is_of
from .shown import NORMS, radius_text

_CERTIFIED_SHOWN = 4  # radii of a certificate


@dataclass
class Verdict:
    """Of one network.

    Attributes:
        labels: of its runs.
        clean: without attack, of the run with the most images.
        left: by norm, the worst case at each radius, and how many attacks it is of.
        nearest: attacks that seek the nearest image that fools it: each with its median distance.
        weak: labels of evaluations that say little, for they attacked weakly.
        masked: labels of evaluations in which attacks were not possible, for the model passes no gradient.
        certified: certificates, each with some of its radii.
        failed, passed: names of honesty checks; both empty where none was made.
    """

    labels: list[str] = field(default_factory=list)
    clean: Entry | None = None
    left: dict[str, list[tuple[str, Entry, int]]] = field(default_factory=dict)
    nearest: list[Entry] = field(default_factory=list)
    weak: list[str] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)
    certified: list[tuple[Certified, Sequence[CertifiedPoint]]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)


def verdicts(runs: Mapping[str, Results], certified: Mapping[str, Certified]) -> list[Verdict]:
    """A verdict a network and test set, in the order of the runs; of each number of draws its own.

    Args:
        runs, certified: evaluations and certifications by their labels.
    """
    found: list[tuple[Verdict, Results | Certified]] = []
    for group in answering_alike(runs):
        verdict = Verdict()
        for label, results in group.items():
            verdict.labels.append(label)
            _add(verdict, label, results)
        found.append((verdict, next(iter(group.values()))))
    for label, each in certified.items():
        same = [verdict for verdict, other in found if is_of(each, other)]
        verdict = same[0] if same else Verdict()
        if not same:
            found.append((verdict, each))
        verdict.labels.append(label)
        shown = each.known if len(each.known) == len(each.wanted) else _some(each.curve)
        verdict.certified.append((each, shown))
    return [verdict for verdict, _ in found]


def _add(verdict: Verdict, label: str, results: Results) -> None:
    if verdict.clean is None or results.clean.images > verdict.clean.images:
        verdict.clean = results.clean
    if is_weak([results]):
        verdict.weak.append(label)
    if results.impossible:
        verdict.masked.append(label)
    for entry in results.worst_case:
        if entry.norm is not None and entry.eps is not None:
            attacks = sum((each.norm, each.eps) == (entry.norm, entry.eps) for each in results.attacks)
            where = verdict.left.setdefault(NORMS.get(entry.norm, entry.norm), [])
            where.append((radius_text(entry.eps, entry.norm, results.bounds), entry, attacks))
            where.sort(key=lambda item: (item[1].eps or 0.0, item[1].accuracy))
    if not is_weak([results]):
        verdict.nearest += [each for each in results.attacks if each.eps is None and each.c is None]
    for check in results.checks or ():
        names = {True: verdict.passed, False: verdict.failed}.get(bool(check.passed), [])
        if check.passed is not None and check.name not in names:
            names.append(check.name)
    verdict.passed = [name for name in verdict.passed if name not in verdict.failed]


def _some(curve: Sequence[CertifiedPoint]) -> list[CertifiedPoint]:
    """A few radii of a curve that say something: up to the last at which anything is certified."""
    telling = [point for point in curve if point.radius > 0 and point.accuracy > 0]
    every = max(1, -(-len(telling) // _CERTIFIED_SHOWN))
    return telling[every - 1 :: every]
