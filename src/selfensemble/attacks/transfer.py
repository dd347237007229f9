"""Transfer: adversarial images made on one model, tried on another."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..noise.injection import noise_disabled
from .apgd import apgd


def transfer(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    surrogate: nn.Module | None = None,
    attack: Callable[..., Tensor] = apgd,
    **settings: Any,
) -> Tensor:
    """Attack `surrogate` instead of `model`.

    Args:
        surrogate: any classifier of the same classes; None for the static base, which is `model` with
            its noise switched off.
        attack: the attack, with `settings` as its keyword arguments.
        model, inputs, labels, targeted: see `pgd`.
    """
    if surrogate is not None:
        return attack(surrogate, inputs, labels, targeted=targeted, **settings)
    with noise_disabled(model):
        return attack(model, inputs, labels, targeted=targeted, **settings)
