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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ensemble.checks import check_count, check_images
from ..ensemble.draws import Draws, check_finite
from ..ensemble.ensemble import SelfEnsemble
from ..noise.injection import eval_mode
from .bounds import mean_lower
from .decision import check_alpha
from .pixels import pixel_std

_ROOM = 2**24  # probabilities at a time


@dataclass(frozen=True)
class ConformalSets:
    """What `conformal_sets` returns.

    Attributes:
        ensemble: in the form that it was calibrated in.
        alpha: the risk that a set misses the right label.
        radius, std: of attacks that are accounted for, L2; of the noise on the image, or 0.
        draws: of each image.
        beta: the part of `alpha` for each of the two bounds on what draws leave open.
        threshold: the least (lower bound of the) mean probability of a label in a set, without attack.
        images: how many were calibrated on.
    """

    ensemble: SelfEnsemble
    alpha: float
    radius: float
    std: float
    draws: int
    beta: float
    threshold: float
    images: int

    def predict(self, inputs: Tensor, *, max_batch: int | None = None, seed: int | None = None) -> Tensor:
        """(B, K) bool, on the CPU: which labels belong to the set of each of (B, ...) images.

        A set may be empty, which says that the image is like none of those calibrated on.
        """
        check_images(inputs, self.ensemble.bounds)
        least = torch.tensor(self.threshold, dtype=torch.float64, device="cpu")
        if self.radius:
            least = torch.special.ndtr(torch.special.ndtri(least) - self.radius / self.std)
        found = []
        for samples in _samples(self.ensemble, inputs, self.draws, max_batch, seed):
            if self.radius:
                highest = 1 - mean_lower(1 - samples.double(), self.beta)
            else:
                highest = samples.double().mean(dim=0)
            found.append(highest >= least)
        return torch.cat(found) if found else torch.zeros(0, 0, dtype=torch.bool, device="cpu")


def conformal_sets(
    ensemble: SelfEnsemble,
    inputs: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    radius: float = 0.0,
    draws: int | None = None,
    beta: float | None = None,
    max_batch: int | None = None,
    seed: int | None = None,
) -> ConformalSets:
    """Calibrate sets that hold the right label with probability `1 - alpha`, over images like these.

    Args:
        ensemble: in the form that will predict, e.g. optimised.
        inputs, labels: (N, ...), (N,) held-out images that the network was not trained on.
        alpha: the risk that a set misses the right label.
        radius: L2 in the units of the image; the guarantee then holds for images moved by as much.
        draws: by default those of the ensemble, or 1,000 with a radius. Noise is each image's own: with
            shared noise the images to come would not be like those calibrated on.
        beta: with a radius, the part of `alpha` for each of two bounds; by default a twentieth.
        max_batch, seed: see `SelfEnsemble.predict`.

    Raises:
        ValueError: bad inputs, or with a radius noise that cannot be accounted for (see `pixel_std`).
    """
    check_images(inputs, ensemble.bounds)
    check_alpha(alpha)
    if len(labels) != len(inputs) or len(inputs) == 0:
        raise ValueError(
            f"calibration needs a label an image, got {len(inputs)} images, {len(labels)} labels"
        )
    if not (math.isfinite(radius) and radius >= 0):
        raise ValueError(f"radius must be finite and >= 0, got {radius}")
    draws = check_count("draws", draws or (1000 if radius else ensemble.draws))
    beta = (alpha / 20 if beta is None else beta) if radius else 0.0
    if not 0 <= beta < alpha / 2 or (radius and not beta):
        raise ValueError(f"beta must be above 0 and below alpha / 2, got {beta}")
    std = pixel_std(ensemble, inputs) if radius else 0.0
    lowest = []
    start = 0
    for samples in _samples(ensemble, inputs, draws, max_batch, seed):
        own = labels[start : start + samples.shape[1]].to(samples.device)
        start += len(own)
        right = samples.gather(2, own[None, :, None].expand(draws, -1, 1))[:, :, 0].double()
        lowest.append(mean_lower(right, beta) if radius else right.mean(dim=0))
    values = torch.cat(lowest).sort(descending=True).values
    rank = math.ceil((len(values) + 1) * (1 - alpha + 2 * beta) - 1e-9)
    threshold = float(values[rank - 1]) if rank <= len(values) else 0.0  # too few images: every label
    return ConformalSets(ensemble, alpha, radius, std, draws, beta, threshold, len(values))


def _samples(
    ensemble: SelfEnsemble, inputs: Tensor, draws: int, max_batch: int | None, seed: int | None
) -> Iterator[Tensor]:
    """(draws, b, K) softmax outputs of b images after the other, on the CPU."""
    size = None if max_batch is None else check_count("max_batch", max_batch)
    if len(inputs) == 0:
        return
    with eval_mode(ensemble):
        source = Draws(ensemble, inputs, size, seed, "per_image")
        classes = source.take(source.prepared(inputs[:1]), 0, 1).shape[2]
        few = max(1, min(_ROOM // (draws * classes), source.size))
        for number, images in enumerate(inputs.split(few)):
            group, taken, passes = source.prepared(images), 0, []
            while taken < draws:
                count = source.at_once(len(group), draws - taken)
                passes.append(check_finite(source.take(group, taken, count, number)).cpu())
                taken += count
            yield torch.cat(passes)
