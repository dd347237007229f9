"""The `config.json` of a saved ensemble: what the network is, its noise, and what is known of it."""

import json
import sys
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.sets import SetRule
from ..ensemble.stopping import Calibrated
from ..networks.flipping import FlipAveraged
from ..networks.models import CREATED_AS, create_model
from ..networks.normalized import Normalized
from ..noise.graphs import plain_name, unwrapped
from ..noise.injection import noise_layers
from ..noise.layer import RandomLayer
from ..noise.randomness import AnyRandomness, randomise_, randomness_of
from ..noise.resize_pad import ResizePadConfig
from ..runtime.packages import needs
from .foreign import trusted
from .named import NamedNetwork
from .outline import ArchitectureRecord, NormalizationRecord, Outline, TransformersRecord


def _layers(model: nn.Module) -> list[tuple[object, ...]]:
    """What a network consists of, but for random layers: names, kinds, settings, shapes of weights."""
    return [
        (plain_name(name), type(module), module.extra_repr(), [
            (own, tensor.shape) for own, tensor in module.named_parameters(recurse=False)
        ])
        for name, module in model.named_modules()
        if not isinstance(module, RandomLayer) and unwrapped(module) is module
    ]  # fmt: skip


class Normalization(NormalizationRecord):
    """Mean and standard deviation of the channels of the images, see `Normalized`."""

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Of a network that is a `Normalized`, or of flips of one."""
        model = without_flips(model)
        if type(model) is not Normalized:
            return None
        return cls(mean=tuple(model.mean.tolist()), std=tuple(model.std.tolist()))

    def around(self, network: nn.Module) -> Normalized:
        """A `Normalized` of a network."""
        return Normalized(network, self.mean, self.std)


def without_flips(model: nn.Module) -> nn.Module:
    """What a `FlipAveraged` averages; any other network itself."""
    return unwrapped(model.model) if type(model) is FlipAveraged else model


def inner_network(model: nn.Module) -> nn.Module:
    """What a `FlipAveraged` averages and a `Normalized` normalises for; any other network itself."""
    model = without_flips(model)
    return unwrapped(model.model) if type(model) is Normalized else model


class Architecture(ArchitectureRecord):
    """Arguments of `create_model`."""

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Of a network that `create_model` made, if nothing but noise and random layers were put into it."""
        arguments = getattr(inner_network(model), CREATED_AS, None)
        if not isinstance(arguments, dict):
            return None
        normalisation = Normalization.of(model)
        with torch.device("meta"):
            fresh = create_model(**arguments)
        if normalisation is not None:
            fresh = normalisation.around(fresh)
        with torch.device("meta"):
            if (randomness := randomness_of(without_flips(model))) is not None:
                randomise_(fresh, randomness)
        return cls.model_validate(arguments) if _layers(fresh) == _layers(without_flips(model)) else None


class TransformersNetwork(TransformersRecord):
    """A network of the package transformers: the name of its class there, and its configuration."""

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Of a network, if it is one of theirs."""
        model = inner_network(model)
        theirs = sys.modules.get("transformers")  # imported, if it made the network
        name = type(model).__name__
        if theirs is None or not isinstance(model, theirs.PreTrainedModel) or not hasattr(theirs, name):
            return None
        return cls(name=name, config=json.loads(model.config.to_json_string(use_diff=False)))

    def build(self) -> nn.Module:
        """The network with fresh weights; nothing is fetched, and only code of the installed package runs."""
        with needs("transformers"):
            import transformers
        kind = getattr(transformers, self.name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ValueError(f"the installed transformers has no network {self.name}: upgrade it")
        configuration: Any = getattr(kind, "config_class", None)
        try:
            network: nn.Module = kind(configuration.from_dict(trusted(configuration, self.config)))
        except Exception as error:  # of a configuration that may be a stranger's
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.name} cannot be built from the configuration saved: {reason}") from error
        return network.eval()


class ArtefactConfig(Outline):
    """What stands in `config.json`.

    The format has been version 1 from the start: what was added since is optional, and means nothing where it
    is missing, so that every folder ever written loads.

    Attributes:
        weights: "sha256:..." of the `model.safetensors` that it was written with; None in folders of versions
            that did not write it, which cannot be told from those in which one file was exchanged.
        architecture: how to build the network; None for one of transformers, or of the user's own.
        transformers: how to build a network of transformers.
        network: what another network was made by. Code of the user's own is imported when the caller says so.
        normalize: mean and standard deviation before it, if any.
        flip_average: whether it answers by the mean of an image and its mirror image, see `FlipAveraged`.
        noise: standard deviation by fully qualified module name, in the order of the layers; a list
            holds one for each channel.
        resize_pad: random resize-and-pad before the network, if any.
        randomness: its random layers of other kinds and their places, if any.
        classes: names of the classes, where known.
        input_shape: of one input, where known: (C, H, W) of images, (C, T) or (T,) of waveforms, ...
        metrics: figures measured when it was saved, with what they were measured on.
        recipe: the recipe it was trained by, if any.
        stopping: margins at which images stop drawing, if it was calibrated.
        sets: which labels belong to the conformal set of an image, if that was calibrated.
    """

    architecture: Architecture | None = None
    transformers: TransformersNetwork | None = None
    network: NamedNetwork | None = None
    normalize: Normalization | None = None
    resize_pad: ResizePadConfig | None = None
    randomness: AnyRandomness | None = None
    stopping: Calibrated | None = None
    sets: SetRule | None = None

    @property
    def is_random(self) -> bool:
        """Whether two answers of the network can differ."""
        levels = [np.max(level) for level in self.noise.values()]
        others = self.randomness is not None and not self.randomness.fixed
        return others or self.resize_pad is not None or any(level > 0 for level in levels)


def config_of(
    ensemble: SelfEnsemble,
    model: nn.Module,
    resize_pad: ResizePadConfig | None = None,
    *,
    architecture: Architecture | None = None,
    **about: Any,
) -> ArtefactConfig:
    """What there is to say of an ensemble.

    Args:
        ensemble: what is described.
        model: its network without what is described by `resize_pad`.
        resize_pad: before it.
        architecture: by default what `create_model` was asked for.
        about: what else is known, see `ArtefactConfig`.
    """
    if type(inner_network(model)) is FlipAveraged:
        raise ValueError("FlipAveraged goes around Normalized, and around no other FlipAveraged")
    architecture = Architecture.of(model) if architecture is None else architecture
    transformers = TransformersNetwork.of(model) if architecture is None else None
    other = architecture is None and transformers is None
    return ArtefactConfig(
        architecture=architecture,
        transformers=transformers,
        network=NamedNetwork.of(inner_network(model)) if other else None,
        normalize=Normalization.of(model),
        flip_average=type(model) is FlipAveraged,
        noise={plain_name(fqn): layer.std for fqn, layer in noise_layers(model).items()},
        resize_pad=resize_pad,
        randomness=randomness_of(without_flips(model)),
        draws=ensemble.draws,
        sampling=ensemble.sampling,
        bounds=ensemble.bounds,
        stopping=ensemble.stopping,
        sets=ensemble.sets,
        **about,
    )
