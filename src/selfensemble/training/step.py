"""One step of training: the gradients of a defense's loss, the optimiser, the schedule, the averaged weights.

Everything random in step s of rank r is a function of (seed, s, r): augmentation, dropout and the noise.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..ensemble.ensemble import SelfEnsemble
from ..fast.replay import StepGradients
from ..noise import kernel
from ..noise.learned import distance_from_start
from ..noise.own_numbers import OwnNumbers
from ..noise.streams import stream_seed
from ..runtime.packages import needs
from .batches import Batch, Batches
from .building import build_ensemble
from .defenses import Networks
from .optimizers import make_optimizer, make_scheduler
from .recipe import Recipe

with needs("selfensemble[train]"):
    from accelerate import Accelerator


class TrainingStep:
    """The network of a recipe, and what a step does to it.

    Args:
        recipe: of the run.
        batches: of the run.
        accelerator: of the run.
        seed: of everything random in the steps of this process.
        steps: of the whole run.
        given: a network instead of the recipe's.

    Attributes:
        teacher: the network that the defense learns from, if it does.
    """

    def __init__(
        self,
        recipe: Recipe,
        batches: Batches,
        accelerator: Accelerator,
        seed: int,
        steps: int,
        given: nn.Module | None = None,
    ) -> None:
        self._recipe, self._batches, self._accelerator, self._seed = recipe, batches, accelerator, seed
        self.teacher: SelfEnsemble | None = None
        ensemble = _first_ensemble(recipe, batches, given)
        optimizer = make_optimizer(ensemble, recipe.train)
        self._model, self._optimizer = accelerator.prepare(ensemble, optimizer)
        self._scheduler = make_scheduler(optimizer, recipe.train, steps)
        self._averaged: AveragedModel | None = None
        if recipe.train.average:
            average = get_ema_multi_avg_fn(recipe.train.average)
            with torch.device("cpu"):  # of the count of its updates, which names none
                self._averaged = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            kernel.prepare()
        replays = (
            batches.device.type == accelerator.device.type == "cuda"
            and accelerator.num_processes == 1
            and accelerator.scaler is None
            and recipe.train.accumulate == 1
            and not batches.streams
        )
        self.gradients = StepGradients(
            self._loss, self._optimizer.zero_grad, seed, replays,
            opposite=recipe.defense.shows_images_once and not recipe.data.mixup,
        )  # fmt: skip

    @property
    def network(self) -> SelfEnsemble:
        """The network in training, without the wrapper of a distributed run."""
        unwrapped: SelfEnsemble = self._accelerator.unwrap_model(self._model)
        return unwrapped

    @property
    def ensemble(self) -> SelfEnsemble:
        """What is validated and saved: the averaged weights, or those in training."""
        if self._averaged is None:
            return self.network
        return cast(SelfEnsemble, self._averaged.module)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._scheduler.get_last_lr()[0])

    def __call__(self, batch: Batch, step: int) -> Tensor:
        """Step number `step`, with the images of a batch; returns the loss."""
        # Of augmentation and dropout; a master seed of its own keeps it apart from the noise's streams.
        torch.manual_seed(stream_seed(stream_seed(self._seed, 0, 1), step, 0))
        self._model.train()
        train = self._recipe.train
        if train.accumulate == 1:
            loss = self.gradients(batch, step)
        else:
            parts = enumerate(_parts(batch, train.accumulate))
            each = [
                self.gradients(part, step * train.accumulate + number, afresh=number == 0)
                for number, part in parts
            ]
            loss = torch.stack(each).sum()
        if train.clip is not None:
            self._accelerator.clip_grad_norm_(self._model.parameters(), train.clip)
        self._optimizer.step()
        self._scheduler.step()
        if self._averaged is not None:
            self._averaged.update_parameters(self.network)
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        """The loss of the images of a batch with the surroundings' noise; adds to the gradients."""
        inputs, labels = self._batches.batch(batch)
        with self._accelerator.autocast():
            networks = Networks(self._model, self.network, self.teacher, len(self._batches.train_indices))
            loss = self._recipe.defense.loss(networks, inputs, labels)
            if self._recipe.noise.learn is not None:
                loss = loss + self._recipe.noise.hold * distance_from_start(self.network)
            if self._recipe.train.accumulate > 1:
                loss = loss / self._recipe.train.accumulate
        self._accelerator.backward(loss)
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """All that the steps to come depend on, for a checkpoint."""
        scaler = self._accelerator.scaler
        return {
            "model": self.network.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.network.load_state_dict(state["model"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])


def _parts(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` equal parts."""
    if isinstance(batch, Tensor):
        return list(batch.chunk(count))
    return list(zip(*(each.chunk(count) for each in batch), strict=True))


def _first_ensemble(recipe: Recipe, batches: Batches, given: nn.Module | None) -> SelfEnsemble:
    """The network to begin with, laid out as the images are."""
    with OwnNumbers(recipe.seed), torch.device("cpu"):
        try:
            ensemble = build_ensemble(recipe, batches.train, given)
        except RuntimeError as error:
            name = recipe.model.network or recipe.model.name
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{name} cannot take images of shape {batches.train.shape} "
                f"({reason}): choose another model.name or data.size, or name the shape of inputs that are "
                "no images (data.shape)"
            ) from error
    return ensemble.to(memory_format=batches.format)  # type: ignore[call-overload, no-any-return]
