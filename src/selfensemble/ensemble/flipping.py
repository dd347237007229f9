"""A self-ensemble that answers by the mean of an image and its mirror image."""

import copy

import torch
from torch import Tensor

from ..networks.flipping import FlipAveraged
from ..noise.calls import OwnHooks
from ..noise.copies import OptimizedCopy
from ..noise.injection import attach_noise_, eval_mode, noise_layers, remove_noise_
from ..noise.layer import GaussianNoise, NoiseConfig
from ..noise.own_numbers import OwnNumbers
from .ensemble import SelfEnsemble


def flip_averaged(ensemble: SelfEnsemble, example_inputs: Tensor) -> SelfEnsemble:
    """A copy of `ensemble` whose network is a `FlipAveraged`; the original stays unchanged.

    The noise on the image is drawn once and flipped with it. A draw costs two passes, and more are right,
    which makes certified radii larger (Horvath et al., ICLR 2022, of several networks instead of two flips).

    Args:
        ensemble: its noise is on the image, or there is none there.
        example_inputs: (B, C, H, W) images of the kind that it answers; at most two are used.

    Returns:
        An ensemble of the same noise, draws and bounds, without calibrated rules, which other answers had.

    Raises:
        ValueError: the first noise does not act on the image itself, the inputs are no images, the ensemble
            is an optimised copy, or averages over flips already.
    """
    if any(isinstance(module, OptimizedCopy) for module in ensemble.modules()):
        raise ValueError(
            "an optimised copy cannot be changed: pass its original, and optimize what comes back"
        )
    if any(isinstance(module, FlipAveraged) for module in ensemble.modules()):
        raise ValueError("the ensemble averages over flips already")
    network = copy.deepcopy(ensemble.model)
    levels = {fqn: layer.std for fqn, layer in noise_layers(network).items()}
    names = {fqn: f"model.{fqn}".rstrip(".") for fqn in levels}
    if levels:
        first = next(iter(levels))
        if _is_on_images(ensemble, noise_layers(ensemble.model)[first], example_inputs[:2]):
            names[first] = ""
    flipping = attach_noise_(
        FlipAveraged(remove_noise_(network)), {names[fqn]: levels[fqn] for fqn in levels}
    )
    changed = SelfEnsemble(
        flipping, None if levels else NoiseConfig(0, 0), draws=ensemble.draws, sampling=ensemble.sampling,
        bounds=ensemble.bounds,
    )  # fmt: skip
    changed.train(ensemble.training)
    with torch.no_grad(), OwnNumbers(), eval_mode(changed):
        changed.draw_logits(example_inputs[:2])  # inputs that it cannot flip are told now
    return changed


def _is_on_images(ensemble: SelfEnsemble, first: GaussianNoise, images: Tensor) -> bool:
    """Whether the first noise acts on images as they are; False where it is 0.

    Raises:
        ValueError: it acts on something else.
    """
    if not first.is_active:
        return False
    seen: list[Tensor] = []
    with OwnHooks() as hooks, torch.no_grad(), OwnNumbers(), eval_mode(ensemble):
        hooks.add(first.register_forward_pre_hook, lambda module, args: seen.append(args[0].clone()))
        ensemble.draw_logits(images)
    if len(seen) == 1 and seen[0].shape == images.shape and torch.equal(seen[0].to(images), images):
        return True
    raise ValueError(
        "the first noise acts on something else than the image itself (features, or pixels behind mean and "
        "std), and two flips would get noise of their own: put noise on the image, before Normalized say"
    )
