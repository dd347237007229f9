"""Certified radii: within them no change of an image changes the infinite ensemble's answer.

Noise N(0, std^2) on the image makes any function with values in [0, 1] smooth: `Phi^-1` of its mean over the
noise changes by at most `|d|_2 / std` when the image moves by d. Applied to the vote of single draws this is
the certificate of Cohen et al.; applied to the softmax outputs it is one of the mean probability, the
predictor that a self-ensemble is. Noise inside the network is part of the function whose mean is taken.

Source: Cohen, Rosenfeld, Kolter, Certified adversarial robustness via randomized smoothing, ICML 2019,
theorem 1 and algorithm 2; Salman et al., Provably robust deep learning via adversarially trained smoothed
classifiers, NeurIPS 2019, lemma 2.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ..ensemble.checks import check_count, check_images, is_number
from ..ensemble.draws import Draws, check_finite
from ..ensemble.ensemble import SelfEnsemble
from ..noise.injection import eval_mode
from ..noise.streams import DRAWS
from .bounds import MeanBound
from .decision import check_alpha
from .grid import grid_noise
from .pixels import pixel_std
from .search import Aims, Search, largest_radius
from .statistics import APART, Means, Rivals, Votes

Method = Literal["vote", "mean"]
METHODS: tuple[Method, ...] = get_args(Method)
Verdict = Literal["reached", "out-of-reach", "open"]
VERDICTS: dict[int, Verdict] = {1: "reached", -1: "out-of-reach", 0: "open"}  # of `Certificate.verdict`
Progress = Callable[[int, int], None]
_ROOM = 2**25  # probabilities that are remembered at a time
_FIRST, _EVERY = 16, 8  # draws before the first look, and the share of them after which the next one is


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is certified for each of B images.

    Attributes:
        label: (B,) int64, the infinite ensemble's answer; -1 where nothing could be certified.
        radius: (B,) float64, L2 in the units of the image; 0 where nothing could be certified.
        lower: (B,) float64, lower bound of the answer's probability (of votes, or its mean).
        upper: (B,) float64, upper bound of every rival's.
        estimate: (B,) float64, share of the votes, or mean of the probability, that the answer had in the
            draws of estimation; it proves nothing.
        draws: (B,) int64, those of selection included.
        verdict: (B, R) int64, for each of R wanted radii, in rising order: 1 where the answer is certified
            within it, -1 where it is proven that no answer is certain within it, 0 where neither is.

    Label and radius are wrong with probability alpha at most, for each image, and so is a verdict of -1.
    Where bets on a wanted radius ended the draws, they prove that radius, and `lower` and `upper` are NaN.
    """

    label: Tensor
    radius: Tensor
    lower: Tensor
    upper: Tensor
    estimate: Tensor
    draws: Tensor
    verdict: Tensor


