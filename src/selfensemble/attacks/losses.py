"""What an attack maximises, from logits (B, K) to (B,).

Each loss grows as the attack succeeds: untargeted when the label loses, targeted when it wins.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

_SURE = -60.0
_SOFT = 8.0  # temperatures that the margin of an original image is
LossName = Literal["ce", "margin", "dlr", "probability-margin"]
Loss = Callable[[Tensor, Tensor, bool], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """`-log softmax_y`, or its negative if targeted.

    As `softplus(g)` with `g = logsumexp_j z_j - z_y`, j != y: where a network is sure, `1 - softmax_y` rounds
    to 0 in the usual form, whose gradient then forgets the true class. Below g = -60 it goes on as a line,
    for no gradient to vanish.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    gap = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1) - own
    sure = gap.clamp(max=_SURE)
    loss = torch.nn.functional.softplus(gap.clamp(min=_SURE)) + math.exp(_SURE) * (sure - _SURE)
    return -loss if targeted else loss


def margin(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """`max z_j - z_y`, j != y, or its negative if targeted: above 0 the attack has what it wants.

    Source: Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    rival = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return own - rival if targeted else rival - own


def soft_margin(logits: Tensor, labels: Tensor, targeted: bool, temperature: Tensor) -> Tensor:
    """`t logsumexp_j(z_j / t) - z_y`, j != y, or its negative if targeted: a margin that minds all rivals.

    Its gradient has the direction of the cross-entropy's at the temperature t. Which class is nearest shows
    on the way only, and the margin's gradient follows the one that is likeliest at the moment.

    Args:
        logits: (B, K).
        labels, targeted: what the attack wants.
        temperature: (B,) above 0, in units of the logits.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    scaled = logits.scatter(1, labels[:, None], -torch.inf) / temperature[:, None]
    rivals = scaled.logsumexp(dim=1) * temperature
    return own - rivals if targeted else rivals - own


def temperature_of(margins: Tensor) -> Tensor:
    """(B,) temperatures of the soft margin, from margins (B,) of the original images: an eighth."""
    return (margins.abs() / _SOFT).clamp(min=1e-20)


def probability_margin(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """`max p_j - p_y`, j != y, of the softmax, or its negative if targeted: the lead that the judge measures.

    It is nearly flat where the network is sure. As `(1 + q) sigmoid(g) - 1` with g as in `cross_entropy` and
    the share q of the likeliest rival among the rivals, its gradient keeps the true class there, which the
    difference of two softmax outputs forgets from a lead of some 17 logits on, and goes on as a line.

    Source: Xie et al., Towards Million-Scale Adversarial Robustness Evaluation With Stronger Individual
    Attacks, arXiv 2411.15210 (PMA).
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    rivals = others.logsumexp(dim=1)
    gap, share = rivals - own, (others.amax(dim=1) - rivals).exp()
    sure = gap.clamp(max=_SURE)
    loss = (1 + share) * gap.clamp(min=_SURE).sigmoid() - 1 + math.exp(_SURE) * (sure - _SURE)
    return -loss if targeted else loss


def dlr(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Difference of logits ratio: the margin over `z_(1) - z_(3)`, so that no scaling of the logits matters.

    Targeted: the margin over `z_(1) - (z_(3) + z_(4)) / 2`. The last class stands in where there are
    fewer; two classes have no such ratio (it would be constant), and the margin itself is used.

    Source: Croce & Hein, Reliable evaluation of adversarial robustness, ICML 2020, eq. 6 and 7.
    """
    return margin(logits, labels, targeted) / _scale(logits, targeted)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """DLR from the true `labels` towards `targets`, both (B,): eq. 7 of Croce & Hein 2020."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    wanted = logits.gather(1, targets[:, None]).squeeze(1)
    return (wanted - own) / _scale(logits, True)


def _scale(logits: Tensor, targeted: bool) -> Tensor:
    if logits.shape[1] < 3:
        return torch.ones_like(logits[:, 0])
    ordered = logits.sort(dim=1, descending=True).values
    last = logits.shape[1] - 1
    low = ordered[:, min(2, last)]
    if targeted:
        low = (low + ordered[:, min(3, last)]) / 2
    return ordered[:, 0] - low + 1e-12


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "probability-margin": probability_margin,
}


def of_labels(loss: Loss, labels: Tensor, targeted: bool) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the logits alone."""
    return lambda logits: loss(logits, labels, targeted)


def check_loss(name: str) -> Loss:
    """The loss of this name, or a ValueError that lists them."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}, got {name!r}")
    return LOSSES[name]
