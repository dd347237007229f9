"""The nearest confirmed adversarial image of each image; shared by the minimum-norm attacks."""

import torch
from torch import Tensor

from .expectation import Estimate, Oracle
from .norms import per_image, size

_HALVINGS = 10
# Shares of the way from where the bisection ended to the image that it began with, and beyond.
_RETREATS = (0.0, 0.5, 0.75)
_BEYOND = (1.0, 1.05, 1.1, 1.2)


class Nearest:
    """Keeps, for B images, the nearest image that fools the model, confirmed on fresh draws.

    Of a random model those are draws of the faster forward, if there is one, until `refined` asks the model.

    Attributes:
        best: (B, ...) the images; the original where nothing was found.
        distance: (B,) their distances by `norm`, infinite where nothing was found.
    """

    def __init__(self, oracle: Oracle, x: Tensor, y: Tensor, targeted: bool, norm: str) -> None:
        self.oracle, self.x, self.y, self.targeted, self.norm = oracle, x, y, targeted, norm
        self.best = x.clone()
        self.distance = x.new_full((len(x),), torch.inf)
        # Images that the model gets wrong as they are need no attack.
        self.distance[oracle.lead(x, y, targeted)[1]] = 0.0

    def active(self) -> Tensor:
        """Indices of the images that need an attack; all of them where a batch must stay whole."""
        if not self.oracle.may_shrink:
            return torch.arange(len(self.x), device=self.x.device)
        return (self.distance > 0).nonzero().squeeze(1)

    def visit(
        self, active: Tensor, images: Tensor, estimate: Estimate, asked: Tensor | None = None
    ) -> Tensor:
        """Take note of an iterate of the images `active`.

        Args:
            active: (A,) indices.
            images: (A, ...).
            estimate: of the step.
            asked: (A,) images whose success is to be confirmed even where they are not nearer.

        Returns:
            (A,) which are confirmed successes; not asked ones are confirmed only where nearer.
        """
        distance = size(images - self.x[active], self.norm)
        nearer = distance < self.distance[active]
        chosen = (nearer if asked is None else nearer | asked).nonzero().squeeze(1)
        success = torch.zeros_like(nearer)
        if len(chosen):
            few = Estimate(estimate.loss[chosen], estimate.draws[:, chosen], estimate.gradient)
            success[chosen] = self.oracle.confirmed(
                images[chosen], few, self.y[active[chosen]], self.targeted, follow=self.oracle.is_random
            )
        self._take(active[success & nearer], images[success & nearer])
        return success

    def _take(self, chosen: Tensor, images: Tensor) -> None:
        self.best[chosen] = images
        self.distance[chosen] = size(images - self.x[chosen], self.norm)

    def refined(self) -> Tensor:
        """The best images, moved towards their originals as far as they still fool the model (bisection)."""
        found = (self.distance > 0) & self.distance.isfinite()
        if not found.any():
            return self.best
        chosen = self.active() if not self.oracle.may_shrink else found.nonzero().squeeze(1)
        origin, change, labels = self.x[chosen], self.best[chosen] - self.x[chosen], self.y[chosen]
        low, high = torch.zeros_like(self.distance[chosen]), torch.ones_like(self.distance[chosen])

        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            asked = origin + per_image(middle, change) * change
            success = self.oracle.lead(asked, labels, self.targeted, follow=True)[1]
            low, high = torch.where(success, low, middle), torch.where(success, middle, high)
        if self.oracle.follows:
            high = self._settled(high, origin, change, labels)
        moved = (high != 1) & high.isfinite() & found[chosen]
        self._take(chosen[moved], (origin + per_image(high, change) * change)[moved].clamp(0, 1))
        lost = chosen[high.isinf() & found[chosen]]
        self.best[lost], self.distance[lost] = self.x[lost], torch.inf
        return self.best

    def _settled(self, share: Tensor, origin: Tensor, change: Tensor, labels: Tensor) -> Tensor:
        """(C,) shares of `change` that fool the model itself, infinite where none was found.

        What fools the faster forward may not: then further along `change`, and of a random model, whose
        successes that forward has confirmed, beyond it.
        """
        settled = torch.ones_like(share) if not self.oracle.is_random else torch.full_like(share, torch.inf)
        pending = torch.arange(len(share), device=share.device)
        steps = [share + part * (1 - share) for part in _RETREATS]
        if self.oracle.is_random:
            steps += [torch.full_like(share, part) for part in _BEYOND]
        for step in steps:
            asked = origin[pending] + per_image(step[pending], change) * change[pending]
            fools = self.oracle.lead(asked.clamp(0, 1), labels[pending], self.targeted, 0.0)[1]
            settled[pending[fools]] = step[pending[fools]]
            pending = pending[~fools]
            if len(pending) == 0:
                break
        return settled
