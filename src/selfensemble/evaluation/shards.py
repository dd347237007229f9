"""What an evaluation measures, entry by entry, and the files that hold it, one a slice of images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ..attacks.norms import enclosing_radius
from ..data.images import Inputs
from .protocol import MINIMUM_NORM, Run

CLEAN, WORST = "clean", "worst"
PUBLISHED = "published"


@dataclass(frozen=True)
class Plan:
    """An entry of the results before it is measured."""

    key: str
    title: str
    run: Run | None = None
    eps: float | None = None
    norm: str | None = None
    members: tuple[str, ...] = ()  # of a worst case: keys of the entries it chooses from


def plans_of(runs: list[Run], pixels: int) -> Iterator[Plan]:
    """Entries in order: no attack, every attack by radius, the worst case of each threat model.

    A worst case chooses among all attacks whose ball lies within its own, those of other norms among them.

    Args:
        runs: the attacks.
        pixels: numbers of an image.
    """
    yield Plan(CLEAN, "no attack")
    threats: dict[tuple[str, float], list[str]] = {}
    for run in runs:
        if not run.radii or run.attack in MINIMUM_NORM:  # wherever the images are
            yield Plan(run.key, run.title, run, norm=run.norm)
        for index, eps in enumerate(run.radii):
            key = f"{run.key}-{index}"
            yield Plan(key, run.title, run, eps, run.norm)
            if run.norm is not None:
                threats.setdefault((run.norm, eps), []).append(key)
    for number, (norm, eps) in enumerate(threats):
        within = [
            keys for (other, radius), keys in threats.items() if encloses(norm, eps, other, radius, pixels)
        ]
        members = [key for keys in within for key in keys]
        if len(members) > 1:
            yield Plan(f"{WORST}-{number:02d}", "worst case", None, eps, norm, tuple(members))


def encloses(norm: str, eps: float, other: str, radius: float, pixels: int) -> bool:
    """Whether the ball of `norm` and `eps` holds that of `other` and `radius`."""
    return enclosing_radius(radius, other, norm, pixels) <= eps * (1 + 1e-9)


@dataclass(frozen=True, slots=True)
class Judged:
    """One entry's outcome on some images, as it lies in a shard; images are read when asked for."""

    answers: Tensor
    lead: Tensor
    l2: Tensor
    linf: Tensor
    images: Callable[[], Tensor]

    @property
    def adversarial(self) -> Tensor:
        """(B, ...), attacked."""
        return self.images()


def leading(members: Sequence[Judged]) -> Tensor:
    """(B, ...) of each image the version that leads most, read from one member after the other."""
    chosen = torch.stack([member.lead for member in members]).argmax(dim=0)
    best = members[0].adversarial.clone()
    for number, member in enumerate(members[1:], 1):
        rows = chosen == number
        if rows.any():
            best[rows] = member.adversarial[rows]
    return best


@dataclass(frozen=True)
class Shards:
    """The files of one run.

    Attributes:
        folder: where they lie.
        plans: all entries of the results.
        inputs: (N, ...) images without attack, made where they are indexed.
        size: images a file.
    """

    folder: Path
    plans: Sequence[Plan]
    inputs: Inputs
    size: int

    @property
    def starts(self) -> range:
        """The first image of each slice."""
        return range(0, len(self.inputs), self.size)

    def part(self, start: int) -> slice:
        """The images of the slice that begins at `start`."""
        return slice(start, min(start + self.size, len(self.inputs)))

    def path(self, work: Run | Plan, start: int) -> Path:
        """The file of one unit of work: an attack, or an entry that needs none."""
        return self.folder / f"{start:07d}-{work.key}.safetensors"

    def read(self, start: int, key: str) -> Judged:
        """What is known of one slice of images and one entry; a ValueError if the file is damaged."""
        plan = next(plan for plan in self.plans if plan.key == key)
        path = self.path(plan.run or plan, start)
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = ("answers", "lead", "l2", "linf")
                values = {name: file.get_tensor(f"{key}.{name}") for name in names}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run the same again") from error

        def images() -> Tensor:
            if key == CLEAN:
                return self.inputs[self.part(start)]
            with safetensors.safe_open(path, "pt") as file:
                found: Tensor = file.get_tensor(f"{key}.images")
                return found

        return Judged(**values, images=images)

    def budget(self, plan: Plan) -> tuple[int, int]:
        """Gradients and forward passes of all images together."""
        if plan.run is None:
            return 0, 0
        total = torch.zeros(2, dtype=torch.int64, device="cpu")
        for start in self.starts:
            with safetensors.safe_open(self.path(plan.run, start), "pt") as file:
                total += file.get_tensor("budget")
        return int(total[0]), int(total[1])

    def published(self, plan: Plan) -> float | None:
        """Share of the images that the published rule calls robust; None where that was not asked."""
        if plan.run is None:
            return None
        found = 0
        for start in self.starts:
            with safetensors.safe_open(self.path(plan.run, start), "pt") as file:
                if PUBLISHED not in file.keys():  # noqa: SIM118
                    return None
                found += int(file.get_tensor(PUBLISHED).sum())
        return found / len(self.inputs)
