"""Training: SGD on the loss of a defense, by default the cross-entropy of one noisy forward pass.

Everything random in step s of rank r is a function of (seed, s, r): the order of the images, the
augmentation, dropout and the noise. So a checkpoint needs weights, optimiser and step only, and a run
that was killed and resumed ends in the same weights as one that was left alone.

Source: Liu et al. 2018, algorithm 1 and section 4.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..artefacts import storage
from ..data.images import ImageData
from ..ensemble.ensemble import SelfEnsemble
from ..fast.small_maps import as_before_, speed_up_small_maps_
from ..networks.naming import name_of
from ..noise.learned import mean_levels
from ..noise.streams import stream_seed
from ..runtime.files import write_json
from ..runtime.interrupts import Interrupted, stop_requests
from ..runtime.ownership import owned
from ..runtime.provenance import accuracy_record, provenance
from ..runtime.random_state import kept_random_state
from .accelerator import accelerator_of
from .accuracy import count_correct
from .batches import Batch, Batches, given_data
from .building import architecture, fresh_network, is_built_in
from .checkpoints import CHECKPOINT, RESULTS, TEACHER, read_checkpoint, write_checkpoint
from .recipe import Recipe
from .records import Clock, curves, data_record, fingerprint
from .step import TrainingStep

Progress = Callable[[int, int, str], None]
_RUN = "run.json"  # of an evaluation, or of certificates


class Trainer:
    """One training run, from a recipe to a saved ensemble.

    Args:
        recipe: what to train.
        out: folder for checkpoint, TensorBoard log, results and the ensemble.
        data: overrides the source of the recipe's data, e.g. a folder.
        model: a network instead of the recipe's, with as many classes as the data; it stays unchanged.
        train_data, test_data: images instead of the recipe's: `ImageData`, or torch data sets of images and
            labels.
        resume: continue from the checkpoint in `out`; from the start if there is none yet.
        overwrite: start over although `out` holds a run.
        progress: called after every step with (step, steps, text).

    Raises:
        FileExistsError: `out` holds a run, and neither `resume` nor `overwrite` is given.
        FolderInUseError: another process works in `out`.
        ValueError: the checkpoint is damaged or belongs to another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        data: str | None = None,
        model: nn.Module | None = None,
        train_data: ImageData | Dataset[Any] | None = None,
        test_data: ImageData | Dataset[Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        given = given_data(train_data, test_data, data)
        if data is not None:
            # Recorded, so that resuming and evaluating read the same images without being told.
            folder = None if data == "digits" else Path(data).expanduser()
            source = str(folder.resolve()) if folder is not None and folder.exists() else data
            recipe = recipe.replaced("data", source=source)
        elif given is not None:
            recipe = recipe.replaced("data", source=given[0].name)
        if model is not None:
            named = name_of(model) or (f"{type(model).__qualname__} (given in Python)", {})
            recipe = recipe.replaced("model", network=named[0], arguments=named[1])
        self._model, self._given = model, given
        self.recipe, self.out = recipe, Path(out)
        self.progress = progress or (lambda step, steps, text: None)
        self.accelerator = accelerator_of(recipe.train.precision)
        self._resume, self._overwrite = resume, overwrite
        if self.out.is_dir():  # to be told before anything is loaded
            with owned(self.out, self.accelerator.is_main_process):
                pass
        self._replaces = self._check_folder(resume, overwrite)
        self.batches = Batches(recipe, self.accelerator, given)
        self.steps = self.batches.in_epoch * recipe.train.epochs
        self.step, self.history = 0, list[dict[str, float]]()
        self.clock = Clock()
        self._epoch_loss = 0.0
        self._seed = stream_seed(recipe.seed, self.accelerator.process_index, 0)
        self.training_step = TrainingStep(
            recipe, self.batches, self.accelerator, self._seed, self.steps, model
        )
        if resume and (self.out / CHECKPOINT).exists():
            self._load_checkpoint()

    def _check_folder(self, resume: bool, overwrite: bool) -> bool:
        """Whether an earlier run in the folder is to be replaced; an error unless the user said so."""
        existing = {name for name in (CHECKPOINT, storage.CONFIG) if (self.out / name).exists()}
        measured = (self.out / _RUN).exists()
        # Every rank must have looked before one of them writes.
        self.accelerator.wait_for_everyone()
        if measured:
            raise FileExistsError(
                f"{self.out} holds an evaluation or certificates: pass another --out to train into"
            )
        if existing and not (resume or overwrite):
            raise FileExistsError(
                f"{self.out} holds a run already: pass --resume to continue it, --overwrite to start "
                "afresh, or another --out"
            )
        if existing == {storage.CONFIG} and resume:
            raise FileExistsError(
                f"{self.out} holds an ensemble but no checkpoint to continue from: pass --overwrite to start "
                "afresh, or another --out"
            )
        return bool(existing) and not resume

    @property
    def network(self) -> SelfEnsemble:
        """The network in training, without the wrapper of a distributed run."""
        return self.training_step.network

    @property
    def ensemble(self) -> SelfEnsemble:
        """What is validated and saved: the averaged weights, or those in training."""
        return self.training_step.ensemble

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, save the ensemble; returns what `results.json` holds.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint of the last whole step is written.
            FloatingPointError: the loss is no longer finite.
            FolderInUseError, FileExistsError: another process works in `out`, or has meanwhile.
        """
        with owned(self.out, self.accelerator.is_main_process):
            if self.step == 0:  # another may have begun, and ended, since this one looked
                self._replaces = self._check_folder(self._resume, self._overwrite)
            return self._run()

    def _run(self) -> dict[str, Any]:
        self._train_teacher()
        folder = self.out / "tensorboard" if self.accelerator.is_main_process else None
        with curves(folder, self.step) as add, kept_random_state(), stop_requests() as stop:
            speed_up_small_maps_(self.network)
            try:
                while len(self.history) < self.recipe.train.epochs:
                    self._run_epoch(stop)
                    add(self.history[-1], self.step)
            finally:
                as_before_(self.network)
        return self._finish()

    def _train_teacher(self) -> None:
        """Train, or load, the network that the defense needs before its own."""
        recipe = self.recipe.teacher()
        if recipe is None:
            return
        folder = self.out / TEACHER
        replaces = self._overwrite and self.step == 0
        if replaces or not (folder / RESULTS).exists():
            train, test = self._given or (None, None)
            Trainer(
                recipe, folder, model=self._model, train_data=train, test_data=test, resume=not replaces,
                overwrite=replaces, progress=self.progress,
            ).run()  # fmt: skip
        elif other := recipe.differs_from(storage.read_config(folder).recipe or {}):
            raise ValueError(
                f"{folder} holds the teacher of another recipe (different: {', '.join(other)}): start afresh "
                "with --overwrite, or pass another --out"
            )
        own = None
        if not is_built_in(recipe, self._model):
            own = fresh_network(recipe, self.batches.train, self._model)
        self.training_step.teacher = storage.load(folder, own).to(self.accelerator.device)

    def _run_epoch(self, stop: threading.Event) -> None:
        """The rest of the current epoch, its validation and its checkpoint."""
        epoch = len(self.history)  # of which all steps may be done, if its validation failed
        self.clock.start()
        with closing(self.batches.epoch(epoch, self.step - epoch * self.batches.in_epoch)) as batches:
            loss_sum = self._take_steps(batches, epoch, stop)
        total = self.accelerator.reduce(loss_sum, "mean")
        self._epoch_loss = self._finite(float(total))
        try:
            record = self._record(epoch, self._epoch_loss / self.batches.in_epoch)
        except BaseException:
            self._save_checkpoint()  # or the epoch would be lost
            raise
        self._epoch_loss = 0.0
        self.clock.stop()
        self.history.append(record)
        accuracy = record.get("validation/accuracy")
        shown = "" if accuracy is None else f", validation accuracy of one draw {accuracy:.2%}"
        shown += f", waited for data {self.clock.share:.0%} of the time" if self.batches.streams else ""
        self.progress(
            self.step, self.steps, f"epoch {epoch + 1} done: loss {record['train/loss']:.4f}{shown}"
        )
        self._save_checkpoint()
        self._stop_if(stop)

    def _take_steps(self, batches: Iterator[Batch], epoch: int, stop: threading.Event) -> Tensor:
        """A step with each batch that is left of an epoch; the sum of the losses of all of them."""
        every = self.recipe.train.checkpoint_steps
        loss_sum = torch.tensor(self._epoch_loss, dtype=torch.float32, device=self.accelerator.device)
        ends = (epoch + 1) * self.batches.in_epoch
        while self.step < ends:
            with self.clock.waiting():
                batch = next(batches)
            loss_sum += self.training_step(batch, self.step)
            self.step += 1
            self.progress(self.step, self.steps, f"epoch {epoch + 1}/{self.recipe.train.epochs}")
            if self.step < ends and (stop.is_set() or (every and self.step % every == 0)):
                self._epoch_loss = self._finite(float(loss_sum))
                self._save_checkpoint()
                self._stop_if(stop)
        return loss_sum

    def _record(self, epoch: int, loss: float) -> dict[str, float]:
        """What the history says of an epoch."""
        record: dict[str, float] = {
            "epoch": epoch + 1,
            "train/loss": loss,
            "train/lr": self.training_step.lr,
        }
        record |= dict(mean_levels(self.ensemble))
        if count := len(self.batches.validation_indices):
            correct = self._evaluate(self.batches.train, self.batches.validation_indices, draws=1)
            record["validation/accuracy"] = correct / count
        return record

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
        """Write the ensemble, evaluate all draws, then write it again with its results."""
        if self.accelerator.is_main_process and not (self.out / RESULTS).exists():
            self._save({})
        self.progress(self.steps, self.steps, "evaluating")
        metrics: dict[str, Any] = {}
        train, test = self.batches.train, self.batches.test
        if count := len(self.batches.validation_indices):
            correct = self._evaluate(train, self.batches.validation_indices)
            metrics["validation"] = accuracy_record(correct, count)
        everything = torch.arange(len(test), device="cpu")
        metrics["test"] = accuracy_record(self._evaluate(test, everything), len(everything))
        results = {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": data_record(self.batches),
            "metrics": metrics,
            "draws": self.recipe.noise.draws,
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "history": self.history,
            "training_seconds": round(self.clock.seconds, 1),
            "waiting_for_data": round(self.clock.share, 3),
            "provenance": provenance(self.accelerator.device),
        }
        if self.accelerator.is_main_process:
            self._save(metrics)
            write_json(self.out / RESULTS, results)
        self.accelerator.wait_for_everyone()
        return results

    def _save(self, metrics: dict[str, Any]) -> None:
        train = self.batches.train
        storage.save(
            self.ensemble,
            self.out,
            architecture=architecture(self.recipe, train) if is_built_in(self.recipe, self._model) else None,
            classes=train.classes,
            input_shape=train.shape if 1 <= len(train.shape) <= 4 else None,
            metrics=metrics,
            recipe=self.recipe.model_dump(mode="json"),
        )

    def _save_checkpoint(self) -> None:
        if not self.accelerator.is_main_process:
            return
        progress = {
            "step": self.step,
            "history": self.history,
            "seconds": self.clock.seconds,
            "waited": self.clock.waited,
            "epoch_loss": self._epoch_loss,
            "data": fingerprint(self.batches),
        }
        state = progress | self.training_step.state()
        write_checkpoint(self.out / CHECKPOINT, self.recipe, self.accelerator.num_processes, state)
        if self._replaces:  # what the earlier run left does not belong to this checkpoint
            for name in (storage.CONFIG, storage.WEIGHTS, RESULTS):
                (self.out / name).unlink(missing_ok=True)
            self._replaces = False

    def _load_checkpoint(self) -> None:
        path = self.out / CHECKPOINT
        state = read_checkpoint(path, self.recipe, self.accelerator.num_processes)
        if state.get("data") not in (None, fingerprint(self.batches)):
            raise ValueError(
                f"{path} belongs to other images (their number or labels differ): restore them, or start "
                "afresh with --overwrite"
            )
        try:
            self.training_step.restore(state)
            self.step, self.history = state["step"], state["history"]
            self.clock = Clock(float(state["seconds"]), float(state.get("waited", 0.0)))
            self._epoch_loss = state["epoch_loss"]
        except Exception as error:  # of whatever kind the values are
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}): remove it, or start afresh with --overwrite"
            ) from error
