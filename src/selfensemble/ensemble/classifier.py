"""A classifier whose passes may differ, one noise draw at a time."""

import torch
from torch import Tensor, nn

from ..noise.injection import random_layers
from ..noise.streams import Sampling, check_sampling
from .checks import floating_dtype, logits_of


class RandomClassifier(nn.Module):
    """What there is to know of a network to draw from it.

    Args:
        model: a classifier that returns logits (B, K).
        sampling: how draws are sampled in eval mode, see `GaussianNoise`.

    Attributes:
        folds: by shape of an image, whether one pass can hold several draws; found out when it is wanted.
    """

    # Input elements of a forward pass on a CPU: 32 images of 32x32.
    chunk = 32 * 3 * 32 * 32
    # Whether noisy copies of activations fit where a plain pass has its activations in float32.
    has_half_activations = False

    def __init__(self, model: nn.Module, sampling: Sampling) -> None:
        super().__init__()
        self.model = model
        self.sampling: Sampling = check_sampling(sampling)
        self.folds: dict[tuple[int, ...], bool] = {}
        for layer in random_layers(model):
            layer.sampling = self.sampling

    @property
    def is_random(self) -> bool:
        """Whether two forward passes can differ: any random layer is on, with a level above 0."""
        return any(layer.is_active for layer in random_layers(self.model))

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What inputs are converted to."""
        return floating_dtype(self)

    def draw_logits(self, inputs: Tensor) -> Tensor:
        """Logits (B, K) of one noise draw.

        Raises:
            OutputError: the model returns something else, see `logits_of`.
        """
        return logits_of(self.model(inputs), inputs.shape[0])
