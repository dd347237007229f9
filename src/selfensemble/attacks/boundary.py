"""Where the line from an image through an attacked one crosses the boundary of a network, random or not."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .expectation import Oracle
from .norms import per_image

_HALVINGS = 10
_BEYOND = 0.001  # of a share, about what the bisection of a network that is not random leaves open
_CLOSE = 0.005  # of a share: where the bisection of a random network ends
_MOST, _MOST_SETTLED = 16, 32  # times `confirm_draws` that an answer of a random network may take
# Multiples of a change that are tried until one fools the network, and those that the network itself settles.
_REACH = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)
# The copy that attacks follow may be wrong where the network itself is right by a little, and hardly a change
# apart: hence the large ones.
_SETTLE = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)
_SETTLE_HALVINGS, _FAR = 8, 0.03  # of the way from the last that did not, where that is far
# Standard errors of the lead with which each answer settles: fourteen together err for 5 % of images at most,
# and the others, which few images need, hardly ever.
_SETTLED, _SETTLED_FAR, _USUAL, _USUAL_HALVINGS = 2.7, 4.0, 5.0, 4


@dataclass(frozen=True, slots=True)
class Lines:
    """C lines, `clamp(origin + share * change, 0, 1)`, and what the attack wants there.

    Attributes:
        origin, change: (C, ...) images, and changes of them.
        labels, targeted: what the attack wants.
    """

    oracle: Oracle
    origin: Tensor
    change: Tensor
    labels: Tensor
    targeted: bool

    def at(self, share: Tensor) -> Tensor:
        """(C, ...) the images at shares (C,)."""
        return (self.origin + per_image(share, self.change) * self.change).clamp(0.0, 1.0)

    def crossings(self, known: Tensor) -> Tensor:
        """(C,) the smallest shares found that fool the network; infinite where none does.

        Each image first goes on along its line until fresh draws confirm a success, then the bisection asks
        as many draws as it takes to tell the sides apart. What it ends with is settled by fresh draws of
        the network itself, a little farther along where they do not confirm it: of the images for which a
        share is returned, at most 5 % do not fool the mean over infinitely many draws.

        `known`: (C,) whether a share of 1 is known to fool the network.
        """
        low = self.origin.new_zeros(len(self.origin))
        high = torch.where(known, 1.0, torch.full_like(low, torch.inf))
        for share in _REACH:
            pending = high.isinf()
            if not pending.any():
                break
            verdict = self._ask(torch.full_like(low, share), pending, most=1)
            high = torch.where(verdict > 0, share, high)
            low = torch.where(pending & (verdict <= 0), share, low)
        self._bisect(low, high)
        exact = not self.oracle.is_random
        return self._beyond(high) if exact and not self.oracle.follows else self._settled(high)

    def _beyond(self, high: Tensor) -> Tensor:
        """Shares a little farther along where those fool the network, too.

        At the boundary itself logits are equal up to rounding, which depends on the size of the batch.
        """
        pending = high.isfinite()
        farther = torch.where(pending, (1 + _BEYOND) * high, 1.0)
        return torch.where(pending & (self._ask(farther, pending, most=1) > 0), farther, high)

    def _bisect(self, low: Tensor, high: Tensor) -> None:
        """Bring `low`, that do not fool the network, and `high`, that do, together; in place."""
        doubts = torch.zeros_like(low)
        for _ in range(_HALVINGS):
            pending = high.isfinite() & (doubts < 2)
            if self.oracle.is_random:
                pending &= high - low > _CLOSE * high
            if not pending.any():
                return
            verdict = self._halve(low, high, pending, most=_MOST)
            doubts += pending & (verdict == 0)

    def _halve(self, low: Tensor, high: Tensor, pending: Tensor, **asking: Any) -> Tensor:
        """One step of a bisection of the lines `pending`, in place; what `_ask` says of the middle."""
        middle = torch.where(pending, (low + high) / 2, 1.0)
        verdict = self._ask(middle, pending, **asking)
        high[:] = torch.where(pending & (verdict > 0), middle, high)
        low[:] = torch.where(pending & (verdict <= 0), middle, low)
        return verdict

    def _settled(self, high: Tensor) -> Tensor:
        """(C,) shares of which the network itself is sure: from `high` on, or infinite."""
        asking: dict[str, Any] = {"most": _MOST_SETTLED, "follow": False, "at_once": True}
        low, settled = high.clone(), torch.full_like(high, torch.inf)
        for part in _SETTLE:
            pending = settled.isinf() & high.isfinite()
            if not pending.any():
                break
            share = torch.where(pending, part * high, 1.0)
            errors = _SETTLED if part <= _USUAL else _SETTLED_FAR
            verdict = self._ask(share, pending, errors=errors, **asking)
            settled = torch.where(pending & (verdict > 0), share, settled)
            low = torch.where(pending & (verdict <= 0), share, low)
        for number in range(_SETTLE_HALVINGS):
            pending = settled.isfinite() & (settled - low > _FAR * settled)
            if not pending.any():
                break
            errors = _SETTLED if number < _USUAL_HALVINGS else _SETTLED_FAR
            self._halve(low, settled, pending, errors=errors, **asking)
        return settled

    def _ask(
        self,
        share: Tensor,
        pending: Tensor,
        *,
        most: int,
        errors: float = 2.0,
        follow: bool = True,
        at_once: bool = False,
    ) -> Tensor:
        """(C,) of the lines `pending`: 1 for a sure success, -1 for a sure failure, 0 for neither.

        `most`: times `confirm_draws` that are asked; first fewer where not `at_once`.
        """
        verdict = torch.zeros_like(share)
        chosen = pending.nonzero().squeeze(1)
        if not self.oracle.may_shrink:
            chosen = torch.arange(len(share), device=share.device)
        images, labels = self.at(share)[chosen], self.labels[chosen]
        verdict[chosen] = self.oracle.side(
            images, labels, self.targeted, errors, most=most, at_once=at_once, follow=follow
        )
        return verdict
