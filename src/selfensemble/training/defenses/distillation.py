"""Defensive distillation: a network taught by another one at a high temperature.

Source: Papernot et al., Distillation as a Defense to Adversarial Perturbations against Deep Neural
Networks, IEEE S&P 2016. Carlini & Wagner (IEEE S&P 2017) broke it.

The losses are multiplied by the temperature, which undoes the factor that it puts on the gradient of the
logits: else the learning rate of plain training would be a hundred times too small at T = 100.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .base import Defense, Networks, logits_in_train_mode
from .cross_entropy import CrossEntropy, Temperature


class Distillation(Defense):
    """Cross-entropy at a temperature against the teacher's answers; the network answers at temperature 1.

    The teacher is the same network, trained by the same recipe at the same temperature.
    """

    name: Literal["distillation"] = "distillation"
    temperature: Temperature = 100.0

    def teacher(self) -> CrossEntropy:
        return CrossEntropy(temperature=self.temperature)

    @property
    def shows_images_once(self) -> bool:
        return True

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        if networks.teacher is None:
            raise ValueError("distillation needs the teacher that `Distillation.teacher` describes")
        with torch.no_grad():
            answers = (networks.teacher.draw_logits(inputs).float() / self.temperature).softmax(dim=1)
        logits = logits_in_train_mode(networks, inputs)
        return self.temperature * functional.cross_entropy(logits / self.temperature, answers)
