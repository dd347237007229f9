"""A callback of Lightning that trains a module's network as a self-ensemble."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data.labels import class_numbers
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.validators import validate
from ..noise.injection import random_layers
from ..noise.layer import GaussianNoise
from ..noise.learned import LearnedNoise
from ..noise.levels import NoiseConfig
from ..runtime.packages import needs

with needs("lightning"):
    from lightning.pytorch import Callback, LightningModule


class _OnSaveCheckpoint:
    """Instead of a module's `on_save_checkpoint`: the levels of the noise go into the checkpoint, too.

    Lightning calls it for every checkpoint, and callbacks only where it saves more than weights.

    Args:
        module: whose hook it is.
        network: the classifier within it.
        before: the hook that it had.
    """

    def __init__(self, module: LightningModule, network: nn.Module, before: Any) -> None:
        self.module, self.network, self.before = module, network, before

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.before(checkpoint)
        checkpoint["state_dict"].update(_levels(self.module, self.network))


def _levels(module: LightningModule, network: nn.Module) -> dict[str, Tensor]:
    """Levels of the noise within `network`, by keys of a state dict of `module`, which has learned ones."""
    ours = set(network.modules())
    return {
        f"{fqn.replace('_fsdp_wrapped_module.', '')}.std": torch.tensor(
            layer.std, dtype=torch.float64, device="cpu"
        )
        for fqn, layer in module.named_modules()
        if isinstance(layer, GaussianNoise) and not isinstance(layer, LearnedNoise) and layer in ours
    }


class RandomSelfEnsemble(Callback):
    """Noise in a network that a `LightningModule` trains, and the accuracy of its ensemble in the log.

    Checkpoints hold the levels of the noise as `....gaussian_noise.std`. A module whose network has noise
    takes them from there; into one without `load_from_checkpoint` fails, as these keys are unexpected.

    The noise is put in when the callback is made. Steps of the module see single draws, in training as in
    validation; after each batch of validation `val_ensemble_accuracy` is logged, of the mean of the draws.
    Batches are (images, labels), labels of shape (B,), or whatever `batch_of` makes of them.

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
            if not random_layers(network):  # what it was saved with comes back below
                errors = [issue for issue in errors if issue.rule != "lost-noise"]
            if errors:
                raise ValueError("noise cannot defend this network:\n" + "\n".join(map(str, errors)))
        self.ensemble = SelfEnsemble(network, noise, draws=draws, example_inputs=example_inputs)
        self.limit = limit

    def batch_of(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and class numbers (B,) of a batch of validation."""
        images, labels = batch
        return images, labels

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """See to it that checkpoints hold the noise.

        Raises:
            ValueError: the network is not part of the module.
        """
        del trainer, stage
        network = self.ensemble.model
        if network not in set(pl_module.modules()):
            raise ValueError(
                f"the callback's network is not part of {type(pl_module).__name__}: give it the "
                "module's own, e.g. RandomSelfEnsemble(module.network)"
            )
        if not isinstance(pl_module.on_save_checkpoint, _OnSaveCheckpoint):
            hook = _OnSaveCheckpoint(pl_module, network, pl_module.on_save_checkpoint)
            pl_module.on_save_checkpoint = hook  # type: ignore[method-assign]

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *rest: int
    ) -> None:
        """Log the accuracy of the ensemble on this batch.

        Raises:
            ValueError: what `batch_of` gives are no class numbers of shape (B,).
        """
        del trainer, outputs, rest
        if self.limit is not None and batch_idx >= self.limit:
            return
        images, labels = self.batch_of(batch)
        answer = self.ensemble.predict(images)
        classes = answer.probabilities.shape[1]
        try:
            labels = class_numbers(labels, len(images), device=answer.label.device, classes=classes)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{error}: override batch_of, which is to give images and class numbers"
            ) from error
        right = (answer.label == labels).float().mean()
        pl_module.log("val_ensemble_accuracy", right, on_step=False, on_epoch=True, batch_size=len(labels))
