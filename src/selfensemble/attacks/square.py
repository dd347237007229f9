"""The Square Attack: random search with square changes, no gradients.

Sources: Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via random
search, ECCV 2020, algorithms 1 to 3; for L1, Croce & Hein, Mind the box, ICML 2021, section 4.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_count
from .averaging import Noise, NoiseOptions
from .driver import run_attack
from .expectation import Estimate, Oracle
from .keeper import Keeper
from .losses import Loss, LossName, check_loss, of_labels
from .norms import Norm, check_eps, check_norm, per_image, project, size
from .units import in_own_units

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10000 candidates, where p is halved
_REDRAWS = 8
_TINY = 1e-12


@in_own_units("eps")
def square(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    queries: int = 1000,
    p_init: float = 0.8,
    loss: LossName = "margin",
    early_stop: bool = True,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """Square Attack: a random square is changed, and the change kept where the loss grows.

    A query is the mean of `eot` forward passes of one image. A candidate costs one query, but two where
    the model is random: the best image so far is then evaluated again beside the candidate, on the same
    fresh draws, for a loss remembered from lucky draws would shut out every honest candidate. Looking at
    the clean image and confirming successes come on top. AutoAttack takes 5000 queries, and loss "ce"
    if targeted.

    Inputs of other shapes are searched in the same way: waveforms (B, T) and (B, C, T) in pieces of time,
    which cover the same share, (B, C, D, H, W) as images of D x H rows.

    Differences from the published code: every image has squares of its own; squares reach the last row
    and column; for L-inf, signs that would change nothing are drawn again.

    Args:
        queries: queries for each image at most.
        p_init: share of the pixels that the first squares cover; halved 9 times on the published
            schedule, rescaled to `queries`.
        loss: "margin", "ce", "dlr" or "probability-margin".
        early_stop: an image leaves the batch at its first (confirmed) success, as published; otherwise
            the search for a larger loss goes on.
        max_batch: images attacked at a time; a random model gets twice as many in a forward pass.
        model, inputs, labels, targeted, norm, eps, noise: see `pgd`.

    Returns:
        Of the shape of `inputs`, in the ball and in [0, 1]; judge them on fresh noise.

    Raises:
        ValueError, TypeError: inputs, labels or settings that cannot be attacked.
    """
    check_norm(norm)
    check_eps(eps, norm, inputs)
    objective = check_loss(loss)
    _check_shape(inputs)
    check_count("queries", queries)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must be above 0 and at most 1, got {p_init}")

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        keep = Keeper(oracle, x, y, targeted)
        proposals = _Proposals(norm, eps, oracle.generator)
        _Search(keep, objective, proposals, early_stop).run(queries, p_init)
        return keep.best

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


class _Search:
    """Random search from the first proposals on; `keep` takes what it finds."""

    def __init__(self, keep: Keeper, objective: Loss, proposals: "_Proposals", early_stop: bool) -> None:
        self.keep, self.oracle, self.objective = keep, keep.oracle, objective
        self.proposals, self.early_stop = proposals, early_stop
        self.active = keep.candidates(early_stop)
        self.images = self.value = keep.x[:0]

    def run(self, queries: int, p_init: float) -> None:
        """At most that many queries an image, squares of at first `p_init` of its pixels."""
        if len(self.active) == 0:
            return
        self.images = self.proposals.start(self.keep.x[self.active])
        self.value = self.images.new_zeros(len(self.images))
        count = queries // 2 if self.oracle.is_random else queries - 1
        if not self.oracle.is_random:
            estimate = self._look(self.images)
            self.value = estimate.loss
            self._visit(self.images, estimate, 0)
        for step in range(count):
            if len(self.active) == 0:
                break
            share = p_init / 2 ** bisect_left(_HALVINGS, int(step / count * 10000))
            candidate = self.proposals.next(self.keep.x[self.active], self.images, share)
            if self.oracle.is_random:
                self._compare(candidate, step)
            else:
                self._improve(candidate, step)
        if self.oracle.is_random:
            self.keep.finish(self.active, self.images, self._loss(self.keep.y[self.active]))

    def _loss(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        return of_labels(self.objective, labels, self.keep.targeted)

    def _look(self, images: Tensor, copies: int = 1) -> Estimate:
        return self.oracle.evaluate(images, self._loss(self.keep.y[self.active].repeat(copies)))

    def _compare(self, candidate: Tensor, step: int) -> None:
        """The candidate and the best image so far, on the same fresh draws."""
        size = len(self.active)
        pair = self._look(torch.cat([self.images, candidate]), 2)
        better = pair.loss[size:] > pair.loss[:size]
        self.images = torch.where(per_image(better, self.images), candidate, self.images)
        rows = torch.arange(size, device=better.device) + size * better
        self._visit(self.images, Estimate(pair.loss[rows], pair.draws[:, rows], pair.gradient), step)

    def _improve(self, candidate: Tensor, step: int) -> None:
        """The candidate against the best loss so far, which without randomness is exact."""
        estimate = self._look(candidate)
        better = estimate.loss > self.value
        self.images = torch.where(per_image(better, self.images), candidate, self.images)
        self.value = torch.where(better, estimate.loss, self.value)
        self._visit(candidate, estimate, step)

    def _visit(self, seen: Tensor, estimate: Estimate, step: int) -> None:
        """Continue with the images that have no success."""
        stay = self.keep.visit(self.active, seen, estimate, stop=self.early_stop, step=step)
        if not stay.all():
            self.active, self.images, self.value = self.active[stay], self.images[stay], self.value[stay]


class _Proposals:
    """The published distributions of first images and of candidates, for all images of a batch at once.

    Inputs of one row (waveforms) are changed in pieces of it instead of squares.
    """

    def __init__(self, norm: str, eps: float, generator: torch.Generator) -> None:
        self.norm, self.eps, self.generator = norm, eps, generator

    def start(self, x: Tensor) -> Tensor:
        """First images for inputs of any shape."""
        return self._start(_as_images(x)).view_as(x)

    def next(self, x: Tensor, best: Tensor, share: float) -> Tensor:
        """A candidate for each input: its best one, changed in a square of `share` of the pixels."""
        return self._next(_as_images(x), _as_images(best), share).view_as(x)

    def _start(self, x: Tensor) -> Tensor:
        """Vertical stripes for L-inf; a grid of small patterns for L2 and L1."""
        count, channels, height, width = x.shape
        if self.norm == "linf":
            return (x + self.eps * self._signs((count, channels, 1, width), x)).clamp(0.0, 1.0)
        side = max(1, (width if height == 1 else min(height, width)) // 5)
        tall = min(side, height)
        down, across = height // tall, width // side
        turned = self._integers(2, (count, 1, down, across), x)
        tiles = self._pattern(tall, side, x)[turned] * self._signs((count, channels, down, across, 1, 1), x)
        change = torch.zeros_like(x)
        top, left = (height - down * tall) // 2, (width - across * side) // 2
        change[:, :, top : top + down * tall, left : left + across * side] = tiles.transpose(3, 4).reshape(
            count, channels, down * tall, across * side
        )
        # A large ball is filled; into a small one L1 changes are projected.
        grow = (self.eps / size(change, self.norm).clamp(min=_TINY)).clamp(min=1.0)
        return self._fit(change * per_image(grow, change), x)

    def _next(self, x: Tensor, best: Tensor, share: float) -> Tensor:
        height, width = x.shape[2:]
        longest = width if height == 1 else min(height, width)
        side = max(1, round(share * width if height == 1 else (share * height * width) ** 0.5))
        if self.norm == "linf":
            return self._flip(x, best, min(side, longest))
        side = max(3, side)
        return self._move(x, best, min(side + 1 - side % 2, longest))

    def _flip(self, x: Tensor, best: Tensor, side: int) -> Tensor:
        """Set the square to +eps or -eps, one sign for each channel."""
        window = self._window(x, side)
        clean, old = x[window], best[window]
        signs = self._signs((*x.shape[:2], 1, 1), x)
        for _ in range(_REDRAWS):
            same = ((clean + self.eps * signs).clamp(0.0, 1.0) == old).flatten(1).all(dim=1)
            if not same.any():
                break
            signs = torch.where(per_image(same, signs), self._signs(signs.shape, x), signs)
        candidate = best.clone()
        candidate[window] = (clean + self.eps * signs).clamp(0.0, 1.0)
        return candidate

    def _move(self, x: Tensor, best: Tensor, side: int) -> Tensor:
        """Add a pattern to one square, which takes over the norm of a second one and what is left of eps."""
        change = best - x
        window, other = self._window(x, side), self._window(x, side)
        power = 2 if self.norm == "l2" else 1
        covered = torch.zeros_like(change)
        covered[window] = 1.0
        covered[other] = 1.0
        free = (self.eps**power - size(change, self.norm) ** power).clamp(min=0)
        # Each channel of the square gets what the squares hold in all channels, as in AutoAttack's code, and
        # what is too much leaves the whole image; channel by channel, as in the paper, is weaker.
        inside = size(change * covered, self.norm) ** power
        mass = per_image((free / x.shape[1] + inside) ** (1 / power), change)
        turned = self._integers(2, (len(x), 1), x)
        pattern = self._pattern(min(side, x.shape[2]), side, x)[turned]
        pattern = pattern * self._signs((*x.shape[:2], 1, 1), x)
        old = change[window]
        new = pattern + old / self._channel_norms(old).clamp(min=_TINY)
        change[other] = 0.0
        change[window] = new / self._channel_norms(new).clamp(min=_TINY) * mass
        return self._fit(change, x)

    def _fit(self, change: Tensor, x: Tensor) -> Tensor:
        """Images with these changes, scaled to eps for L2 and projected for L1, which keeps their peaks."""
        if self.norm == "l2":
            change = change * per_image(self.eps / size(change, "l2").clamp(min=_TINY), change)
        return (x + project(change, self.norm, self.eps, x)).clamp(0.0, 1.0)

    def _channel_norms(self, change: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(
            change, 2 if self.norm == "l2" else 1, dim=(2, 3), keepdim=True
        )
        return norms

    def _pattern(self, tall: int, side: int, like: Tensor) -> Tensor:
        """(2, tall, side) of norm 1: a positive and a negative bump, one above or beside the other.

        `tall` is `side`, or 1: then they are beside each other in both.
        """
        half = side // 2
        pattern = torch.zeros(side, tall, dtype=torch.float32, device="cpu")
        for rows, sign in ((slice(0, half), 1.0), (slice(half, side), -1.0)):
            if rows.stop > rows.start:
                bump = _bump(rows.stop - rows.start, tall)
                pattern[rows] = sign * bump / bump.norm(p=2 if self.norm == "l2" else 1)
        pattern /= pattern.norm(p=2 if self.norm == "l2" else 1)
        return torch.stack([pattern if tall == side else pattern.T, pattern.T]).to(like)

    def _window(self, x: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices of a random square in each image: `x[window]` is (B, C, side or 1, side)."""
        count, channels, height, width = x.shape
        span = torch.arange(side, device=x.device)
        tall = min(side, height)
        rows = self._integers(height - tall + 1, (count, 1, 1, 1), x) + span[:tall, None]
        columns = self._integers(width - side + 1, (count, 1, 1, 1), x) + span
        images = torch.arange(count, device=x.device).reshape(-1, 1, 1, 1)
        return images, torch.arange(channels, device=x.device).reshape(-1, 1, 1), rows, columns

    def _integers(self, below: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device="cpu").to(like.device)

    def _signs(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return (2.0 * torch.randint(2, shape, generator=self.generator, device="cpu") - 1).to(like)


def _check_shape(inputs: Tensor) -> None:
    """Raise a ValueError unless there are squares or pieces of time to change."""
    if not 2 <= inputs.dim() <= 5:
        raise ValueError(
            "Square changes squares of images (B, C, H, W) or pieces of waveforms (B, C, T), got shape "
            f"{tuple(inputs.shape)}"
        )


def _as_images(x: Tensor) -> Tensor:
    """Any of (B, T), (B, C, T), (B, C, H, W), (B, C, D, H, W) as (B, C, H, W); time is a row."""
    if x.dim() == 4:
        return x
    return x.reshape(len(x), 1 if x.dim() == 2 else x.shape[1], -1, x.shape[-1])


def _bump(height: int, width: int) -> Tensor:
    """(height, width): at distance d (in the maximum norm) from the centre, the sum of 1/k^2 over k > d."""
    longest = max(height // 2, width // 2) + 1
    terms = 1.0 / torch.arange(1, longest + 1, dtype=torch.float32, device="cpu") ** 2
    tails = terms.flip(0).cumsum(0).flip(0)
    down, across = ((torch.arange(side, device="cpu") - side // 2).abs() for side in (height, width))
    return tails[torch.maximum(down[:, None], across)]
