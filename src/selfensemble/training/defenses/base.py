"""What a defense by training is: a section of a recipe that knows its loss."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...data.labels import class_numbers
from ...ensemble.ensemble import SelfEnsemble
from ...runtime.schema import Section


@dataclass(frozen=True, slots=True)
class Networks:
    """What a loss may use.

    Attributes:
        model: the network in training, in train mode, one noise draw a forward pass; its gradients are
            wanted. A distributed run needs it to be called just once a step.
        ensemble: the same network without the wrapper of a distributed run.
        teacher: the network that `Defense.teacher` asked for, in eval mode.
        images: how many there are to learn from.
    """

    model: nn.Module
    ensemble: SelfEnsemble
    teacher: SelfEnsemble | None = None
    images: int | None = None


class Defense(Section):
    """The section `defense` of a recipe. Subclasses set `name`, their settings, and the loss.

    `trains`: the kind of random layers (`randomness.name` of the recipe) that its loss is about, if it is.
    """

    trains: ClassVar[str | None] = None

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of one step, a scalar.

        Args:
            networks: see there.
            inputs: (B, C, H, W) in [0, 1], augmented.
            labels: (B,) integers, on any device.

        Raises:
            ValueError, TypeError: labels that are no class numbers; values are looked at on a CPU alone.
        """
        raise NotImplementedError

    @property
    def shows_images_once(self) -> bool:
        """Whether no pass in train mode holds an image twice, so that two may have opposite noise."""
        return False

    def teacher(self) -> "Defense | None":
        """The objective of a network to learn from, trained first by the same recipe, if there is one."""
        return None


def targets(labels: Tensor, logits: Tensor) -> Tensor:
    """(B,) int64 beside the logits (B, K)."""
    images, classes = logits.shape
    # Looking would make a step wait for its device: there it is for `ImageData` to look, once.
    look = logits.device.type == "cpu"
    return class_numbers(labels, images, device=logits.device, classes=classes, look=look)


def logits_in_train_mode(networks: Networks, inputs: Tensor) -> Tensor:
    """(B, K) float32, of one noise draw."""
    logits: Any = networks.model(inputs)
    return logits.float()  # type: ignore[no-any-return]
