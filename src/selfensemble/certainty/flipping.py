"""A self-ensemble that answers by the mean of an image and its mirror image."""

import copy
import math

from torch import Tensor

from ..ensemble.ensemble import SelfEnsemble
from ..networks.flipping import FlipAveraged
from ..noise.copies import OptimizedCopy
from ..noise.injection import attach_noise_, noise_layers, remove_noise_
from ..noise.layer import NoiseConfig
from ..noise.resize_pad import ResizePadNetwork
from .pixels import pixel_std


def flip_averaged(ensemble: SelfEnsemble, example_inputs: Tensor) -> SelfEnsemble:
    """A copy of `ensemble` whose network is a `FlipAveraged`; the original stays unchanged.

    The noise on the image is drawn once and flipped with it. A draw costs two passes, and more are right,
    which makes certified radii larger (Horvath et al., ICLR 2022, of several networks instead of two flips).

    Args:
        ensemble: its first noise is on the image, or there is no noise.
        example_inputs: (B, C, H, W) images of the kind that it answers; at most two are used.

    Returns:
        An ensemble of the same noise, draws and bounds, without calibrated rules, which other answers had.

    Raises:
        ValueError: the first noise is not on the image itself (see `pixel_std`), noise layers are switched
            off, the inputs are no images, or the ensemble is an optimised copy, resizes its images at random
            or averages over flips already.
    """
    _check_kind(ensemble)
    layers = noise_layers(ensemble.model)
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError(
            "noise layers are switched off (enabled is False): switch them on, or set their std to 0"
        )
    noisy = any(layer.varies for layer in layers.values())
    std = pixel_std(ensemble, example_inputs) if noisy else 0.0
    levels = {fqn: layer.std for fqn, layer in layers.items()}
    names = {fqn: f"model.{fqn}".rstrip(".") for fqn in levels}
    if noisy:
        names[next(iter(levels))] = ""
    network = FlipAveraged(remove_noise_(copy.deepcopy(ensemble.model)))
    attach_noise_(network, {names[fqn]: level for fqn, level in levels.items()})
    changed = SelfEnsemble(
        network, None if levels else NoiseConfig(0, 0), draws=ensemble.draws, sampling=ensemble.sampling,
        bounds=ensemble.bounds,
    )  # fmt: skip
    changed.training = ensemble.training
    if example_inputs.dim() != 4:
        raise ValueError(f"only images (B, C, H, W) have flips, got the shape {tuple(example_inputs.shape)}")
    # With that noise on the image itself; moved from behind mean and std it would be of another size.
    if noisy and not math.isclose(pixel_std(changed, example_inputs), std, rel_tol=1e-6):
        raise ValueError(
            "the first noise is behind what scales the image (mean and std): put noise on the image itself, "
            "before Normalized"
        )
    return changed


def _check_kind(ensemble: SelfEnsemble) -> None:
    modules = list(ensemble.modules())
    if any(isinstance(module, OptimizedCopy) for module in modules):
        raise ValueError("an optimised copy stays as it is: pass its original, and optimize what comes back")
    if any(isinstance(module, FlipAveraged) for module in modules):
        raise ValueError("the ensemble averages over flips already")
    if any(isinstance(module, ResizePadNetwork) for module in modules):
        raise ValueError("the network resizes its images at random, which flips do not go with")
