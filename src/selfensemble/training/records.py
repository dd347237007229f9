"""What is recorded of a training run: its time, its figures step by step, and the images it had."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.files import named_in_text
from ..runtime.packages import needs
from .batches import Batches


class Clock:
    """Seconds of training, and those of them in which it waited for images.

    Args:
        seconds, waited: of earlier parts of the run.
    """

    def __init__(self, seconds: float = 0.0, waited: float = 0.0) -> None:
        self._before, self.waited = seconds, waited
        self._started: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._started = time.monotonic()

    def stop(self) -> None:
        """Count no longer."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    @property
    def share(self) -> float:
        """Of waiting."""
        return self.waited / max(self.seconds, 1e-9)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within this context images are waited for."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began


@contextmanager
def curves(folder: Path | None, step: int) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """What writes figures of a step to the folder, for TensorBoard; nothing where there is no folder."""
    with needs("selfensemble[train]"):
        from torch.utils.tensorboard import SummaryWriter

    if folder is None:
        yield lambda figures, step: None
        return
    with named_in_text(folder) as place:
        writer = SummaryWriter(str(place), purge_step=step)

        def add(figures: Mapping[str, float], step: int) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)

        try:
            yield add
        finally:
            writer.close()


def data_record(batches: Batches) -> dict[str, Any]:
    """The images of a run, for `results.json`."""
    train, test = batches.train, batches.test
    record: dict[str, Any] = {"source": train.name, "train": len(batches.train_indices)}
    if train.revision is not None:
        record["revision"] = train.revision
    if train.cut is not None:
        record["cut"] = {"test_share": train.cut[0], "seed": train.cut[1], "test": len(test)}
    of_test = [] if train.cut is not None else [f"{each} (test split)" for each in test.skipped]
    if skipped := [*train.skipped, *of_test]:  # names are those within a split, and may be in both
        record["skipped"] = skipped
    return record


def fingerprint(batches: Batches) -> str:
    """By which a checkpoint knows its images again: number and labels of those to learn from."""
    labels = batches.train.labels.cpu().numpy()
    return f"{len(labels)} {hashlib.sha256(labels.tobytes()).hexdigest()[:16]}"
