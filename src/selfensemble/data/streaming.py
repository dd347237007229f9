"""Images that are decoded when they are asked for, by workers of their own where there are many.

What a worker makes of an image depends on the image and on what it is asked for alone, never on which worker
it is or how many there are.
"""

import multiprocessing
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..runtime.packages import needs
from .decoding import open_image, prepare_image
from .rows import Cell

_FEW = 64  # images that are decoded sooner than workers start
_LOOKS = 1.0  # seconds between two looks of a worker at whether its parent is there


class Reader(Protocol):
    """Images by their place in a source."""

    def prepared(self, place: int) -> Tensor:
        """(C, H, W), in the shape and type that all of them have."""
        ...

    def photo(self, place: int) -> Any:
        """The whole PIL image, before it is cut to a size.

        Raises:
            ValueError: there is none.
        """
        ...


# Of data sets whose items are random: what those of the moment are drawn by.
ITEM_SEED: ContextVar[int] = ContextVar("selfensemble_item_seed", default=0)
# Makes of the image at a place, which is number N of those that are asked for, what is wanted of it.
Look = Callable[[Reader, int, int], Tensor]


def prepared(reader: Reader, place: int, number: int) -> Tensor:
    """The image as it is, without changes."""
    return reader.prepared(place)


@dataclass(frozen=True, slots=True)
class CellReader:
    """Images in cells: files, or bytes in a table.

    Attributes:
        source: for errors.
        cells: undecoded images.
        channels, size, centre: what they are brought to, see `prepare_image`.
    """

    source: str
    cells: Sequence[Cell]
    channels: int
    size: tuple[int, int]
    centre: float = 1.0

    def prepared(self, place: int) -> Tensor:
        return prepare_image(self.photo(place), self.channels, self.size, self.centre)

    def photo(self, place: int) -> Any:
        cell = self.cells[place]
        name = (cell or {}).get("path") or f"number {place}"
        return open_image(cell, self.source, name)


@dataclass(frozen=True, slots=True)
class StoredReader:
    """Images that are decoded already, (N, C, H, W), in memory or mapped into it."""

    images: Tensor

    def prepared(self, place: int) -> Tensor:
        return self.images[place]

    def photo(self, place: int) -> Any:
        with needs("selfensemble[data]"):
            from PIL import Image

        image = self.images[place]
        if image.dtype != torch.uint8 or len(image) not in (1, 3):
            raise ValueError(
                f"photos are uint8 of 1 or 3 channels, these are {image.dtype} {tuple(image.shape)}: leave "
                "data.photos out"
            )
        pixels = image.permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if len(image) == 1 else np.ascontiguousarray(pixels))


@dataclass(frozen=True, slots=True)
class Streamed:
    """Some images of a reader, like a tensor (N, C, H, W) that is decoded where it is indexed.

    Attributes:
        reader: where they are.
        places: (N,) int64, which of them.
        one: shape of an image.
        dtype: uint8, or floating point.
        workers: processes that decode where many are asked for; None for as many as there are cores, 8 at
        most.
    """

    reader: Reader
    places: Tensor
    one: tuple[int, ...]
    dtype: torch.dtype = torch.uint8
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.one))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, index: Tensor | slice | int | tuple[Any, ...]) -> Tensor:
        if isinstance(index, tuple):
            rest = index[1:] if isinstance(index[0], int) else (slice(None), *index[1:])
            return self[index[0]][rest]
        if isinstance(self.reader, StoredReader):
            return self.reader.images[self.places[index]]
        if isinstance(index, int):
            return self.reader.prepared(int(self.places[index]))
        chosen = self.places[index]
        out = torch.empty((len(chosen), *self.one), dtype=self.dtype, device="cpu")
        for row, place in enumerate(chosen.tolist()):
            out[row] = self.reader.prepared(place)
        return out

    def subset(self, index: Tensor) -> "Streamed":
        """Some of them."""
        return replace(self, places=self.places[index.cpu()])

    def groups(self, groups: Sequence[Tensor], look: Look = prepared, seed: int = 0) -> Iterator[Tensor]:
        """The images of each group of numbers, (B, C, H, W), decoded ahead by workers.

        Args:
            groups: numbers of images.
            look: what is made of each.
            seed: of data sets whose items are random.
        """
        quick = isinstance(self.reader, StoredReader) and look is prepared
        many = sum(map(len, groups)) >= _FEW and not quick
        group = _Group(self, groups, look, seed)
        return map(torch.from_numpy, ahead(group, len(groups), self.workers if many else 0))


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of images by its number."""

    images: Streamed
    groups: Sequence[Tensor]
    look: Look
    seed: int

    def __call__(self, number: int) -> "np.ndarray[Any, Any]":
        ITEM_SEED.set(self.seed)
        images, asked = self.images, self.groups[number].tolist()
        out = torch.empty((len(asked), *images.one), dtype=images.dtype, device="cpu")
        for row, index in enumerate(asked):
            out[row] = self.look(images.reader, int(images.places[index]), index)
        # By way of numpy: tensors would travel in shared memory, of which containers have little.
        return out.numpy()


def each_of(make: Callable[[int], Any], count: int, workers: int | None = None) -> list[Any]:
    """What `make` makes of every number up to `count`, by workers where there are many."""

    def group(number: int) -> list[Any]:
        return [make(place) for place in range(number * _FEW, min((number + 1) * _FEW, count))]

    groups = -(-count // _FEW)
    return [each for found in ahead(group, groups, workers if groups > 1 else 0) for each in found]


def ahead(make: Callable[[int], Any], count: int, workers: int | None) -> Iterator[Any]:
    """What `make` makes of every number up to `count`, in order, two for each of the workers in advance."""
    workers = min(_cores(), 8) if workers is None else workers
    forks = sys.platform == "linux"  # whatever Python's default is: forked workers need no copies of anything
    if not forks and not _can_travel(make):
        workers = 0
    if workers == 0 or count == 0:
        context = copy_context()
        yield from (context.run(make, number) for number in range(count))
        return
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")  # of forks and of cores: no affair of who asks for images
        loader = DataLoader(
            _Work(make, count), batch_size=None, num_workers=min(workers, count), collate_fn=_as_it_is,
            worker_init_fn=_undisturbed, generator=torch.Generator("cpu"), prefetch_factor=2,
            multiprocessing_context="fork" if forks else None,
        )  # fmt: skip
        running = iter(loader)
    try:
        for found in running:
            if isinstance(found, _Failed):
                raise ValueError(found.message)
            yield found
    except RuntimeError as error:  # of the loader
        raise OSError(
            "a process that decodes images ended before its work (memory may be short): set data.workers "
            "lower, 0 for none"
        ) from error


@dataclass(frozen=True, slots=True)
class _Failed:
    """What went wrong in a worker; errors that are raised there lose their form on the way."""

    message: str


class _Work(Dataset[Any]):
    """What workers make, number by number."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        try:
            return self._make(number)
        except Exception as error:  # of Pillow, or of someone's data set
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return _Failed(text)


def _can_travel(make: Callable[[int], Any]) -> bool:
    """Whether a process that is not forked can be given it."""
    try:
        pickle.dumps(make)
    except Exception:  # of whatever it holds
        return False
    return True


def _as_it_is(found: Any) -> Any:
    return found


def _undisturbed(worker: int) -> None:
    """Ctrl-C is for the main process, which ends its workers; they end with it, however it ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Do not outlive a main process that was killed.

    Images on their way then fill a pipe that nobody reads, and a worker of torch waits for it forever.
    """
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(_LOOKS)
    os._exit(1)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # on other systems than Linux
        return os.cpu_count() or 1
