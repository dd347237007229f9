"""Training of parametric noise injection: half of the loss is of the images, half of attacked ones.

Source: He et al., CVPR 2019, equation 5, with both weights 0.5. Weights and levels are learned together,
levels without weight decay; that there is noise at all pays only under attack. Their attack has 7 steps, and
follows the network's own answers rather than the labels; here it follows the labels.
"""

from typing import ClassVar, Literal

from torch import Tensor

from ...attacks.norms import Norm
from ...runtime.schema import Positive
from .adversarial import Attacking
from .base import Networks


class ParametricNoiseTraining(Attacking):
    """Cross-entropy of images and attacked images, half each."""

    trains: ClassVar[str | None] = "parametric-noise"
    name: Literal["parametric-noise"] = "parametric-noise"
    norm: Norm = "linf"
    eps: Positive = 8 / 255

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.half_attacked(networks, inputs, labels)
