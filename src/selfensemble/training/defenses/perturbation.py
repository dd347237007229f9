"""Training of Learn2Perturb: images and attacked ones, and a reward for noise that grows less with time.

Source: Jeddi et al., CVPR 2020, equations 4 to 6 and algorithm 1, and their code: half the loss is of the
images, half of attacked ones, and `-gamma / H(t) * sum sqrt(theta)` rewards noise, with H(t) the harmonic
number of the epoch. They step along both in turns, here they are one loss; they begin with epochs without
noise and without attack, here there are none; their attack follows the network's own answers, here the
labels.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...noise.perturbing import perturbations
from ...runtime.schema import Count, NonNegative
from .adversarial import Attacking
from .base import Networks

_EULER = 0.5772156649015329


class PerturbationTraining(Attacking):
    """Cross-entropy of images and attacked images, half each, less the harmonic reward of the noise.

    Attributes:
        gamma: weight of the reward.
        period: passes (steps times `train.accumulate`) that make one term of the harmonic number; an epoch of
            CIFAR-10 has 391 steps.
    """

    trains: ClassVar[str | None] = "learned-perturbation"
    name: Literal["learned-perturbation"] = "learned-perturbation"
    gamma: NonNegative = 1e-4
    period: Count = 391

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        layers = perturbations(networks.ensemble)
        with torch.no_grad():
            for layer in layers:
                layer.theta.clamp_(min=layer.least)  # where the step before went below
        loss = self.half_attacked(networks, inputs, labels)
        for layer in layers:
            passes: Tensor = layer.get_buffer("passes")
            reward = layer.levels().sqrt().sum() / harmonic(1 + (passes / self.period).floor())
            loss = loss - self.gamma * reward
            with torch.no_grad():
                passes += 1
        return loss


def harmonic(number: Tensor) -> Tensor:
    """`1 + 1/2 + ... + 1/number` for numbers from 1 on."""
    value: Tensor = torch.special.digamma(number + 1) + _EULER
    return value
