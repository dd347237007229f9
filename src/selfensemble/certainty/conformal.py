"""Sets of labels that hold the right one with a stated probability, also for images that an attacker moved.

Split conformal prediction over mean probabilities: the threshold is a quantile of what the right labels of
held-out images got. For images moved by at most `radius` in L2, the noise bounds how far a mean probability
can have moved; that and what the draws leave open are accounted for: with probability `1 - beta` each, the
clean mean is above its lower bound and the moved one below its upper bound.

Source: Sadinle, Lei, Wasserman, Least ambiguous set-valued classifiers with bounded error levels, JASA 2019;
Gendler, Weng, Daniel, Romano, Adversarially robust conformal prediction, ICLR 2022; Yan, Romano, Weng,
Provably robust conformal prediction with improved efficiency, ICLR 2024 (why draws must be accounted for).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..data.images import Inputs
from ..ensemble.checks import check_count, check_images
from ..ensemble.draws import Draws, check_finite, one_by_one
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.fingerprint import origin, still
from ..ensemble.promises import check_sets
from ..ensemble.sets import SetRule
from ..noise.injection import eval_mode
from .bounds import mean_lower
from .decision import check_alpha
from .pixels import pixel_std

Progress = Callable[[int, int], None]
_ROOM = 2**24  # probabilities at a time


@dataclass(frozen=True)
class ConformalSets:
    """What `conformal_sets` returns: an ensemble, and which labels belong to a set.

    To save both, set `ensemble.sets` to the rule, and `rse.save` the ensemble; `ConformalSets.of` finds it in
    an ensemble that was loaded.

    Attributes:
        ensemble: as it was calibrated; `predict` raises an error after its weights, noise, sampling or
            precision changed.
        rule: risk, radius, draws and threshold.
    """

    ensemble: SelfEnsemble
    rule: SetRule

    @classmethod
    def of(cls, ensemble: SelfEnsemble) -> Self:
        """The sets that were calibrated on an ensemble and saved with it.

        Raises:
            ValueError: there are none, or the ensemble changed after they were calibrated.
        """
        if ensemble.sets is None:
            raise ValueError(
                "the ensemble has no calibrated sets: set ensemble.sets = conformal_sets(ensemble, images, "
                "labels).rule, or run `selfensemble calibrate --sets`"
            )
        check_sets(ensemble.sets, ensemble)
        return cls(ensemble, ensemble.sets)

    @property
    def alpha(self) -> float:
        """The risk that a set misses the right label."""
        return self.rule.alpha

    @property
    def radius(self) -> float:
        """L2 distance of attacks that the sets account for."""
        return self.rule.radius

    @property
    def std(self) -> float:
        """Of the noise on the image; 0 without a radius."""
        return self.rule.std

    @property
    def draws(self) -> int:
        """Of each image."""
        return self.rule.draws

    @property
    def threshold(self) -> float:
        """The least (lower bound of the) mean probability of a label in a set, without attack."""
        return self.rule.threshold

    def predict(self, inputs: Tensor, *, max_batch: int | None = None, seed: int | None = None) -> Tensor:
        """(B, K) bool, on the CPU: which labels belong to the set of each of (B, ...) images.

        A set can be empty, which means that the image is unlike the calibration images.

        Raises:
            ValueError: bad inputs, or the ensemble is another than was calibrated on.
        """
        rule = self.rule
        check_images(inputs, self.ensemble.bounds)
        check_sets(rule, self.ensemble)
        least = torch.tensor(rule.threshold, dtype=torch.float64, device="cpu")
        if rule.radius:
            least = torch.special.ndtr(torch.special.ndtri(least) - rule.radius / rule.std)
        found = []
        for samples in _samples(self.ensemble, inputs, rule.draws, max_batch, seed):
            if rule.radius:
                highest = 1 - mean_lower(1 - samples.double(), rule.beta)
            else:
                highest = samples.double().mean(dim=0)
            found.append(highest >= least)
        if not found:
            classes = self.ensemble.predict(inputs, draws=1).probabilities.shape[1]
            return torch.zeros(0, classes, dtype=torch.bool, device="cpu")
        return torch.cat(found)


def conformal_sets(
    ensemble: SelfEnsemble,
    inputs: Tensor | Inputs,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    radius: float = 0.0,
    draws: int | None = None,
    beta: float | None = None,
    max_batch: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> ConformalSets:
    """Calibrate sets that contain the right label with probability `1 - alpha`, for images like these.

    Args:
        ensemble: in the form that will predict, e.g. optimised.
        inputs: (N, ...) held-out images that the network was not trained on; `1 / alpha - 1` or more, with a
            radius `1 / (alpha - 2 beta) - 1` or more. As `Inputs` of image data they are made some at a time.
        labels: (N,) of any integer type, on any device.
        alpha: the risk that a set misses the right label.
        radius: L2 in the units of the image; the guarantee then holds for images changed by up to that
            distance.
        draws: by default those of the ensemble, or 1,000 with a radius. Noise is drawn for each image: with
            shared noise, future images would not be like the calibration images.
        beta: with a radius, the part of `alpha` for each of two bounds; by default a twentieth.
        max_batch, seed: see `SelfEnsemble.predict`.
        progress: called with images done and all of them.

    Raises:
        ValueError: bad inputs, too few images, labels that are none of the network's, or with a radius noise
            that cannot be accounted for (see `pixel_std`).
        TypeError: labels that are no integers.
    """
    check_images(inputs[:2] if isinstance(inputs, Inputs) else inputs, ensemble.bounds)
    labels = _checked(labels, len(inputs))
    if draws is None:
        draws = 1000 if radius else ensemble.draws
    beta = (alpha / 20 if beta is None else beta) if radius else 0.0
    _check_settings(alpha, radius, draws, beta, len(inputs))
    about = origin(ensemble)
    std = pixel_std(ensemble, inputs[:2]) if radius else 0.0
    lowest = []
    start = 0
    for samples in _samples(ensemble, inputs, draws, max_batch, seed):
        if not start:
            _check_classes(labels, samples.shape[2])
        own = labels[start : start + samples.shape[1]].to(samples.device)
        start += len(own)
        right = samples.gather(2, own[None, :, None].expand(draws, -1, 1))[:, :, 0].double()
        lowest.append(mean_lower(right, beta) if radius else right.mean(dim=0))
        if progress is not None:
            progress(start, len(inputs))
    values = torch.cat(lowest).sort(descending=True).values
    rule = SetRule(
        alpha=alpha, radius=radius, std=std, draws=draws, beta=beta, images=len(values),
        threshold=float(values[_rank(len(values), alpha - 2 * beta) - 1]), **still(ensemble, about),
    )  # fmt: skip
    return ConformalSets(ensemble, rule)


def _check_settings(alpha: float, radius: float, draws: int, beta: float, images: int) -> None:
    check_alpha(alpha)
    if not (math.isfinite(radius) and radius >= 0):
        raise ValueError(f"radius must be finite and >= 0, got {radius}")
    if check_count("draws", draws) < 2 and radius:
        raise ValueError("with a radius draws must be 2 or more")
    if not 0 <= beta < alpha / 2 or (radius and not beta):
        raise ValueError(f"beta must be above 0 and below alpha / 2, got {beta}")
    level = alpha - 2 * beta
    if _rank(images, level) > images:
        raise ValueError(
            f"sets that miss the right label of at most {alpha:g} of the images want {_needed(level)} images "
            f"or more, got {images}: give more, or raise alpha"
        )


def _rank(images: int, level: float) -> int:
    """Which of the falling values of that many images is the threshold; beyond the last, they are too few."""
    return math.ceil((images + 1) * (1 - level) - 1e-9)


def _needed(level: float) -> int:
    """The fewest images that have a threshold."""
    few = max(1, math.floor(1 / level) - 2)
    while _rank(few, level) > few:
        few += 1
    return few


def _checked(labels: Tensor, images: int) -> Tensor:
    """The labels as int64 on the CPU, if there is one for each image."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, numbers of classes, got {labels.dtype}")
    if labels.device.type == "meta":
        raise ValueError("labels are on the meta device, where tensors have no values: make them on the CPU")
    if tuple(labels.shape) != (images,) or images == 0:
        raise ValueError(
            f"calibration needs a label an image, got {images} images, labels of shape {tuple(labels.shape)}"
        )
    return labels.to("cpu", torch.int64)


def _check_classes(labels: Tensor, classes: int) -> None:
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels must be classes of the network, 0 to {classes - 1}, got {low if low < 0 else high}"
        )


def _samples(
    ensemble: SelfEnsemble, inputs: Tensor | Inputs, draws: int, max_batch: int | None, seed: int | None
) -> Iterator[Tensor]:
    """(draws, b, K) softmax outputs of b images after the other, on the CPU."""
    size = None if max_batch is None else check_count("max_batch", max_batch)
    if len(inputs) == 0:
        return
    with eval_mode(ensemble):
        size = one_by_one(ensemble, inputs[:2], size)
        source = Draws(ensemble, inputs[:2], size, seed, "per_image", count=len(inputs))
        classes = source.take(source.prepared(inputs[:1]), 0, 1).shape[2]
        few = max(1, min(_ROOM // (draws * classes), source.size))
        for number, images in enumerate(inputs.split(few)):
            check_images(images, ensemble.bounds)
            group, taken, passes = source.prepared(images), 0, []
            while taken < draws:
                count = source.at_once(len(group), draws - taken)
                passes.append(check_finite(source.take(group, taken, count, number)).cpu())
                taken += count
            yield torch.cat(passes)
