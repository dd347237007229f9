"""Training of WCA-Net: cross-entropy of noisy passes, and a reward for noise along the last weights.

Source: Eustratiadis et al., ICML 2021, section 3.3: `-log sum_k w_k L L^T w_k^T`, with weight decay on L and
on the last layer, which bounds it. No attack in training, which is the point of the paper.
"""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from ...noise.aligned import alignments
from ...runtime.schema import NonNegative
from .base import Defense, Networks, logits_in_train_mode, targets


class AlignmentTraining(Defense):
    """Cross-entropy, and minus the logarithm of the variance that the noise gives the logits, summed.

    Attributes:
        weight: of the logarithm; the paper has 1.
    """

    trains: ClassVar[str | None] = "aligned-noise"
    name: Literal["aligned-noise"] = "aligned-noise"
    weight: NonNegative = 1.0

    @property
    def shows_images_once(self) -> bool:
        return True

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = logits_in_train_mode(networks, inputs)
        loss = functional.cross_entropy(logits, targets(labels, logits))
        for variance in alignments(networks.ensemble):
            loss = loss - self.weight * variance.log()
        return loss
