"""Attacks: `attack(model, inputs, labels, *, targeted=False, ..., eot=1, seed=None) -> adversarial`.

`inputs` are (B, ...) in [0, 1], or in the `bounds` of an ensemble, and radii are then in these units: audio
in [-1, 1], or images that were standardised before. `labels` are (B,) integers, the true classes, or the
target classes if `targeted`. Adversarial images have the shape of `inputs` and stay in that range. An attack
attacks the model in eval mode and computes gradients with respect to its inputs only. Its result is not yet a
success: `evaluation.judge` decides on fresh noise whether an image is adversarial. For how attacks handle
noise, see `Noise`.
"""

from collections.abc import Callable

from torch import Tensor

from .apgd import apgd, apgd_targeted
from .autoattack import autoattack_rand, autoattack_standard, published_rule
from .averaging import Noise
from .budget import Budget, count_evaluations
from .cw import cw_l2, cw_l2_paper
from .fab import fab
from .minimum_norm import ddn, fmn
from .pgd import fgsm, pgd
from .random_search import random_noise
from .square import square
from .transfer import transfer

__all__ = [
    "ATTACKS",
    "Budget",
    "Noise",
    "apgd",
    "apgd_targeted",
    "autoattack_rand",
    "autoattack_standard",
    "count_evaluations",
    "cw_l2",
    "cw_l2_paper",
    "ddn",
    "fab",
    "fgsm",
    "fmn",
    "pgd",
    "published_rule",
    "random_noise",
    "square",
    "transfer",
]

# Attacks by the names that protocols use.
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "apgd": apgd,
    "apgd-t": apgd_targeted,
    "cw": cw_l2,
    "cw-paper": cw_l2_paper,
    "ddn": ddn,
    "fmn": fmn,
    "fab": fab,
    "square": square,
    "random-noise": random_noise,
    "autoattack-rand": autoattack_rand,
    "autoattack-standard": autoattack_standard,
}
