"""Training: SGD on the loss of a defense, by default the cross-entropy of one noisy forward pass.

Everything random in step s of rank r is a function of (seed, s, r): the order of the images, the
augmentation, dropout and the noise. So a checkpoint needs weights, optimiser and step only, and a run
that was killed and resumed ends in the same weights as one that was left alone.

Source: Liu et al. 2018, algorithm 1 and section 4.
"""

import io
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..artefacts import storage
from ..data.images import ImageData, split_validation
from ..data.sources import load_data
from ..ensemble.ensemble import SelfEnsemble
from ..fast.replay import StepGradients
from ..fast.small_maps import speed_up_small_maps_
from ..noise.learned import distance_from_start, mean_levels, parameter_groups
from ..noise.streams import stream_seed
from ..runtime.files import atomic_write, write_json
from ..runtime.interrupts import Interrupted, stop_requests
from ..runtime.processes import check_restarts
from ..runtime.provenance import accuracy_record, provenance
from .accuracy import count_correct
from .augmentation import augmentation
from .building import architecture, build_ensemble, make_scheduler
from .defenses import Networks
from .recipe import Recipe

CHECKPOINT, RESULTS, TEACHER = "checkpoint.pt", "results.json", "teacher"
_CHECKPOINT_VERSION = 2
_ON_DEVICE = 2**31  # bytes of images that an accelerator keeps
Progress = Callable[[int, int, str], None]


