"""Certificates that hold in floating-point arithmetic: noise on the grid of 8-bit images."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..ensemble.ensemble import SelfEnsemble
from ..noise.calls import OwnHooks
from ..noise.grid import LEVELS, GridNoise, distance_from_normal
from ..noise.injection import eval_mode
from ..noise.layer import GaussianNoise
from ..noise.learned import LearnedNoise
from .pixels import arrives_at, first_noise

_OFF = 1e-3  # of the distance between two values of a pixel


@contextmanager
def grid_noise(ensemble: SelfEnsemble, inputs: Tensor) -> Iterator[float]:
    """Within this context the noise on the image lies on a grid that holds 8-bit images, see `GridNoise`.

    Args:
        ensemble: its first noise acts on the image itself.
        inputs: (B, ...) images of the kind that are to come, of 8 bits, in [0, 1].

    Yields:
        A bound of the total variation between this noise and exact normal noise that is rounded to the grid.

    Raises:
        ValueError: images of more than 8 bits or of other bounds, a network that does something to them
            before the first noise, or a compiled one.
    """
    first = _on_pixels(ensemble, inputs)
    grid = GridNoise(first.std, layer=first.layer, sampling=first.sampling).train(first.training)
    grid.to(next((parameter.device for parameter in ensemble.parameters()), inputs.device))
    with OwnHooks() as hooks:  # passes of other threads keep the noise that they have
        hooks.add(first.register_forward_hook, lambda layer, args, output: grid(args[0]))
        yield distance_from_normal(inputs[0].numel(), float(np.max(first.std)))


def _on_pixels(ensemble: SelfEnsemble, inputs: Tensor) -> GaussianNoise:
    """The first noise, if it is added to 8-bit images themselves."""
    if ensemble.bounds != (0.0, 1.0):
        raise ValueError(f"the grid is that of images in [0, 1], this ensemble's are in {ensemble.bounds}")
    pixels = inputs.double() * LEVELS
    if len(inputs) == 0 or float((pixels - pixels.round()).abs().max()) > _OFF:
        raise ValueError(
            "the grid is that of 8-bit images, and these have other values: certify images that were read "
            "from files (x.float() / 255), or leave grid out"
        )
    if any(_is_compiled(module) for module in ensemble.modules()):
        raise ValueError("the network is compiled, noise on the grid is not: certify what you compiled")
    device = next((parameter.device for parameter in ensemble.parameters()), inputs.device)
    images = inputs[:2].to(device, ensemble.input_dtype or inputs.dtype)
    with torch.no_grad(), eval_mode(ensemble):
        first = first_noise(ensemble, images)
        arrived = arrives_at(ensemble, first, images)
    if not (arrived.shape == images.shape and torch.equal(arrived, images)):
        raise ValueError(
            "the network does something to its images before the first noise (a normalisation, say): put "
            "GaussianNoise(init_std) before it, or leave grid out"
        )
    if type(first) not in (GaussianNoise, LearnedNoise, GridNoise):
        raise ValueError(
            f"the first noise is {type(first).__name__}, which may be other than normal on pixels"
        )
    return first


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
