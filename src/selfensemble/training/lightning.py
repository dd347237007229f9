"""A callback of Lightning that trains a module's network as a self-ensemble."""

from typing import Any

import torch
from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError as error:
    raise ImportError("this module needs Lightning: pip install lightning") from error

from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.validators import validate
from ..noise.layer import NoiseConfig


class RandomSelfEnsemble(Callback):
    """Noise in a network that a `LightningModule` trains, and the accuracy of its ensemble in the log.

    The noise is put in when the callback is made. Steps of the module see single draws, in training as in
    validation; after each batch of validation `val_ensemble_accuracy` is logged, of the mean of the draws.
    Batches are (images, labels), or whatever `batch_of` makes of them.

    Args:
        network: the classifier within the module, which returns logits.
        noise: levels; None for the published ones.
        draws: noise draws a prediction.
        example_inputs: a batch of images, to find out the order of layers and what noise would miss.
        limit: batches of validation that the ensemble is asked about, for each costs `draws` passes.

    Attributes:
        ensemble: of the network; `predict`, `save_pretrained` and the rest.

    Raises:
        ValueError: noise would miss part of the network, or has no place in it.
    """

    def __init__(
        self,
        network: nn.Module,
        noise: NoiseConfig | None = None,
        *,
        draws: int = 10,
        example_inputs: Tensor | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if example_inputs is not None:
            errors = [issue for issue in validate(network, example_inputs) if issue.severity == "error"]
            if errors:
                raise ValueError("noise cannot defend this network:\n" + "\n".join(map(str, errors)))
        self.ensemble = SelfEnsemble(network, noise, draws=draws, example_inputs=example_inputs)
        self.limit = limit

    def batch_of(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels of a batch of validation."""
        images, labels = batch
        return images, labels

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *rest: int
    ) -> None:
        """Log the accuracy of the ensemble on this batch."""
        del trainer, outputs, rest
        if self.limit is not None and batch_idx >= self.limit:
            return
        images, labels = self.batch_of(batch)
        right = (self.ensemble.predict(images).label == labels).float().mean()
        pl_module.log("val_ensemble_accuracy", right, on_step=False, on_epoch=True, batch_size=len(labels))
