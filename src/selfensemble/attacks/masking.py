"""Models that pass no gradient to their inputs: most attacks cannot be made on them."""

from torch import Tensor

NEED_NO_GRADIENT = ("square", "random-noise")  # names in `ATTACKS`


class NoGradientError(ValueError):
    """The outputs of a model do not depend differentiably on its inputs: its gradients are masked."""

    def __init__(self) -> None:
        super().__init__(
            "the model passes no gradient to its inputs (a threshold, detach, argmax, rounding or NumPy?): "
            "attack it with square or random_noise, or replace what breaks the gradient by a differentiable "
            "approximation"
        )


def are_labels(outputs: Tensor) -> bool:
    """Whether every row of outputs (B, K) is one 1 and else 0: an answer without logits."""
    return bool(((outputs == 0) | (outputs == 1)).all() and (outputs.sum(dim=1) == 1).all())
