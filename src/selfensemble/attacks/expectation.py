"""Expectation over noise, shared by all attacks: losses, gradients and answers averaged over draws.

Source: Athalye et al., Synthesizing Robust Adversarial Examples, ICML 2018 (EOT).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..ensemble.randomness import global_noise, other_seed
from ..noise.streams import Sampling, noise_draw, stream_seed
from ..runtime.errors import UnevenBatchError
from .averaging import Noise
from .budget import spend
from .leads import check_answers, lead_of, mean_log, probabilities, side_of
from .masking import NoGradientError

Forward = Callable[[Tensor], Tensor]
T = TypeVar("T")

_CONFIRM_DRAWS = 10


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the draws of one step say.

    Attributes:
        loss: (B,) the expected loss, or the loss of the expectation.
        draws: (N, B, K) softmax of independent draws, or of the means of antithetic pairs.
        gradient: of the loss, (B, ...); empty where none was asked for.
    """

    loss: Tensor
    draws: Tensor
    gradient: Tensor

    @property
    def probabilities(self) -> Tensor:
        """(B, K) mean softmax."""
        return self.draws.mean(dim=0)


class Oracle:
    """A model as an attack sees it: single noise draws, several of them in one pass where images are few.

    Images of a batch share their draws, which leaves each image's expectation as it is. The draws of a step
    come in antithetic pairs where their number is even, those that confirm a success are independent.

    Args:
        forward: (B, ...) to logits (B, K) of one noise draw.
        noise: how the attack handles the noise.
        seed: of this oracle's draws.
        is_random: whether two passes can differ.
        classes: K.
        reseed: draw noise of torch's global generators from the seed as well (dropout at test time).
        follow: a faster forward whose gradients stand for those of `forward`, which decides about success.
        room: images that a pass of several draws may hold, of `forward` and of `follow`.
        sampling: "shared", or "per_image" where parts of an image are rows of the batch.
    """

    def __init__(
        self,
        forward: Forward,
        noise: Noise,
        *,
        seed: int,
        is_random: bool = True,
        classes: int = 0,
        reseed: bool = False,
        follow: Forward | None = None,
        room: tuple[int, int] = (0, 0),
        sampling: Sampling = "shared",
    ) -> None:
        self.noise, self.seed = noise, seed
        self.classes = classes
        self.generator = torch.Generator("cpu").manual_seed(stream_seed(seed, 0, 0) & 0x7FFF_FFFF_FFFF_FFFF)
        # Who asks for confirmation by several draws knows of a randomness that two passes do not show.
        is_random = is_random or (noise.confirm_draws or 1) > 1
        self.is_random = is_random and not noise.frozen
        # Frozen noise of torch's global generators is that of a fixed batch, and so is each image's own.
        self.may_shrink = not (noise.frozen and (reseed or sampling == "per_image"))
        self._sampling: Sampling = sampling
        self.eot = noise.eot if is_random else 1
        self.follows = follow is not None
        self._forward, self._follow = forward, follow or forward
        # Whether the answer of a step is all there is to know about its success.
        self.exact = follow is None and not self.is_random
        self._seed = seed if noise.frozen else stream_seed(seed, 1, 0)
        self._confirm_seed = stream_seed(seed, 2, 0)
        self._drawn = self._confirmed = 0
        self._reseed = reseed
        self._room = room
        # Pairs of each image's own noise go into batches of one draw, which an odd draw would begin.
        self._pairs = self.eot % 2 == 0 and not noise.frozen

    def share_out(self, steps: int, times: int = 1) -> int:
        """How many steps the draws of `steps` steps make: of a random model fewer, each of more draws.

        `times`: how many steps there are then for each draw of a step, about.
        """
        total = steps * self.eot
        draws = 2 * round(math.sqrt(total / times) / 2)  # even, for antithetic pairs
        if not self.is_random or draws <= self.eot:
            return steps
        self.eot, self._pairs = draws, True
        return max(1, total // draws)

    @property
    def confirm_draws(self) -> int:
        """Fresh draws that confirm a success."""
        if self.noise.confirm_draws is None:
            return _CONFIRM_DRAWS if self.is_random else 1
        return self.noise.confirm_draws

    def _logits(
        self,
        inputs: Tensor,
        draws: range,
        *,
        follow: bool = False,
        confirm: bool = False,
        pairs: bool = False,
    ) -> Tensor:
        """(N, B, K) of N consecutive draws of the steps, or of those that confirm, in one pass."""
        forward = self._follow if follow else self._forward
        seed, count = self._confirm_seed if confirm else self._seed, len(draws)
        antithetic = pairs if confirm else self._pairs
        repeated = inputs if count == 1 else inputs.repeat(count, *[1] * (inputs.dim() - 1))
        numbers = global_noise(other_seed(seed, draws.start)) if self._reseed else nullcontext()
        drawn = noise_draw(
            seed, draws.start, self._sampling, count=count, antithetic=antithetic, portable=self.noise.frozen
        )
        with drawn, numbers:
            logits = forward(repeated)
        return logits.float().view(count, len(inputs), -1)

    def _passes(self, images: int, draws: range, follow: bool) -> list[range]:
        """`draws` in parts, each for one pass."""
        count = max(1, self._room[follow] // max(1, images))
        return [draws[start : start + count] for start in range(0, len(draws), count)]

    def _each(self, inputs: Tensor, draws: range, *, follow: bool = False, **kind: bool) -> Tensor:
        """(N, B, K) logits of single draws; `kind`: see `_logits`."""

        def taken() -> Tensor:
            passes = self._passes(len(inputs), draws, follow)
            return torch.cat([self._logits(inputs, part, follow=follow, **kind) for part in passes])

        return self._one_by_one(taken)

    def _one_by_one(self, taken: Callable[[], T]) -> T:
        """What it returns; of a network that divides its batch, with one draw a pass from now on."""
        try:
            return taken()
        except UnevenBatchError:
            if not any(self._room):
                raise
            self._room = (0, 0)
            return taken()

    def _indices(self) -> range:
        """Numbers of the draws of the next step."""
        if self.noise.frozen:
            return range(self.eot)
        start = self._drawn
        self._drawn += self.eot
        return range(start, start + self.eot)

    def gradient(self, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Estimate:
        """Gradient of the expected `loss` (logits (B, K) to (B,)) with respect to `inputs`."""
        indices = self._indices()
        return self._one_by_one(lambda: self._gradient(inputs, loss, indices))

    def _gradient(self, inputs: Tensor, loss: Callable[[Tensor], Tensor], indices: range) -> Estimate:
        over = None
        if self.noise.average == "probabilities" and len(indices) > 1:
            # The draws twice: for the mean, and then each with its share in the gradient of the mean.
            over = mean_log(self._each(inputs, indices, follow=True)).requires_grad_()
            spend(forwards=len(inputs) * len(indices))
            with torch.enable_grad():
                (outer,) = torch.autograd.grad(loss(over).sum(), over)
        gradient = torch.zeros_like(inputs)
        total, softmax = inputs.new_zeros(len(inputs), dtype=torch.float32), []
        for draws in self._passes(len(inputs), indices, True):
            with torch.enable_grad():
                leaf = inputs.detach().requires_grad_()
                logits = self._logits(leaf, draws, follow=True)
                drawn = logits.log_softmax(dim=2)
                if over is None:
                    each = logits  # of a single draw its probabilities give the same
                    values = torch.stack([loss(one) for one in each]).sum(dim=0)
                else:
                    share = (drawn.detach() - over.detach()).exp() * outer
                    values = (share * drawn).sum(dim=(0, 2))
                if not values.requires_grad:
                    raise NoGradientError
                gradient += torch.autograd.grad(values.sum(), leaf, materialize_grads=True)[0]
            total += values.detach()
            softmax.append(probabilities(logits.detach()))
        check_answers(gradient)
        spend(gradients=len(inputs) * len(indices))
        if over is not None:
            total = loss(over.detach()).float() * len(indices)
        return Estimate(total / len(indices), self._units(torch.cat(softmax)), gradient / len(indices))

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Estimate:
        """The expected `loss`, without a gradient."""
        indices = self._indices()
        each = self._each(inputs, indices)
        spend(forwards=len(inputs) * len(each))
        if self.noise.average == "probabilities" and len(each) > 1:
            value = loss(mean_log(each)).float()
        else:
            value = torch.stack([loss(logits) for logits in each]).mean(dim=0)
        check_answers(each)
        return Estimate(value, self._units(probabilities(each)), inputs.new_empty(0))

    @torch.no_grad()
    def answers(self, inputs: Tensor) -> Tensor:
        """(B,) the likeliest class by one fresh draw."""
        start = self._confirmed
        self._confirmed += 1
        spend(forwards=len(inputs))
        draw = range(start, start + 1)
        logits = self._logits(inputs, draw, confirm=not self.noise.frozen)[0]
        check_answers(logits)
        return logits.argmax(dim=1)

    def _units(self, each: Tensor) -> Tensor:
        """Of single draws (N, B, K), those that are independent: as they are, or the means of pairs."""
        return each.unflatten(0, (-1, 2)).mean(dim=1) if self._pairs else each

    @torch.no_grad()
    def lead(
        self, inputs: Tensor, labels: Tensor, targeted: bool, errors: float = 2.0, *, follow: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(B,) by how much the attack leads in mean probability on fresh draws, and whether that is sure.

        The lead is `p_j - p_y` for the likeliest j != y (negative where the defender is right), or the
        negative if targeted. It is sure above two standard errors, or `errors`: searches ask often, and
        the luckiest of many answers proves little. Without randomness the answer is sure.

        Args:
            inputs: (B, ...).
            labels, targeted: what the attack wants.
            errors: see above.
            follow: ask the faster forward, for searches of which the end is confirmed.
        """
        if self.noise.frozen:
            draws, start = self.noise.eot, 0
        else:
            draws, start = self.confirm_draws, self._confirmed
            self._confirmed += draws
        fresh = range(start, start + draws)
        each = self._each(inputs, fresh, follow=follow, confirm=not self.noise.frozen)
        spend(forwards=len(inputs) * draws)
        return lead_of(probabilities(each), labels, targeted, errors if self.is_random else 0.0)

    @torch.no_grad()
    def side(
        self,
        inputs: Tensor,
        labels: Tensor,
        targeted: bool,
        errors: float,
        *,
        most: int,
        at_once: bool = False,
        follow: bool = False,
    ) -> Tensor:
        """(B,) 1 where the attack surely has what it wants, -1 where it surely has not, 0 in between.

        Of a random model, `confirm_draws` fresh draws answer, in antithetic pairs; those images that they
        leave undecided are asked again and again with twice as many in all, up to `most` times the first.

        Args:
            inputs, labels, targeted, follow: see `lead`.
            errors: standard errors of the lead that make it sure.
            most: see above.
            at_once: ask as many as may be asked from the start: an answer that was looked at once only.
        """
        if not self.is_random:
            return self.lead(inputs, labels, targeted, follow=follow)[1].to(inputs.dtype) * 2 - 1
        first = self.confirm_draws + self.confirm_draws % 2
        sides = inputs.new_zeros(len(inputs))
        pending, units = torch.arange(len(inputs), device=inputs.device), inputs.new_zeros(0)
        draws = first * most if at_once else first
        while True:
            start = self._confirmed + self._confirmed % 2
            self._confirmed = start + draws
            each = self._each(
                inputs[pending], range(start, start + draws), follow=follow, confirm=True, pairs=True
            )
            spend(forwards=len(pending) * draws)
            fresh = probabilities(each).unflatten(0, (-1, 2)).mean(dim=1)
            units = torch.cat([units, fresh]) if len(units) else fresh
            sides[pending] = side_of(units, labels[pending], targeted, errors)
            undecided = sides[pending] == 0
            draws = 2 * len(units)
            if 2 * draws > first * most or not undecided.any():
                return sides
            pending, units = pending[undecided], units[:, undecided]

    def confirmed(
        self,
        inputs: Tensor,
        estimate: Estimate,
        labels: Tensor,
        targeted: bool,
        errors: float = 2.0,
        *,
        follow: bool = False,
    ) -> Tensor:
        """(B,) whether the draws of a step claim a success and fresh ones agree; see `lead`.

        Fresh draws cost as much as a step: they are asked where the lead of the step's own draws is at
        least half as sure.
        """
        claims = lead_of(estimate.draws, labels, targeted, errors / 2 if self.is_random else 0.0)[1]
        if not claims.any() or self.exact:
            return claims
        chosen = claims.nonzero().squeeze(1)
        claims[chosen] = self.lead(inputs[chosen], labels[chosen], targeted, errors, follow=follow)[1]
        return claims