def certify(
    ensemble: SelfEnsemble,
    inputs: Tensor,
    *,
    alpha: float = 0.001,
    n0: int = 100,
    n: int = 10_000,
    method: Method = "mean",
    rivals: Rivals = "runner_up",
    bound: MeanBound | None = None,
    radius: float | Sequence[float] | None = None,
    give_up: float = 0.05,
    grid: bool = False,
    max_batch: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Radii within which no change of an image changes the infinite ensemble's answer.

    The images of a batch share their noise, which saves random numbers: the draws of each image are
    independent of each other, and its certificate needs nothing else.

    Args:
        ensemble: in the form that will predict: the certificate is for the network as given.
        inputs: (B, ...) images in the ensemble's bounds.
        alpha: the risk, for each image, that its certificate is wrong.
        n0: number of draws that select the answer; other draws estimate its probability.
        n: number of draws that estimate the probability.
        method: "vote" is about the class that most single draws choose, "mean" about the mean probability,
            which is what `predict` averages.
        rivals: "all" takes one minus the answer's probability for its rivals' ("one against all"),
            "runner_up" bounds each rival's as well, with half of alpha.
        bound: for "mean", how means are bounded, see `mean_lower`. By default "betting" or "binomial", for
            each mean the one that its draws of selection say is narrower.
        radius: a target radius, or several: an image stops when each of them is certified, proven to be out
            of reach of the answer that selection chose, or given up. Half of alpha is spent on stopping
            early, see `anytime`.
        give_up: risk that an image is given up whose answer n draws would likely certify; 0 to draw until
            each wanted radius is decided for that answer.
        grid: draw the noise on the image on a grid that holds 8-bit images, so that the radius holds for all
            8-bit images within it in floating-point arithmetic, not only for real numbers; see `grid_noise`.
            A seed gives different draws.
        max_batch, seed: see `SelfEnsemble.predict`.
        progress: called with draws done and all of them, of images times draws.

    Returns:
        Labels and radii, on the CPU.

    Raises:
        ValueError, TypeError: a network whose image noise cannot be accounted for (see `pixel_std`), bad
            inputs or settings.
    """
    found = certificates(
        ensemble, inputs, (method,), alpha=alpha, n0=n0, n=n, rivals=rivals, bound=bound, radius=radius,
        give_up=give_up, grid=grid, max_batch=max_batch, seed=seed, progress=progress,
    )  # fmt: skip
    return found[method]


def certificates(
    ensemble: SelfEnsemble,
    inputs: Tensor,
    methods: Sequence[Method],
    *,
    alpha: float = 0.001,
    n0: int = 100,
    n: int = 10_000,
    rivals: Rivals = "runner_up",
    bound: MeanBound | None = None,
    radius: float | Sequence[float] | None = None,
    give_up: float = 0.05,
    grid: bool = False,
    max_batch: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    std: float | None = None,
) -> dict[Method, Certificate]:
    """By several methods from the same draws, see `certify`: risk `alpha` each; `std` if it is known."""
    check_images(inputs, ensemble.bounds)
    _check_names(methods, rivals, bound)
    _check_numbers(alpha, n0, n, seed, give_up)
    wanted = wanted_radii(radius)
    size = None if max_batch is None else check_count("max_batch", max_batch)
    if len(inputs) == 0:
        return dict.fromkeys(methods, _of_no_images(len(wanted)))
    std = pixel_std(ensemble, inputs) if std is None else std
    check_reach(wanted, std, alpha, n)
    aims = partial(Aims, std, alpha, n, wanted, give_up=give_up)
    measures: dict[Method, Callable[..., Votes | Means]]
    measures = {"vote": Votes, "mean": partial(Means, bound=bound, seed=seed)}
    done, total, report = 0, len(inputs) * (n0 + n), progress or (lambda done, total: None)
    found: list[list[tuple[Tensor, ...]]] = []
    noise = grid_noise(ensemble, inputs) if grid else nullcontext(0.0)
    with eval_mode(ensemble), noise as slack:
        draws = Draws(ensemble, inputs, size, seed, asks_again=True)
        room = max(1, _ROOM // (n * (APART + 2))) if "mean" in methods else 64 * draws.size
        for number, few in enumerate(inputs.split(room)):
            group = draws.prepared(few)

            def passes(images: Tensor, index: int, count: int, number: int = number) -> Iterator[Tensor]:
                nonlocal done
                end, some = index + count, draws.at_once(len(images), count)
                for start in range(index, end, some):
                    outputs = check_finite(draws.take(images, start, min(some, end - start), number))
                    yield outputs
                    done += len(images) * len(outputs)
                    report(done, total)

            selection = torch.cat(list(passes(group, 0, n0)))
            seen = [measures[method](selection, rivals, alpha, n) for method in methods]
            found.append(_certify(group, passes, seen, n0, aims(slack=slack)))
            done = sum(len(each[0][0]) for each in found) * (n0 + n)  # with what early stops have saved
            report(done, total)
    by_method = zip(*found, strict=True)  # of the parts of the batch
    return {
        method: Certificate(*(torch.cat(column) for column in zip(*parts, strict=True)))
        for method, parts in zip(methods, by_method, strict=True)
    }


def _of_no_images(radii: int) -> Certificate:
    none, zero = (torch.zeros(0, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.float64))
    return Certificate(none, zero, zero, zero, zero, none, none.view(0, 1).expand(0, radii))


def wanted_radii(radius: float | Sequence[float] | None) -> tuple[float, ...]:
    """The wanted radii in rising order."""
    if radius is None:
        return ()
    several = isinstance(radius, Iterable) and not is_number(radius) and not isinstance(radius, str | bytes)
    radii = list(cast("Iterable[float]", radius)) if several else [cast("float", radius)]
    if not radii or not all(is_number(each) and each > 0 and math.isfinite(each) for each in radii):
        raise ValueError(f"radius must be > 0 and finite, one or several, got {radius!r}")
    return tuple(sorted({float(each) for each in radii}))


def check_reach(wanted: Sequence[float], std: float, alpha: float, n: int) -> None:
    """Refuse radii of which n draws cannot certify a single one, whatever the network answers."""
    most = largest_radius(std, alpha, n)
    if wanted and wanted[0] > most:
        raise ValueError(
            f"no image can be certified within {wanted[0]:g}: with noise of std {std:.3g} and alpha "
            f"{alpha:g}, {n:,} draws certify {most:.3g} at most, so take a smaller radius or more draws"
        )


def _looks(n: int, wanted: Sequence[float]) -> Iterator[int]:
    """Numbers of draws after which it is looked at whether images need more."""
    taken = 0
    while wanted and taken < n:
        taken = min(n, taken + max(_FIRST, taken // _EVERY // _FIRST * _FIRST))
        yield taken
    if not wanted:
        yield n


def _check_names(methods: Sequence[Method], rivals: Rivals, bound: MeanBound | None) -> None:
    settings = [("method", method, Method) for method in methods]
    for name, value, known in (*settings, ("rivals", rivals, Rivals), ("bound", bound, MeanBound)):
        if value is not None and value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")
    if "mean" not in methods and bound is not None:
        raise ValueError('votes are bounded exactly: leave bound out, or take method="mean"')


def _check_numbers(alpha: float, n0: int, n: int, seed: int | None, give_up: float) -> None:
    check_alpha(alpha)
    if not (is_number(give_up) and 0 <= give_up < 1):
        raise ValueError(f"give_up must be in [0, 1), got {give_up!r}")
    check_count("n0", n0)
    if check_count("n", n) < 2:
        raise ValueError("n must be 2 or more")
    if seed is not None and n0 + n > DRAWS:
        raise ValueError(f"a seed has {DRAWS:,} draws: n0 and n ask for {n0 + n:,}, leave seed out")


Passes = Callable[[Tensor, int, int], Iterator[Tensor]]  # of images, first draw and how many, to (c, A, K)


def _certify(
    group: Tensor, passes: Passes, methods: Sequence[Votes | Means], n0: int, aims: Aims
) -> list[tuple[Tensor, ...]]:
    """The fields of a `Certificate` by each method; an image draws on until all have ended."""
    searches = [Search(seen, len(group), aims) for seen in methods]
    active, taken = torch.arange(len(group), device="cpu"), 0
    for look in _looks(aims.n, aims.wanted):
        for outputs in passes(group[active.to(group.device)], n0 + taken, look - taken):
            for search in searches:
                search.add(outputs)
        taken = look
        for search in searches:
            search.look(active, taken)
        stay = torch.stack([search.used[active] == 0 for search in searches]).any(dim=0)
        for search in searches:
            search.keep(stay)
        active = active[stay]
        if len(active) == 0:
            break
    return [search.fields(n0) for search in searches]
