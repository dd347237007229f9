"""Training of Adv-BNN: the lower bound of the evidence, of attacked images.

Source: Liu et al., ICLR 2019, equation 9: cross-entropy of attacked images under one draw of the weights,
and the Kullback-Leibler divergence of the posterior from the prior, divided by the number of training
images. Their attack has 10 steps in L-inf 8/256.
"""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from ...noise.bayesian import divergence
from ...runtime.schema import Positive
from .adversarial import Attacking
from .base import Networks, logits_in_train_mode, targets


class BayesianTraining(Attacking):
    """Cross-entropy of attacked images, and the divergence from the prior.

    Attributes:
        divergence: weight of the divergence divided by the number of images; the bound has 1. Of networks
            with many more weights than images 1 can leave nothing but the prior: a VGG16 of 230,000 weights
            on 3,200 images learned nothing in 6 epochs (12.7 %), and with 0.02 and levels from 0.01 nearly
            what it learned without random weights (27.2 and 31.0 %).
    """

    trains: ClassVar[str | None] = "bayesian"
    name: Literal["bayesian"] = "bayesian"
    divergence: Positive = 1.0

    @property
    def shows_images_once(self) -> bool:
        return True

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        if networks.images is None:
            raise ValueError("the bound needs the number of training images: set Networks.images")
        attacked = self.attack_labels(networks.ensemble, inputs, labels)
        logits = logits_in_train_mode(networks, attacked)
        loss = functional.cross_entropy(logits, targets(labels, logits))
        return loss + self.divergence / networks.images * divergence(networks.ensemble)
