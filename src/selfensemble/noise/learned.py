"""Noise levels that are learned with the weights, one a layer or one a channel.

The method says nothing of levels that fit a network: 0.1 is much for one channel and little for another.
Here each is the softplus of a parameter, so that it is positive. The parameters of C channels count sqrt(C)
times: the loss depends on the level of a channel C times less than on that of a layer, and at one learning
rate it would stand still. In saved ensembles the levels are constants again.

What keeps them up. The cross-entropy would learn noise away: less noise, less loss. He et al., Parametric
Noise Injection, CVPR 2019, rely on adversarial training, under which noise pays, and leave the levels out of
weight decay. The second is done here too; the first is not enough: on digits, adversarial training (L2,
eps 0.5, 20 epochs) took the level on the image from 0.4 to 0.025, about as far as plain training did. So the
loss gains `hold * log(level / start)^2`, averaged over the channels of a layer and summed over layers, a
log-normal prior around the level at the start. It has no bound as a level goes to 0, so that no level gets
there, whatever the defense; with `hold = 0.1` the same run ended at 0.14. Jeddi et al., Learn2Perturb, CVPR
2020, reward large levels instead. A network with batch norm makes large levels harmless by larger
activations, so that they grow and defend nothing (seen on digits); the prior bounds them from above as well.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .graphs import forget_graphs
from .injection import CHILD, device_of_parameters, noise_layers, random_layers
from .layer import GaussianNoise
from .levels import Std, check_stds
from .streams import Sampling

Granularity = Literal["layer", "channel"]


class LearnedNoise(GaussianNoise):
    """`GaussianNoise` whose levels are parameters; gradients flow to them through the noise.

    Args:
        std: level at the start, > 0; one for each channel learns one for each.
        layer, sampling: see `RandomLayer`.
    """

    raw: nn.Parameter

    def __init__(self, std: Std, *, layer: int = 0, sampling: Sampling = "per_image") -> None:
        super().__init__(std, layer=layer, sampling=sampling)

    @property
    def std(self) -> Std:
        """The levels as they are now, as the shortest decimals that are them in float32."""
        levels = self.levels().detach().float().cpu().numpy()
        if levels.ndim == 0:
            return float(str(levels[()]))
        return tuple(float(str(level)) for level in levels)

    @std.setter
    def std(self, std: Std) -> None:
        device = self.raw.device if hasattr(self, "raw") else torch.device("cpu")
        levels = torch.tensor(check_stds("std", std), dtype=torch.float32, device=device)
        if not bool((levels > 0).all()):
            raise ValueError(f"a level that is to be learned must start above 0, got {std}")
        self._number, self._varies = None, True
        self._scale = levels.numel() ** 0.5
        self.raw = nn.Parameter(levels.expm1().log() / self._scale)  # the inverse of softplus
        self.register_buffer("_start", levels, persistent=False)

    def fix_(self) -> None:
        raise ValueError("levels are still being learned: save the ensemble, and load it")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Past GaussianNoise's: a constant level is none that has been learned.
        nn.Module._load_from_state_dict(self, *args, **kwargs)

    def levels_learned(self) -> list[nn.Parameter]:
        return [self.raw]

    def levels(self) -> Tensor:
        return functional.softplus(self._scale * self.raw.float())

    def distance_from_start(self) -> Tensor:
        """Mean squared logarithm of how far the levels are from those at the start, a scalar."""
        start: Tensor = self.get_buffer("_start")
        return (self.levels().log() - start.float().log()).square().mean()


def learn_noise_(model: nn.Module, granularity: Granularity) -> nn.Module:
    """Make the levels of the injected noise learnable, in place; they start where they are.

    Levels of 0 stay constants. The parameters are named `....gaussian_noise.raw`; `save` leaves them out
    and writes the levels.

    Args:
        model: after `inject_noise_`.
        granularity: "layer" for one level a layer, "channel" for one for each channel of its input.

    Raises:
        ValueError: there is no noise to learn, or a layer does not say its number of channels.
    """
    noisy = {fqn: noise for fqn, noise in noise_layers(model).items() if noise.varies}
    if not noisy:
        raise ValueError("there is no noise to learn: inject some, with levels above 0")
    for fqn, noise in noisy.items():
        module, std = model.get_submodule(fqn), noise.std
        if granularity == "channel" and isinstance(std, float):
            channels = getattr(module, "in_channels", getattr(module, "in_features", None))
            if not isinstance(channels, int):
                raise ValueError(f"{fqn} does not say how many channels it takes: learn levels by layer")
            std = (std,) * channels
        learned = LearnedNoise(std, layer=noise.layer, sampling=noise.sampling)
        learned.by_registration = noise.by_registration
        if noise.features_last:
            learned.features_last = True
        setattr(module, CHILD, learned.to(device_of_parameters(module, model)).train(noise.training))
        if noise.record is not None:
            learned.record = noise.record
            learned.record["std"] = None  # not before it has been learned
    forget_graphs()
    return model


def learned_layers(model: nn.Module) -> list[LearnedNoise]:
    """The noise layers whose levels are learned."""
    return [module for module in model.modules() if isinstance(module, LearnedNoise)]


def distance_from_start(model: nn.Module) -> Tensor:
    """Mean `log(level / start)^2` of each layer, summed over layers: a scalar, 0 without any."""
    each = [layer.distance_from_start() for layer in learned_layers(model)]
    return torch.stack(each).sum() if each else torch.zeros((), dtype=torch.float32, device="cpu")


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Parameters for an optimiser: levels, if any are learned, in a group without weight decay."""
    levels = [level for layer in random_layers(model) for level in layer.levels_learned()]
    known = {id(level) for level in levels}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups: list[dict[str, object]] = [{"params": others}]
    return [*groups, {"params": levels, "weight_decay": 0.0}] if levels else groups


def mean_levels(model: nn.Module) -> Iterator[tuple[str, float]]:
    """("noise/NUMBER", mean level) of every layer that learns, in the order of the layers; for logs."""
    for layer in sorted(learned_layers(model), key=lambda layer: layer.layer):
        yield f"noise/{layer.layer}", float(layer.levels().detach().mean())
