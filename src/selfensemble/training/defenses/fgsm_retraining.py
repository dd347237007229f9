"""Adversarial retraining as the method's paper compares with it: FGSM on half of each batch.

Source: Liu et al., ECCV 2018, section 4.1, after Kurakin et al., Adversarial Machine Learning at Scale,
ICLR 2017.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional

from ...attacks.norms import project
from ...noise.injection import eval_mode
from ...runtime.schema import Positive
from .base import Defense, Networks, logits_in_train_mode, targets


class FgsmRetraining(Defense):
    """Cross-entropy of a batch, half of which is attacked in one step of a random length.

    Attributes:
        smallest_eps, largest_eps: L-inf length of the step, in the units of the inputs, uniform in between,
            each image its own.
    """

    name: Literal["fgsm-retraining"] = "fgsm-retraining"
    smallest_eps: Positive = 0.1
    largest_eps: Positive = 0.3

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.smallest_eps > self.largest_eps:
            both = f"{self.smallest_eps:g} and {self.largest_eps:g}"
            raise ValueError(f"smallest_eps must be at most largest_eps, got {both}")
        return self

    @property
    def shows_images_once(self) -> bool:
        return True

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        half = len(inputs) // 2
        leaf = inputs[:half].clone().requires_grad_()
        with eval_mode(networks.ensemble):
            logits = networks.ensemble.draw_logits(leaf).float()
            found = functional.cross_entropy(logits, targets(labels[:half], logits))
            (gradient,) = torch.autograd.grad(found, leaf)
        low, high = networks.ensemble.bounds or (0.0, 1.0)
        scale = high - low
        each = (half, *[1] * (inputs.dim() - 1))
        eps = inputs.new_empty(each).uniform_(self.smallest_eps, self.largest_eps) / scale
        unit = (inputs[:half] - low) / scale
        change = scale * project(eps * gradient.sign(), "linf", self.largest_eps / scale, unit)
        mixed = torch.cat([inputs[:half] + change, inputs[half:]])
        logits = logits_in_train_mode(networks, mixed)
        return functional.cross_entropy(logits, targets(labels, logits))
