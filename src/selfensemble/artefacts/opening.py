"""From a named network to its ensemble: mean and std before it, noise where it is wanted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_call, explain_shape, logits_of
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.observation import failed
from ..networks.expected import expected_images
from ..networks.flipping import FlipAveraged
from ..networks.naming import network_from
from ..networks.normalized import Normalized
from ..noise.calls import to_eval_mode_
from ..noise.filters import filter_named, matching
from ..noise.injection import FilterFn, eval_mode, execution_order, random_layers
from ..noise.layer import NoiseConfig
from ..noise.own_numbers import OwnNumbers
from ..noise.streams import Sampling
from ..runtime.random_state import kept_random_state

Channels = float | Sequence[float]
IN_FRONT = (Normalized, FlipAveraged)  # networks around a network, before which noise is noise on the image


def seeded_network(
    name: str, arguments: Mapping[str, Any] | None = None, weights: str | Path | None = None
) -> nn.Module:
    """`network_from`, whose weights are those of seed 0 where its factory draws them."""
    with kept_random_state():
        torch.manual_seed(0)
        return network_from(name, arguments, weights)


def ensemble_of(
    network: nn.Module,
    name: str,
    *,
    noise: NoiseConfig | None = None,
    draws: int | None = None,
    filter_name: str = "conv",
    mean: Channels | None = None,
    std: Channels | None = None,
    example_inputs: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    sampling: Sampling | None = None,
) -> SelfEnsemble:
    """The ensemble of a named network, in eval mode.

    Args:
        network: gets its noise in place; an ensemble stays as it is.
        name: that it was asked for by, for messages.
        noise: levels; None keeps the randomness that the network has, or takes the published levels.
        draws: noise draws a prediction; 10, or those of an ensemble that the name stands for.
        filter_name: before what noise goes, see `filter_named`.
        mean, std: of the pixels' channels, see `Normalized`. The first noise then goes before them and
            is in units of pixels, and none goes before the layer that sees the image behind them. By
            default those of a network that has the weights of its library; 0 and 1 for none.
        example_inputs: (B, ...) images; by them the first layer is the first that runs.
        bounds: the range of inputs; [0, 1] by default, or that of an ensemble that the name stands for.
        sampling: how draws are sampled; "shared" by default, or as an ensemble that the name stands for does.

    Raises:
        ValueError, TypeError: what is wrong with the network or the options.
    """
    if isinstance(network, SelfEnsemble):
        network.sampling = sampling or network.sampling
        return _as_it_is(network, name, draws, not (noise or bounds) and mean is std is None)
    chosen = filter_named(filter_name)
    is_wanted = noise is None or noise.init_std > 0 or noise.inner_std > 0
    if is_wanted and not any(chosen(module, fqn) for fqn, module in network.named_modules()):
        _refuse_nothing(network, name, filter_name)
    network = with_mean_and_std(network, name, mean, std, bounds)
    if example_inputs is not None:
        check_runs(network, example_inputs)
    if isinstance(network, IN_FRONT):
        chosen = in_pixels(network, chosen, example_inputs)
    ensemble = SelfEnsemble(
        network, noise, draws=draws or 10, filter_fn=chosen, example_inputs=example_inputs,
        bounds=bounds or (0.0, 1.0), sampling=sampling or "shared",
    )  # fmt: skip
    to_eval_mode_(ensemble)
    return ensemble


def with_mean_and_std(
    network: nn.Module,
    name: str,
    mean: Channels | None,
    std: Channels | None,
    bounds: tuple[float, float] | None = None,
) -> nn.Module:
    """A `Normalized` of it where both are given, or it is known to want them.

    Both are of pixels in [0, 1], and become those of inputs in the bounds.
    """
    if mean is None and std is None:
        mean, std = expected_images(network, name).mean_and_std or (None, None)
    if (mean is None) != (std is None):
        raise ValueError(f"{'std' if std is None else 'mean'} is missing: mean and std go together")
    if mean is None or std is None:
        return network
    found = Normalized(network, mean, std)
    if bounds is not None:
        low, high = bounds
        found.mean.mul_(high - low).add_(low)
        found.std.mul_(high - low)
    return found


def _as_it_is(ensemble: SelfEnsemble, name: str, draws: int | None, is_asked_nothing: bool) -> SelfEnsemble:
    if not is_asked_nothing:
        raise ValueError(
            f"{name} is a SelfEnsemble, which has its noise: leave --noise, --mean, --std and --bounds out"
        )
    ensemble.draws = draws or ensemble.draws
    to_eval_mode_(ensemble)
    return ensemble


def _refuse_nothing(network: nn.Module, name: str, filter_name: str) -> None:
    """Say what to do about a network without any layer that the filter takes."""
    if random_layers(network):
        return
    others = [each for each in ("conv", "linear") if each != filter_name]
    other = next(
        (each for each in others if any(filter_named(each)(module, "") for module in network.modules())), None
    )
    cure = (
        f"pass --filter {other} (filter_name= in Python)"
        if other
        else "it calls its layers as functions; make them modules of torch.nn"
    )
    raise ValueError(f"{name} has no layer that --filter {filter_name} puts noise before: {cure}")


def check_runs(network: nn.Module, example_inputs: Tensor) -> None:
    """Raise a ValueError unless a pass over the example gives logits."""
    check_call(network)
    try:
        with torch.no_grad(), OwnNumbers(), eval_mode(network), explain_shape(network, example_inputs):
            logits_of(network(example_inputs), len(example_inputs))
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever kind: the code is a user's own
        raise ValueError("{}. {}".format(*failed(network, example_inputs, error))) from error


def in_pixels(network: nn.Module, chosen: FilterFn, example_inputs: Tensor | None) -> FilterFn:
    """The same with the network, one of those `IN_FRONT`, instead of the first layer in it."""
    names = matching(network, chosen)
    called = names if example_inputs is None else execution_order(network, names, example_inputs)
    first = called[0] if called else None
    return lambda module, fqn: module is network or (chosen(module, fqn) and fqn != first)
