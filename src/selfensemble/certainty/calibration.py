"""Margins at which an image may stop drawing, with a guarantee for images like those they were set on.

A rule is a threshold for each number of draws so far. For a price of a wrong answer, in draws, backward
induction over recorded draws finds the thresholds of least cost on one half of the images. On the other half
the rules are tested in order of their price, dearest first, each by the exact binomial test of "more than
epsilon of such images are answered otherwise than by the ensemble of the reference draws", which stand for
infinitely many. The last rule before the first
test that fails is taken: fixed-sequence testing, which needs no correction for the number of rules.

Source: Angelopoulos, Bates, Candes, Jordan, Lei, Learn then Test, 2021, arXiv 2110.01052, section 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import special
from torch import Tensor

from ..data.images import Inputs
from ..ensemble.checks import check_count, check_images
from ..ensemble.draws import Draws, check_finite, one_by_one
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.fingerprint import origin, still
from ..ensemble.stopping import Calibrated, margin
from ..noise.injection import eval_mode

Progress = Callable[[int, int], None]
_PRICES = np.geomspace(2000, 2, 61)
_NEVER = 2.0  # no margin is as large
_LEAST = 100  # images in each half


@dataclass(frozen=True)
class Paths:
    """What happens to N images as their draws are averaged, one after another.

    Attributes:
        margins: (n, N) of the mean after each draw.
        wrong: (n, N) bool, whether its label is another than that of the infinite ensemble.
    """

    margins: np.ndarray
    wrong: np.ndarray

    def of(self, images: np.ndarray) -> "Paths":
        """The same for some of the images."""
        return Paths(self.margins[:, images], self.wrong[:, images])

    def follow(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) draws, and (N,) whether the answer is wrong, when images stop at these thresholds."""
        stops = self.margins >= thresholds[:, None]
        stops[-1] = True
        at = stops.argmax(axis=0)
        return at + 1, self.wrong[at, np.arange(len(at))]