class Trainer:
    """One training run, from a recipe to a saved ensemble.

    Args:
        recipe: what to train.
        out: folder for checkpoint, TensorBoard log, results and the ensemble.
        data: overrides the source of the recipe's data, e.g. a folder.
        resume: go on from the checkpoint in `out`; from the start if there is none yet.
        overwrite: start afresh although `out` holds a run.
        progress: called after every step with (step, steps, text).

    Raises:
        FileExistsError: `out` holds a run, and neither `resume` nor `overwrite` is given.
        ValueError: the checkpoint is damaged or belongs to another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        data: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if data is not None:
            # Recorded, so that resuming and evaluating read the same images without being told.
            folder = Path(data).expanduser()
            source = str(folder.resolve()) if folder.is_dir() else data
            section = recipe.data.model_copy(update={"source": source})
            recipe = recipe.model_copy(update={"data": section})
        self.recipe, self.out = recipe, Path(out)
        self.progress = progress or (lambda step, steps, text: None)
        # A second run in one process may want another precision than the first; a teacher wants the same.
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.train.precision:
            AcceleratorState._reset_state()
        check_restarts()
        # Told so, Accelerate joins the processes that torchrun starts on a machine without accelerator.
        self.accelerator = Accelerator(
            mixed_precision=recipe.train.precision, cpu=not torch.accelerator.is_available()
        )
        self._overwrite = overwrite
        self._replaces = self._check_folder(resume, overwrite)
        self._load_images()
        self.batch_size = self._shared_batch()
        self.epoch_steps = len(self.train_indices) // self.batch_size
        self.steps = self.epoch_steps * recipe.train.epochs
        self.step, self.history, self.seconds = 0, list[dict[str, float]](), 0.0
        self._epoch_loss = 0.0
        self._seed = stream_seed(recipe.seed, self.accelerator.process_index, 0)
        self._augment = augmentation(recipe.data)
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            try:
                ensemble = build_ensemble(recipe, self.train_data)
            except RuntimeError as error:
                shape = tuple(self.train_data.images.shape[1:])
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"{recipe.model.name} cannot take images of shape {shape} "
                    f"({reason}): choose another model.name or data.size"
                ) from error
        self._format = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        ensemble.to(memory_format=self._format)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            parameter_groups(ensemble),
            lr=recipe.train.lr,
            momentum=recipe.train.momentum,
            weight_decay=recipe.train.weight_decay,
            nesterov=recipe.train.nesterov,
        )
        self.model, self.optimizer = self.accelerator.prepare(ensemble, optimizer)
        self.scheduler = make_scheduler(optimizer, recipe.train, self.steps)
        self._averaged: AveragedModel | None = None
        if recipe.train.average:
            average = get_ema_multi_avg_fn(recipe.train.average)
            self._averaged = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        speed_up_small_maps_(self.network)
        self._teacher: SelfEnsemble | None = None
        replays = (
            self._images.device.type == self.accelerator.device.type == "cuda"
            and self.accelerator.num_processes == 1
            and self.accelerator.scaler is None
        )
        self._step_gradients = StepGradients(self._gradients, self.optimizer.zero_grad, self._seed, replays)
        if resume and (self.out / CHECKPOINT).exists():
            self._load_checkpoint()

    def _check_folder(self, resume: bool, overwrite: bool) -> bool:
        """Whether an earlier run in the folder is to be replaced; an error unless the user said so."""
        existing = {name for name in (CHECKPOINT, storage.CONFIG) if (self.out / name).exists()}
        # Every rank must have looked before one of them writes.
        self.accelerator.wait_for_everyone()
        if existing and not (resume or overwrite):
            raise FileExistsError(
                f"{self.out} holds a run already: pass --resume to go on with it, --overwrite to start "
                "afresh, or another --out"
            )
        if existing == {storage.CONFIG} and resume:
            raise FileExistsError(
                f"{self.out} holds an ensemble but no checkpoint to go on from: pass --overwrite to start "
                "afresh, or another --out"
            )
        return bool(existing) and not resume

    def _load_images(self) -> None:
        config = self.recipe.data
        with self.accelerator.main_process_first():
            self.train_data = load_data(config.source, "train", size=config.size)
            test_data = load_data(config.source, "test", size=config.size)
        self.test_data = test_data.with_classes(self.train_data.classes)
        if config.images is not None:
            self.train_data, self.test_data = (
                part.sample(config.images, self.recipe.seed) for part in (self.train_data, self.test_data)
            )
        shapes = [tuple(part.images.shape[1:]) for part in (self.train_data, self.test_data)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"training images are {shapes[0]}, test images {shapes[1]} (channels, height, width): "
                "convert them to one kind, or set data.size"
            )
        self._images, self._labels = self.train_data.images, self.train_data.labels
        if self._images.nbytes <= _ON_DEVICE:
            device = self.accelerator.device
            self._images, self._labels = self._images.to(device), self._labels.to(device)
        self.train_indices, self.validation_indices = split_validation(
            len(self.train_data), config.validation, self.recipe.seed
        )

    def _shared_batch(self) -> int:
        """The batch size of all processes together, a multiple of their number."""
        processes: int = self.accelerator.num_processes
        batch = min(self.recipe.train.batch_size, len(self.train_indices))
        if batch < 2 * processes:
            raise ValueError(
                f"a batch of {batch} cannot be shared by {processes} process(es): batch norm needs two "
                "images in each; raise train.batch_size"
            )
        return batch - batch % processes

    @property
    def network(self) -> SelfEnsemble:
        """The network in training, without the wrapper of a distributed run."""
        unwrapped: SelfEnsemble = self.accelerator.unwrap_model(self.model)
        return unwrapped

    @property
    def ensemble(self) -> SelfEnsemble:
        """What is validated and saved: the averaged weights, or those in training."""
        if self._averaged is None:
            return self.network
        return cast(SelfEnsemble, self._averaged.module)

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, save the ensemble; returns what `results.json` holds.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint of the last whole step is written.
            FloatingPointError: the loss is no longer finite.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._train_teacher()
        writer = None
        if self.accelerator.is_main_process:
            writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step)
        try:
            with torch.random.fork_rng(), stop_requests() as stop:
                while self.step < self.steps:
                    self._run_epoch(stop)
                    if writer is not None:
                        for key, value in self.history[-1].items():
                            writer.add_scalar(key, value, self.step)
        finally:
            if writer is not None:
                writer.close()
        return self._finish()

    def _train_teacher(self) -> None:
        """Train, or load, the network that the defense needs before its own."""
        recipe = self.recipe.teacher()
        if recipe is None:
            return
        folder = self.out / TEACHER
        replaces = self._overwrite and self.step == 0
        if replaces or not (folder / RESULTS).exists():
            Trainer(recipe, folder, resume=not replaces, overwrite=replaces, progress=self.progress).run()
        elif other := recipe.differs_from(storage.read_config(folder).recipe or {}):
            raise ValueError(
                f"{folder} holds the teacher of another recipe (different: {', '.join(other)}): start afresh "
                "with --overwrite, or pass another --out"
            )
        self._teacher = storage.load(folder).to(self.accelerator.device)

    def _run_epoch(self, stop: threading.Event) -> None:
        """The rest of the current epoch, its validation and its checkpoint."""
        epoch, done = divmod(self.step, self.epoch_steps)
        generator = torch.Generator().manual_seed(stream_seed(self.recipe.seed, epoch, 1))
        order = self.train_indices[torch.randperm(len(self.train_indices), generator=generator)]
        every = self.recipe.train.checkpoint_steps
        started = time.monotonic()
        loss_sum = torch.tensor(self._epoch_loss, device=self.accelerator.device)
        for number in range(done, self.epoch_steps):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            loss_sum += self._train_step(batch)
            self.step += 1
            self.progress(self.step, self.steps, f"epoch {epoch + 1}/{self.recipe.train.epochs}")
            if number + 1 < self.epoch_steps and (stop.is_set() or (every and self.step % every == 0)):
                self._epoch_loss = self._finite(float(loss_sum))
                self._save_checkpoint(time.monotonic() - started)
                self._stop_if(stop)
        total = self.accelerator.reduce(loss_sum, "mean")
        mean_loss = self._finite(float(total)) / self.epoch_steps
        self._epoch_loss = 0.0
        record: dict[str, float] = {
            "epoch": epoch + 1,
            "train/loss": mean_loss,
            "train/lr": float(self.scheduler.get_last_lr()[0]),
        }
        record |= dict(mean_levels(self.ensemble))
        if len(self.validation_indices):
            correct = self._evaluate(self.train_data, self.validation_indices, draws=1)
            record["validation/accuracy"] = correct / len(self.validation_indices)
        self.seconds += time.monotonic() - started
        self.history.append(record)
        accuracy = record.get("validation/accuracy")
        shown = "" if accuracy is None else f", validation accuracy of one draw {accuracy:.2%}"
        self.progress(self.step, self.steps, f"epoch {epoch + 1} done: loss {mean_loss:.4f}{shown}")
        self._save_checkpoint(0.0)
        self._stop_if(stop)

    def _finite(self, loss: float) -> float:
        """Raise before a checkpoint is written that could not be gone on with."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} at step {self.step}: lower train.lr, or set train.precision=no"
            )
        return loss

    def _stop_if(self, stop: threading.Event) -> None:
        if stop.is_set() and self.step < self.steps:
            raise Interrupted(f"stopped after step {self.step} of {self.steps}")

    def _train_step(self, batch: Tensor) -> Tensor:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = batch[rank::world]
        # Of augmentation and dropout; a master seed of its own keeps it apart from the noise's streams.
        torch.manual_seed(stream_seed(stream_seed(self._seed, 0, 1), self.step, 0))
        self.model.train()
        loss = self._step_gradients(mine.to(self._images.device), self.step)
        self.optimizer.step()
        self.scheduler.step()
        if self._averaged is not None:
            self._averaged.update_parameters(self.network)
        return loss

    def _gradients(self, index: Tensor) -> Tensor:
        """The loss of the images of these numbers with the surroundings' noise; adds to the gradients."""
        inputs = self._augment((self._images[index].float() / 255).to(self.accelerator.device))
        inputs = inputs.contiguous(memory_format=self._format)
        labels = self._labels[index].to(self.accelerator.device)
        with self.accelerator.autocast():
            networks = Networks(self.model, self.network, self._teacher)
            loss = self.recipe.defense.loss(networks, inputs, labels)
            if self.recipe.noise.learn is not None:
                loss = loss + self.recipe.noise.hold * distance_from_start(self.network)
        self.accelerator.backward(loss)
        return loss.detach()

    def _evaluate(self, data: ImageData, indices: Tensor, draws: int | None = None) -> int:
        """Correct answers over all ranks, at a seed of its own."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if world > 1:  # the statistics of batch norm are those of a rank's own images until the next step
            for buffer in self.ensemble.buffers():
                torch.distributed.broadcast(buffer, 0)
        seed = stream_seed(self._seed, self.step, 2)
        with self.accelerator.autocast():
            correct = count_correct(self.ensemble, data, indices[rank::world], draws=draws, seed=seed)
        total = self.accelerator.reduce(torch.tensor(correct, device=self.accelerator.device), "sum")
        return int(total)

    def _finish(self) -> dict[str, Any]:
        """Evaluate all draws, then write the ensemble and its results."""
        self.progress(self.steps, self.steps, "evaluating")
        metrics: dict[str, Any] = {}
        if count := len(self.validation_indices):
            correct = self._evaluate(self.train_data, self.validation_indices)
            metrics["validation"] = accuracy_record(correct, count)
        everything = torch.arange(len(self.test_data))
        metrics["test"] = accuracy_record(self._evaluate(self.test_data, everything), len(everything))
        recipe = self.recipe.model_dump(mode="json")
        results = {
            "recipe": recipe,
            "data": {"source": self.train_data.name, "train": len(self.train_indices)},
            "metrics": metrics,
            "draws": self.recipe.noise.draws,
            "processes": self.accelerator.num_processes,
            "history": self.history,
            "training_seconds": round(self.seconds, 1),
            "provenance": provenance(),
        }
        if self.accelerator.is_main_process:
            storage.save(
                self.ensemble,
                self.out,
                architecture=architecture(self.recipe, self.train_data),
                classes=self.train_data.classes,
                input_shape=tuple(self.train_data.images.shape[1:]),  # type: ignore[arg-type]
                metrics=metrics,
                recipe=recipe,
            )
            write_json(self.out / RESULTS, results)
        self.accelerator.wait_for_everyone()
        return results

    def _save_checkpoint(self, running_seconds: float) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "version": _CHECKPOINT_VERSION,
            "recipe": self.recipe.model_dump(mode="json"),
            "processes": self.accelerator.num_processes,
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds + running_seconds,
            "model": self.network.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch_loss": self._epoch_loss,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        # By way of memory: torch.save into a file on a full disk hides the reason for its failure.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        atomic_write(self.out / CHECKPOINT, buffer.getvalue())
        if self._replaces:  # what the earlier run left does not belong to this checkpoint
            for name in (storage.CONFIG, storage.WEIGHTS, RESULTS):
                (self.out / name).unlink(missing_ok=True)
            self._replaces = False

    def _load_checkpoint(self) -> None:
        path = self.out / CHECKPOINT
        try:
            # weights_only: tensors and plain values, no code.
            state = torch.load(path, map_location="cpu", weights_only=True)
            version, saved_recipe = state["version"], state["recipe"]
        except Exception as error:
            raise ValueError(
                f"{path} is damaged or not a checkpoint ({type(error).__name__}): remove it, or start "
                "afresh with --overwrite"
            ) from error
        if version != _CHECKPOINT_VERSION:
            raise ValueError(f"{path} has version {version}, this release reads {_CHECKPOINT_VERSION}")
        if differing := self.recipe.differs_from(saved_recipe):
            raise ValueError(
                f"{path} belongs to another recipe (different: {', '.join(differing)}): pass the same "
                "recipe and overrides, or another --out"
            )
        if state.get("processes") not in (None, self.accelerator.num_processes):
            raise ValueError(f"{path} was written by {state['processes']} processes: resume with as many")
        try:
            self._restore(state)
        except Exception as error:  # of whatever kind the values are
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}): remove it, or start afresh with --overwrite"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        """Of a checkpoint of this recipe."""
        self.network.load_state_dict(state["model"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self._epoch_loss = state["epoch_loss"]
