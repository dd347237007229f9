"""Certified radii: within them no change of an image changes the infinite ensemble's answer.

Noise N(0, std^2) on the image makes any function with values in [0, 1] smooth: `Phi^-1` of its mean over the
noise changes by at most `|d|_2 / std` when the image moves by d. Applied to the vote of single draws this is
the certificate of Cohen et al.; applied to the softmax outputs it is one of the mean probability, the
predictor that a self-ensemble is. Noise inside the network is part of the function whose mean is taken.

Source: Cohen, Rosenfeld, Kolter, Certified adversarial robustness via randomized smoothing, ICML 2019,
theorem 1 and algorithm 2; Salman et al., Provably robust deep learning via adversarially trained smoothed
classifiers, NeurIPS 2019, lemma 2.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..ensemble.checks import check_count, check_images
from ..ensemble.draws import Draws, check_finite
from ..ensemble.ensemble import SelfEnsemble
from ..noise.injection import eval_mode
from ..noise.streams import DRAWS, LAYERS, fresh_seed, stream_seed
from .bounds import MeanBound, clopper_pearson_lower, clopper_pearson_upper, mean_lower, narrower
from .decision import ABSTAINED, check_alpha
from .pixels import pixel_std

Method = Literal["vote", "mean"]
Rivals = Literal["all", "runner_up"]
Progress = Callable[[int, int], None]
_APART = 8  # rivals with a bound each; the others share one
_ROOM = 2**25  # probabilities that are remembered at a time
_LOOKS = (1 / 64, 1 / 16, 1 / 4, 1)  # shares of the draws after which a wanted radius is looked for


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is certified for each of B images.

    Attributes:
        label: (B,) int64, the infinite ensemble's answer; -1 where nothing could be certified.
        radius: (B,) float64, L2 in the units of the image; 0 where nothing could be certified.
        lower: (B,) float64, lower bound of the answer's probability (of votes, or its mean).
        upper: (B,) float64, upper bound of every rival's.
        draws: (B,) int64, those of selection included.

    Label and radius are wrong with probability alpha at most, for each image.
    """

    label: Tensor
    radius: Tensor
    lower: Tensor
    upper: Tensor
    draws: Tensor


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
    radius: float | None = None,
    max_batch: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Radii within which no change of an image changes the infinite ensemble's answer.

    The images of a batch share their noise, which makes random numbers cheap: the draws of each image are
    independent of each other, which is all that its certificate rests on.

    Args:
        ensemble: in the form that will predict: the certificate is that of the network it is given.
        inputs: (B, ...) images in the ensemble's bounds.
        alpha: the risk, for each image, that its certificate is wrong.
        n0: draws that select the answer; others estimate its probability.
        n: draws that estimate.
        method: "vote" is about the class that most single draws choose, "mean" about the mean probability,
            which is what `predict` averages.
        rivals: "all" takes one minus the answer's probability for its rivals' ("one against all"),
            "runner_up" bounds each rival's as well, with half of alpha.
        bound: for "mean", how means are bounded, see `mean_lower`. By default "betting" or "binomial", for
            each mean the one that its draws of selection say is narrower.
        radius: a wanted radius: stop early for images that reach it, at one of 4 looks that share alpha.
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
        max_batch=max_batch, seed=seed, progress=progress,
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
    radius: float | None = None,
    max_batch: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> dict[Method, Certificate]:
    """Certificates by several methods from the same draws, see `certify`; `alpha` is the risk of each."""
    check_images(inputs, ensemble.bounds)
    check_alpha(alpha)
    settings = [("method", method, Method) for method in methods]
    for name, value, known in (*settings, ("rivals", rivals, Rivals), ("bound", bound, MeanBound)):
        if value is not None and value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")
    check_count("n0", n0)
    if check_count("n", n) < 2:
        raise ValueError("n must be 2 or more")
    if seed is not None and n0 + n > DRAWS:
        raise ValueError(f"a seed has {DRAWS:,} draws: n0 and n ask for {n0 + n:,}, leave seed out")
    if "mean" not in methods and bound is not None:
        raise ValueError('votes are bounded exactly: leave bound out, or take method="mean"')
    if radius is not None and not radius > 0:
        raise ValueError(f"radius must be > 0, got {radius}")
    size = None if max_batch is None else check_count("max_batch", max_batch)
    if len(inputs) == 0:
        none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        return dict.fromkeys(methods, Certificate(none, zero, zero, zero, none))
    std = pixel_std(ensemble, inputs)
    looks = [n] if radius is None else sorted({max(2, round(share * n)) for share in _LOOKS})
    measures: dict[Method, Callable[..., _Votes | _Means]] = {
        "vote": _Votes,
        "mean": partial(_Means, bound=bound, seed=seed),
    }
    done, total = 0, len(inputs) * (n0 + n)
    found: list[list[tuple[Tensor, ...]]] = []
    with eval_mode(ensemble):
        draws = Draws(ensemble, inputs, size, seed, "shared")
        room = max(1, _ROOM // (n * (_APART + 2))) if "mean" in methods else 64 * draws.size
        for few in inputs.split(room):
            group = draws.prepared(few)

            def passes(images: Tensor, index: int, count: int) -> Iterator[Tensor]:
                nonlocal done
                end, some = index + count, draws.at_once(len(images), count)
                for start in range(index, end, some):
                    outputs = check_finite(draws.take(images, start, min(some, end - start)))
                    yield outputs
                    done += len(images) * len(outputs)
                    if progress is not None:
                        progress(done, total)

            selection = torch.cat(list(passes(group, 0, n0)))
            seen = [measures[method](selection, rivals, alpha, n) for method in methods]
            found.append(_certify(group, passes, seen, std, alpha, n0, looks, radius))
            done = sum(len(each[0][0]) for each in found) * (n0 + n)  # with what early stops have saved
            if progress is not None:
                progress(done, total)
    by_method = zip(*found, strict=True)  # of the parts of the batch
    return {
        method: Certificate(*(torch.cat(column) for column in zip(*parts, strict=True)))
        for method, parts in zip(methods, by_method, strict=True)
    }


Passes = Callable[[Tensor, int, int], Iterator[Tensor]]  # of images, first draw and how many, to (c, A, K)


def _certify(
    group: Tensor,
    passes: Passes,
    methods: Sequence["_Votes | _Means"],
    std: float,
    alpha: float,
    n0: int,
    looks: list[int],
    wanted: float | None,
) -> list[tuple[Tensor, ...]]:
    """The fields of a `Certificate` by each method; an image draws on until all have ended."""
    size = len(group)
    answers = [seen.order[:, 0].cpu() for seen in methods]
    used = torch.zeros(len(methods), size, dtype=torch.int64)
    found = torch.zeros(len(methods), 3, size, dtype=torch.float64)  # radius, lower, upper
    active, taken = torch.arange(size), 0
    for look in looks:
        for outputs in passes(group[active.to(group.device)], n0 + taken, look - taken):
            for seen in methods:
                seen.add(outputs)
        taken = look
        for number, seen in enumerate(methods):
            low, high = seen.bounds(alpha / len(looks))
            reach = np.where(low > high, std / 2 * (stats.norm.ppf(low) - stats.norm.ppf(high)), 0.0)
            ends = np.full(len(reach), True) if look == looks[-1] else reach >= wanted
            ended = torch.from_numpy(ends) & (used[number, active] == 0)
            figures = torch.from_numpy(np.stack([reach, low, high]))
            found[number][:, active[ended]] = figures[:, ended]
            used[number, active[ended]] = n0 + taken
        stay = (used[:, active] == 0).any(dim=0)
        for seen in methods:
            seen.keep(stay.to(group.device))
        active = active[stay]
        if len(active) == 0:
            break
    return [
        (torch.where(figures[0] > 0, answer, ABSTAINED), *figures, draws)
        for answer, figures, draws in zip(answers, found, used, strict=True)
    ]


class _Votes:
    """Counts of the classes that single draws choose.

    Args:
        selection: (n0, A, K) outputs that say which class is the answer and which are its rivals.
        rivals: see `certify`.

    Attributes:
        order: (A, K) classes, the answer first, then its likely rivals.
    """

    def __init__(self, selection: Tensor, rivals: Rivals, alpha: float, n: int) -> None:  # noqa: ARG002
        self.order = self._votes(selection).argsort(dim=1, descending=True, stable=True)
        self.counts = torch.zeros_like(self.order)
        self._rivals = rivals

    @staticmethod
    def _votes(outputs: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(outputs.argmax(dim=2), outputs.shape[2]).sum(dim=0)

    def add(self, outputs: Tensor) -> None:
        """More draws, (c, A, K)."""
        self.counts += self._votes(outputs)

    def keep(self, stay: Tensor) -> None:
        """Go on with some of the images."""
        self.order, self.counts = self.order[stay], self.counts[stay]

    def bounds(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """(A,) lower bounds of the answer and upper bounds of its rivals, wrong with `alpha` together."""
        answer, classes = self.order[:, :1], self.counts.shape[1]
        trials = self.counts.sum(dim=1).cpu().numpy()
        mine = self.counts.gather(1, answer)[:, 0].cpu().numpy()
        if self._rivals == "all":
            low = clopper_pearson_lower(mine, trials, alpha)
            return low, 1 - low
        # A larger count has a larger bound: the runner-up's is that of all.
        others = self.counts.scatter(1, answer, 0).amax(dim=1).cpu().numpy()
        low = clopper_pearson_lower(mine, trials, alpha / 2)
        high = clopper_pearson_upper(others, trials, alpha / 2 / max(1, classes - 1))
        return low, np.minimum(high, 1 - low)


class _Means:
    """Softmax outputs of the answer, of its first rivals one by one, and of the others together.

    Args:
        selection: (n0, A, K) outputs that say which class is the answer and which are its rivals.
        rivals, alpha, n, bound: see `certify`.
        seed: of coins, see `mean_lower`.

    Attributes:
        order: (A, K) classes, the answer first, then its likely rivals.
    """

    def __init__(
        self,
        selection: Tensor,
        rivals: Rivals,
        alpha: float,
        n: int,
        bound: MeanBound | None,
        seed: int | None = None,
    ) -> None:
        self.order = selection.mean(dim=0).argsort(dim=1, descending=True, stable=True)
        self._rivals, self._bound = rivals, bound
        self._samples: list[Tensor] = []
        coins = fresh_seed() if seed is None else stream_seed(seed, 0, LAYERS - 1)
        self._generator = torch.Generator(selection.device).manual_seed(coins)
        pilot = self._columns(selection).double()
        variance = pilot.var(dim=0) if len(pilot) > 1 else torch.zeros_like(pilot[0])
        self._binomial = narrower(pilot.mean(dim=0), variance, alpha / 2, n)

    def _columns(self, outputs: Tensor) -> Tensor:
        """(c, A, C), the answer's first."""
        ordered = outputs.gather(2, self.order.expand_as(outputs))
        if self._rivals == "all":
            return ordered[:, :, :1]
        if ordered.shape[2] <= _APART + 1:
            return ordered
        together = ordered[:, :, _APART + 1 :].sum(dim=2, keepdim=True)
        return torch.cat([ordered[:, :, : _APART + 1], together], dim=2).clamp(0, 1)

    def add(self, outputs: Tensor) -> None:
        """More draws, (c, A, K)."""
        self._samples.append(self._columns(outputs))

    def keep(self, stay: Tensor) -> None:
        """Go on with some of the images."""
        self.order, self._binomial = self.order[stay], self._binomial[stay]
        self._samples = [each[:, stay] for each in self._samples]

    def bounds(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """(A,) lower bounds of the answer and upper bounds of its rivals, wrong with `alpha` together."""
        samples = torch.cat(self._samples)
        rivals = samples.shape[2] - 1
        if rivals == 0:
            low = self._lower(samples, 0, alpha)
            return low.cpu().numpy(), 1 - low.cpu().numpy()
        low = self._lower(samples, 0, alpha / 2)
        # The likely runner-up has a share of its own; the bounds of the others are far lower in any case.
        shares = [alpha / 4, *[alpha / 4 / (rivals - 1)] * (rivals - 1)] if rivals > 1 else [alpha / 2]
        highs = [1 - self._lower(1 - samples, 1 + k, share) for k, share in enumerate(shares)]
        high = torch.minimum(torch.stack(highs).amax(dim=0), 1 - low)
        return low.cpu().numpy(), high.cpu().numpy()

    def _lower(self, samples: Tensor, column: int, alpha: float) -> Tensor:
        """(A,) lower bounds of the means of a column."""
        values = samples[:, :, column]
        if self._bound is not None:
            return mean_lower(values, alpha, self._bound, generator=self._generator)
        coins = self._binomial[:, column]
        low = torch.zeros(len(coins), dtype=torch.float64, device=values.device)
        for chosen, method in ((coins, "binomial"), (~coins, "betting")):
            if chosen.any():
                few = values[:, chosen]
                low[chosen] = mean_lower(few, alpha, method, generator=self._generator)  # type: ignore[arg-type]
        return low
