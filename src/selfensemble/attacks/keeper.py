"""The best image of each image, and which images are finished."""

from collections.abc import Callable

import torch
from torch import Tensor

from .expectation import Estimate, Oracle
from .leads import fooled

# Standard errors of the lead above which an attack on a random model rests. One that rested at two would
# leave images that are classified correctly again one time in ten.
_REST = 4.0


class Keeper:
    """Keeps, for B images, the best adversarial image found.

    A success is better than none, and then the larger value is better. With randomness values are leads
    in mean probability on fresh draws, for a lucky draw makes no image better; without it they are
    losses, which are then exact.
    """

    check_every = 10  # steps between two looks for confirmed successes of a random model

    def __init__(self, oracle: Oracle, x: Tensor, y: Tensor, targeted: bool) -> None:
        self.oracle, self.x, self.y, self.targeted = oracle, x, y, targeted
        self.best = x.clone()
        self.value = x.new_full((len(x),), -torch.inf)
        self.success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._looked = False

    def candidates(self, early_stop: bool) -> Tensor:
        """Indices of the images for the next run: all, or with `early_stop` those without a success."""
        everything = torch.arange(len(self.x), device=self.x.device)
        if not early_stop or not self.oracle.may_shrink:
            return everything
        if not self._looked:
            self._looked = True
            self.success = self.oracle.lead(self.x, self.y, self.targeted, _REST)[1]
        return everything[~self.success]

    def visit(self, active: Tensor, images: Tensor, estimate: Estimate, *, stop: bool, step: int) -> Tensor:
        """Take note of an iterate of the images `active`.

        Returns:
            (len(active),) which of them stay in the batch: all, but with `stop` those without success.
        """
        stay = torch.ones(len(active), dtype=torch.bool, device=active.device)
        labels = self.y[active]
        if not self.oracle.is_random:
            success = self.oracle.confirmed(images, estimate, labels, self.targeted)
            self._take(active, images, estimate.loss, success)
            return ~success if stop and self.oracle.may_shrink else stay
        if stop and step % self.check_every == self.check_every - 1:
            stay = ~self.oracle.confirmed(images, estimate, labels, self.targeted, _REST)
            self._take(active[~stay], images[~stay], self.value.new_zeros(int((~stay).sum())), True)
        return stay

    def finish(self, active: Tensor, images: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        """Take note of the last iterate of a run; `loss` maps logits (len(active), K) to losses."""
        if len(active) == 0:
            return
        labels = self.y[active]
        if self.oracle.is_random:
            value, success = self.oracle.lead(images, labels, self.targeted, _REST)
        else:
            estimate = self.oracle.evaluate(images, loss)
            value, success = estimate.loss, fooled(estimate.probabilities, labels, self.targeted)
        self._take(active, images, value, success)

    def _take(self, active: Tensor, images: Tensor, value: Tensor, success: Tensor | bool) -> None:
        had = self.success[active]
        now = torch.as_tensor(success, device=active.device).expand(len(active))
        better = (now & ~had) | ((now == had) & (value > self.value[active]))
        chosen = active[better]
        self.best[chosen], self.value[chosen] = images[better], value[better]
        self.success[chosen] = now[better]
