"""What an experiment is: networks to measure one by one, and a page made from what is stored of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..data.images import ImageData
from ..ensemble.ensemble import SelfEnsemble
from ..fast.optimize import for_attacks
from ..report.page import Page
from .networks import Family, Network, Trained, family, network
from .records import Record
from .scales import Scale
from .units import Units

Report = Callable[[str, float], None]
# Stored records of other experiments, by name.
Beside = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class Setting:
    """What a measurement of one network needs.

    Attributes:
        scale: how much work.
        network: which network.
        trained: the network itself, on `device`.
        test: the test set.
        folder: for units of work, of this network alone.
        model, data: digests of the network with its noise, and of the images.
        seed: of attacks and judge.
        progress: called with what is being done and the share done.
    """

    scale: Scale
    network: Network
    trained: Trained
    test: ImageData
    folder: Path
    model: str
    data: str
    all_data: str
    device: torch.device
    seed: int
    progress: Report

    @property
    def max_batch(self) -> int:
        """Images a pass of attacks and judge, several draws of one image counted as separate images."""
        return 200 if self.device.type == "cpu" else 1600

    @cached_property
    def attacked(self) -> SelfEnsemble:
        """The network as attacks follow its gradients."""
        example = self.test.inputs(slice(2)).to(self.device)
        return for_attacks(self.trained.ensemble, example, self.scale.precision)

    def units(self, settings: dict[str, Any]) -> Units:
        """Units of work of a measurement with these settings."""
        identity = {"model": self.model, "data": self.data, "seed": self.seed, "shard": self.scale.shard}
        identity |= {"draws": self.trained.ensemble.draws, "settings": settings}
        identity |= {"precision": self.scale.precision, "test": self.all_data}
        # Streams of noise follow the batches, and differ between kinds of devices.
        identity |= {"device": self.device.type, "max_batch": self.max_batch}
        return Units(self.folder, identity)


@dataclass(frozen=True)
class Measured:
    """What is stored of a network beside its name, its training and where it was measured."""

    settings: dict[str, Any]
    entries: dict[str, dict[str, Any]]
    columns: dict[str, list[str]]


class Experiment:
    """Subclasses say which networks, how one is measured, and what is shown.

    `beside` names experiments whose stored records the page shows as well; `held_out` ones measure the second
    half of the test set, to choose on images that no other attacks.
    """

    name: str
    names: tuple[str, ...]
    kin: str = "vgg16"
    beside: tuple[str, ...] = ()
    held_out: bool = False

    @property
    def family(self) -> Family:
        """Architecture and data of its networks."""
        return family(self.kin)

    def networks(self, scale: Scale) -> list[Network]:  # noqa: ARG002
        """In the order of the tables; by default those of `names` in `networks.yaml`."""
        return [network(name) for name in self.names]

    def edition(self, scale: Scale) -> int:  # noqa: ARG002
        """Edition of the protocol that it measures by; figures of two of them are not comparable."""
        return 1

    def known_settings(self, scale: Scale) -> dict[str, Any]:  # noqa: ARG002
        """Those of `Measured.settings` that are known before anything is measured."""
        return {}

    def measure(self, setting: Setting) -> Measured:
        """Measure one network; units of work that are done are not repeated."""
        raise NotImplementedError

    def page(self, records: Sequence[Record]) -> Page:
        """Tables and plots of the networks measured so far, at least one."""
        raise NotImplementedError

    def page_beside(self, records: Sequence[Record], others: Beside) -> Page:  # noqa: ARG002
        """The same with what is stored of the experiments `beside`."""
        return self.page(records)


def inputs_of(setting: Setting, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first test images and their labels."""
    part = slice(min(images, len(setting.test)))
    return setting.test.inputs(part), setting.test.labels[part]