def calibrate(
    ensemble: SelfEnsemble,
    inputs: Tensor | Inputs,
    *,
    epsilon: float | None = None,
    delta: float = 0.05,
    most: int = 32,
    reference_draws: int = 200,
    antithetic: bool = True,
    max_batch: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Thresholds for `predict(..., stop="calibrated")`; labels are not needed.

    The guarantee is about images drawn as `inputs` were, so pass images that the network was not trained on;
    it does not cover attacked images. It holds for the ensemble as given: with other weights, noise,
    sampling, draws or precision the rule is refused.

    Args:
        ensemble: in the form that will predict, e.g. optimised.
        inputs: (N, ...) images, 200 or more; half of them choose the rules, half test them. `Inputs` of image
            data are loaded in parts.
        epsilon: the share of answers that can differ from the reference's. By default the share that
            `ensemble.draws` draws for every image get wrong, measured on the first half.
        delta: the risk that the guarantee fails, over the choice of images and noise.
        most: maximum number of draws per image.
        reference_draws: draws that stand for infinitely many. If they leave an answer undecided, so does the
            comparison with them.
        antithetic: whether predictions are to draw in pairs of opposite noise, which takes fewer draws. The
            default of epsilon is about draws that do not.
        max_batch, seed: see `SelfEnsemble.predict`; the seed is that of the halves as well.
        progress: called with draws done and all of them, of images times draws.

    Returns:
        The rule; set `ensemble.stopping` to it.

    Raises:
        ValueError: no noise, too few images, or no rule passes; the message says what to do.
    """
    check_images(inputs[:2] if isinstance(inputs, Inputs) else inputs, ensemble.bounds)
    _check_shares(len(inputs), epsilon=epsilon, delta=delta)
    _check_noise(ensemble, inputs[:2])
    size = None if max_batch is None else check_count("max_batch", max_batch)
    about = origin(ensemble)
    most, reference_draws = check_count("most", most), check_count("reference_draws", reference_draws)
    entropy = np.random.SeedSequence(None if seed is None else seed % 2**64)
    seeds: list[int] = entropy.generate_state(2).tolist()
    example, count = inputs[:2], len(inputs)
    size = one_by_one(ensemble, example, size)
    own = Draws(ensemble, example, size, seeds[0], "per_image", antithetic, count)
    independent = Draws(ensemble, example, size, seeds[1], "per_image", count=count)
    paths, fixed = _record(ensemble, own, independent, inputs, most, reference_draws, progress)
    order = np.random.default_rng(entropy).permutation(len(inputs))
    first, second = (paths.of(half) for half in np.array_split(order, 2))
    if epsilon is None:
        epsilon = _share_of(fixed[order[: first.wrong.shape[1]]], ensemble.draws)
    rule = choose(first, second, epsilon, delta, reference_draws)
    about = {**still(ensemble, about), "antithetic": antithetic, "draws": ensemble.draws}
    return rule.model_copy(update=about)


def _share_of(wrong: np.ndarray, draws: int) -> float:
    """Of the images to which that many draws give another answer."""
    if not wrong.any():
        raise ValueError(
            f"{draws} draws answer all {len(wrong)} images as the infinite ensemble does: set epsilon, or "
            "give more images"
        )
    return float(wrong.mean())


def _check_noise(ensemble: SelfEnsemble, inputs: Tensor) -> None:
    with eval_mode(ensemble):
        if not Draws(ensemble, inputs).varies():
            raise ValueError("the ensemble has no noise: one draw is its answer, nothing is to be calibrated")


def _check_shares(images: int, **shares: float | None) -> None:
    if images < 2 * _LEAST:
        raise ValueError(f"calibration needs {2 * _LEAST} images or more, got {images}")
    for name, share in shares.items():
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {share}")


def choose(first: Paths, second: Paths, epsilon: float, delta: float, reference_draws: int) -> Calibrated:
    """The cheapest rule that passes, of those found on `first`, tested on `second`; see `calibrate`."""
    chosen = None
    images = second.wrong.shape[1]
    for price in _PRICES:
        thresholds = cheapest(first, price)
        draws, wrong = second.follow(thresholds)
        if special.bdtr(wrong.sum(), images, epsilon) > delta:
            break
        chosen = Calibrated(
            thresholds=tuple(thresholds.tolist()),
            epsilon=epsilon,
            delta=delta,
            mean_draws=float(draws.mean()),
            disagreement=float(wrong.mean()),
            images=images,
            reference_draws=reference_draws,
        )
    if chosen is None:
        raise ValueError(
            f"no rule of up to {len(thresholds)} draws is shown to disagree with {reference_draws} draws on "
            f"at most {epsilon:.3g} of the images (the most careful one: {wrong.mean():.3g} of {images}): "
            "give more images, or raise most or epsilon"
        )
    return chosen


def cheapest(paths: Paths, price: float) -> np.ndarray:
    """(n,) thresholds of least mean cost on these images, found from the last draw back to the first.

    A draw costs 1, a wrong answer `price`.
    """
    thresholds = np.zeros(len(paths.margins))
    later = price * paths.wrong[-1]  # cost of what follows, image by image
    for index in range(len(thresholds) - 2, -1, -1):
        margins, stop, go = paths.margins[index], price * paths.wrong[index], 1 + later
        order = np.argsort(-margins, kind="stable")
        # Stopping the images of the i largest margins, for every i, against letting all go on.
        gains = np.concatenate([[0.0], np.cumsum((stop - go)[order])])
        # Equal margins stop together.
        gains[1:-1][np.diff(margins[order]) == 0] = np.inf
        count = int(gains.argmin())
        thresholds[index] = margins[order[count - 1]] if count else _NEVER
        later = np.where(margins >= thresholds[index], stop, go)
    return thresholds


def _record(
    ensemble: SelfEnsemble,
    own: Draws,
    independent: Draws,
    inputs: Tensor | Inputs,
    most: int,
    reference_draws: int,
    progress: Progress | None,
) -> tuple[Paths, np.ndarray]:
    """Paths of up to `most` draws, and (N,) whether `ensemble.draws` independent draws are wrong.

    Args:
        ensemble: in any mode.
        own, independent: draws, of which each image has its own: images that share noise would not be
            independent.
        inputs, most, reference_draws, progress: see `calibrate`.
    """
    found: list[tuple[Tensor, ...]] = []
    done, total = 0, len(inputs) * (reference_draws + ensemble.draws + most)

    def draw(source: Draws, group: Tensor, index: int, number: int) -> Tensor:
        nonlocal done
        outputs = check_finite(source.take(group, index, 1, number)[0].cpu())
        done += len(group)
        if progress is not None:
            progress(done, total)
        return outputs

    with eval_mode(ensemble):
        for number, images in enumerate(own.groups(inputs)):
            check_images(images, ensemble.bounds)
            group = own.prepared(images)
            mine = partial(draw, own, group, number=number)
            others = partial(draw, independent, group, number=number)
            label = _total(map(mine, range(reference_draws))).argmax(dim=1)
            wrong = _total(map(others, range(ensemble.draws))).argmax(dim=1) != label
            first = reference_draws + reference_draws % 2  # the first of a pair
            found.append((*_path(map(mine, range(first, first + most)), label), wrong))
    margins, wrongs, fixed = (torch.cat(column, dim=-1).numpy() for column in zip(*found, strict=True))
    return Paths(margins, wrongs), fixed


def _total(outputs: Iterator[Tensor]) -> Tensor:
    """What a mean is in proportion to."""
    return sum(outputs, torch.zeros((), dtype=torch.float32, device="cpu"))


def _path(outputs: Iterator[Tensor], label: Tensor) -> tuple[Tensor, Tensor]:
    """(most, b) margins of the mean after each output (b, K), and whether its label is another."""
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    margins, wrong = [], []
    for index, each in enumerate(outputs):
        total = total + each
        mean = total / (index + 1)
        margins.append(margin(mean))
        wrong.append(mean.argmax(dim=1) != label)
    return torch.stack(margins).double(), torch.stack(wrong)
