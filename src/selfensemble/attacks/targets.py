"""Which wrong classes an attack heads for, and in which order."""

from typing import Literal, get_args

import torch
from torch import Tensor

from .expectation import Oracle
from .norms import dual_size

Order = Literal["likely", "near"]
_CANDIDATES = 3  # times as many classes as wanted, of which the nearest are chosen


def check_order(order: str) -> None:
    """Raise a ValueError that lists the known orders unless `order` is one of them."""
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")


def wrong_classes(oracle: Oracle, x: Tensor, y: Tensor, count: int, order: Order, norm: str) -> Tensor:
    """(B, min(count, K - 1)) wrong classes, the most promising first.

    "likely": by the mean probability. "near": by where a linear network would be first,
    `(z_j - z_y) / ||grad (z_j - z_y)||`, among the three times `count` likeliest, a gradient each.

    Source of the latter: Melamed et al., MALT Powers Up Adversarial Attacks, arXiv 2407.02240.

    Args:
        oracle, x, y: as in an attack.
        count: how many, >= 1.
        norm: of the change, whose dual measures gradients.
    """
    wanted = min(count, oracle.classes - 1)
    clean = oracle.evaluate(x, lambda z: z[:, 0]).probabilities
    likely = clean.scatter(1, y[:, None], -1.0).argsort(dim=1, descending=True)[:, : oracle.classes - 1]
    if order == "likely":
        return likely[:, :wanted]
    likely = likely[:, : _CANDIDATES * wanted]
    ahead = []
    for goal in likely.T:

        def lead(logits: Tensor, goal: Tensor = goal) -> Tensor:
            return (logits.gather(1, goal[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

        estimate = oracle.gradient(x, lead)
        ahead.append(estimate.loss / dual_size(estimate.gradient, norm).clamp(min=1e-30))
    nearest = torch.stack(ahead, dim=1).argsort(dim=1, descending=True)[:, :wanted]
    return likely.gather(1, nearest)
