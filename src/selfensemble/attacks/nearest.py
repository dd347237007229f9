"""The nearest confirmed adversarial image of each image; shared by the minimum-norm attacks."""

import torch
from torch import Tensor

from .boundary import Lines
from .expectation import Estimate, Oracle
from .losses import LOSSES, margin, of_labels
from .norms import ascent, dual_size, largest_eps, per_image, project, size

# Steps where nothing was confirmed, each in shares of the distance, and standard errors that end them.
_ASCENT, _STEP, _SURE = 30, 0.2, 4.0
_TURNS, _PACE = 20, 0.2  # steps at the same length, the first of them in shares of it


class Nearest:
    """Keeps, for B images, the nearest image that fools the model, confirmed on fresh draws.

    Of a random model those are draws of the faster forward, if there is one, until `refined` asks the model
    itself. Iterates hover at the boundary, where draws confirm little: the last one is kept, too.

    Attributes:
        best: (B, ...) the images; the original where nothing was found.
        distance: (B,) their distances by `norm`, infinite where nothing was found.
        last: (B, ...) the last iterates.
        turns: gradient steps that `refined` takes of a random model; attacks take them from their own.
    """

    def __init__(self, oracle: Oracle, x: Tensor, y: Tensor, targeted: bool, norm: str) -> None:
        self.oracle, self.x, self.y, self.targeted, self.norm = oracle, x, y, targeted, norm
        self.best, self.last = x.clone(), x.clone()
        self.distance = x.new_full((len(x),), torch.inf)
        self.turns = max(2, _TURNS // oracle.eot) if oracle.is_random else 0
        # Images that the model surely gets wrong as they are need no attack.
        self.distance[oracle.side(x, y, targeted, _SURE, most=1) > 0] = 0.0

    def active(self) -> Tensor:
        """Indices of the images that need an attack; all of them where a batch must stay whole."""
        if not self.oracle.may_shrink:
            return torch.arange(len(self.x), device=self.x.device)
        return (self.distance > 0).nonzero().squeeze(1)

    def visit(
        self,
        active: Tensor,
        images: Tensor,
        estimate: Estimate,
        *,
        asked: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Take note of an iterate of the images `active`.

        Args:
            active: (A,) indices.
            images: (A, ...).
            estimate: of the step.
            asked: (A,) images whose success is to be confirmed even where they are not nearer.
            allowed: (A,) images that may count as a success; None for all.

        Returns:
            (A,) which are confirmed successes; not asked ones are confirmed only where nearer.
        """
        self.last[active] = images
        distance = size(images - self.x[active], self.norm)
        # The original itself, where attacks begin, was judged by more draws.
        nearer = (distance > 0) & (distance < self.distance[active])
        wanted = nearer if asked is None else nearer | asked
        chosen = (wanted if allowed is None else wanted & allowed).nonzero().squeeze(1)
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
        """The best images, at the boundary; where there is none, from the last iterate on.

        See `Lines.crossings`: the search goes along the line through the nearest confirmed image, or of a
        random model through the last iterate, where that leads more at the same distance. Where nothing was
        confirmed, or by luck, the last iterate ascends until a success is sure, and the search begins again.
        """
        if (self.distance > 0).any():
            exact = not self.oracle.is_random and not self.oracle.follows
            found = (self.distance > 0) & self.distance.isfinite()
            self._cross(found, known=exact)
            lost = self.distance.isinf()
            if lost.any():
                self._ascend()
                self._cross(lost & self.distance.isfinite(), known=exact)
        return self.best

    def _cross(self, wanting: Tensor, known: bool) -> None:
        """Move the best images of `wanting` (B,) to the boundary, or give them up."""
        if not wanting.any():
            return
        chosen = wanting.nonzero().squeeze(1)
        if not self.oracle.may_shrink:
            chosen = torch.arange(len(self.x), device=self.x.device)
        lines = self._lines(chosen)
        share = lines.crossings(wanting[chosen] & known)
        found = share.isfinite() & wanting[chosen]
        images = lines.at(torch.where(found, share, 0.0))
        self._take(chosen[found], images[found])
        lost = chosen[~found & wanting[chosen]]
        self.best[lost], self.distance[lost] = self.x[lost], torch.inf

    def _ascend(self) -> None:
        """Bring the last iterate of each image without a success up the margin, in growing steps."""
        pending = self.distance.isinf().nonzero().squeeze(1)
        if not self.oracle.may_shrink:
            pending = torch.arange(len(self.x), device=self.x.device)
        images, labels = self.last[pending], self.y[pending]
        for _ in range(_ASCENT):
            estimate = self.oracle.gradient(images, of_labels(margin, labels, self.targeted))
            sure = self.oracle.confirmed(images, estimate, labels, self.targeted, _SURE, follow=True)
            new = sure & self.distance[pending].isinf()
            self._take(pending[new], images[new])
            stay = ~sure if self.oracle.may_shrink else torch.ones_like(sure)
            pending, images, labels = pending[stay], images[stay], labels[stay]
            if len(pending) == 0:
                break
            gradient, origin = estimate.gradient[stay], self.x[pending]
            ahead = estimate.loss[stay].abs() / dual_size(gradient, self.norm).clamp(min=1e-12)
            length = torch.maximum(size(images - origin, self.norm), ahead)
            length = length.clamp(max=largest_eps(self.norm, origin[:1].numel()))
            gradient = self._anywhere(gradient)
            images = (images + ascent(gradient, self.norm, _STEP * length, images)).clamp(0.0, 1.0)
        self.last[:] = self.best

    def _anywhere(self, gradient: Tensor) -> Tensor:
        """The gradient, random where it is 0: no direction is known to be better than another."""
        flat = gradient.flatten(1).abs().amax(dim=1) == 0
        if not flat.any():
            return gradient
        drawn = torch.empty(gradient.shape, dtype=torch.float32, device=self.oracle.generator.device)
        drawn.normal_(generator=self.oracle.generator)
        return torch.where(per_image(flat, gradient), drawn.to(gradient.device, gradient.dtype), gradient)

    def _lines(self, chosen: Tensor) -> Lines:
        """Of each of the images `chosen`, the better of two lines."""
        origin, labels = self.x[chosen], self.y[chosen]
        confirmed, last = self.best[chosen] - origin, self.last[chosen] - origin
        length, moved = self.distance[chosen], size(last, self.norm) > 0
        last = at_length(last, torch.where(length.isfinite(), length, 0.0), self.norm)
        change = confirmed
        if self.oracle.is_random:
            leads = [
                self.oracle.lead((origin + each).clamp(0, 1), labels, self.targeted, follow=True)[0]
                for each in (confirmed, last)
            ]
            change = torch.where(per_image(moved & (leads[1] > leads[0]), last), last, confirmed)
            if self.turns:
                change = self._turned(origin, change, labels, leads[0].maximum(leads[1]))
        return Lines(self.oracle, origin, change, labels, self.targeted)

    def _turned(self, origin: Tensor, change: Tensor, labels: Tensor, lead: Tensor) -> Tensor:
        """Changes (C, ...) of the same length that lead more in mean probability, or those that were."""
        length = size(change, self.norm)
        climbed = of_labels(LOSSES["probability-margin"], labels, self.targeted)
        turned = change
        for step in range(self.turns):
            gradient = self.oracle.gradient((origin + turned).clamp(0, 1), climbed).gradient
            pace = _PACE * (1 - step / self.turns) * length
            ahead = ascent(gradient, self.norm, pace, (origin + turned).clamp(0, 1))
            turned = project(turned + ahead, self.norm, length, origin)
        now = self.oracle.lead((origin + turned).clamp(0, 1), labels, self.targeted, follow=True)[0]
        return torch.where(per_image(now > lead, change), turned, change)


def at_length(change: Tensor, length: Tensor, norm: str) -> Tensor:
    """Changes (B, ...) scaled to norms (B,); zero stays zero."""
    return change * per_image(length / size(change, norm).clamp(min=1e-12), change)
