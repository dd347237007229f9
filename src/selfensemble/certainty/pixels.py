"""What the first noise is worth in pixels, or why no radius can be certified."""

import math
import pickle
import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..ensemble.draws import check_finite
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.randomness import PASSES
from ..noise.calls import OwnHooks
from ..noise.injection import eval_mode, random_layers
from ..noise.layer import GaussianNoise, RandomLayer
from ..noise.own_numbers import OwnNumbers
from ..noise.streams import noise_draw
from .arrival import keeps_images, pixel_levels, pixel_map

_PASSES = 32  # that show randomness before the first noise, of generators that cannot be watched
_CURE = "put one GaussianNoise(init_std) before the whole network"


def pixel_std(ensemble: SelfEnsemble, example_inputs: Tensor) -> float:
    """Standard deviation of the first noise in units of the image: the smallest, where pixels differ in it.

    The noise may stand behind an affine map of each pixel, such as a normalisation, whose scale is then
    taken into account: noise of std s behind `a x + b` is noise of std `s / |a|` on the image. Views and
    constant padding change nothing; k copies of a pixel with noise of their own are worth `s / sqrt(k)`.
    Pixels that do not arrive (a crop) have no say in the answer, which is checked.

    Args:
        ensemble: what is to be certified, in the form that predicts.
        example_inputs: (B, ...) images of the kind to be certified; at most two are used.

    Raises:
        ValueError: there is no such noise, what comes before it is not an affine map of each pixel or draws
            random numbers, the image has a way around it, the network draws numbers that no seed holds,
            or the answer to an image depends on what else is in the batch.
    """
    if not example_inputs.is_floating_point():
        raise ValueError(f"radii are about floating-point images, got {example_inputs.dtype}")
    device = next((parameter.device for parameter in ensemble.parameters()), example_inputs.device)
    images = example_inputs[:2].to(device, ensemble.input_dtype or example_inputs.dtype)
    # Nor compiled graphs, which would not see the hooks below, or keep them.
    with torch.no_grad(), eval_mode(ensemble), OwnNumbers():
        first = first_noise(ensemble, images)
        _check_fixed(ensemble, first, images)
        std = _in_pixels(ensemble, first, images)
        _check_no_way_around(ensemble, first, images)
        _check_alone(ensemble, images)
    return std


def first_noise(network: SelfEnsemble, images: Tensor) -> GaussianNoise:
    """The noise that acts first in a pass, and only once."""
    order: list[RandomLayer] = []
    layers = random_layers(network.model)
    with OwnHooks() as hooks:
        for layer in layers:
            hooks.add(layer.register_forward_pre_hook, lambda module, args: order.append(module))
        network.draw_logits(images)
    active = [layer for layer in order if layer.is_active]
    if not active or not order[0].is_active:
        raise ValueError(
            "there is no noise on the image (init_std is 0, or noise was removed): radii come from it alone"
        )
    first = active[0]
    if not isinstance(first, GaussianNoise):
        raise ValueError(
            f"{type(first).__name__} changes the image at random before the first noise, which is then not "
            "noise on its pixels: " + _CURE
        )
    if active.count(first) > 1:
        raise ValueError(
            "the first noise acts several times in a pass, so that the image has a way around each of them: "
            + _CURE
        )
    return first


def arrives_at(network: SelfEnsemble, first: GaussianNoise, images: Tensor) -> Tensor:
    """What arrives at the first noise."""
    seen: list[Tensor] = []
    with OwnHooks() as hooks:
        hooks.add(first.register_forward_pre_hook, lambda module, args: seen.append(args[0].clone()))
        network.draw_logits(images)
    return seen[0]


def _check_fixed(network: SelfEnsemble, first: GaussianNoise, images: Tensor) -> None:
    """What arrives at the first noise depends on the image alone."""
    arrivals = [_arrival(network, first, images) for _ in range(_PASSES)]
    differ = not all(torch.equal(arrivals[0].images, each.images) for each in arrivals)
    # Other threads may use the numbers of numpy and Python as well, but hardly in every pass.
    if differ or any(each.of_torch for each in arrivals) or all(each.of_others for each in arrivals):
        raise ValueError(
            "random numbers are drawn before the first noise, which is then not the only noise on the image: "
            + _CURE
        )


class _Arrival(NamedTuple):
    """What arrives at the first noise, and whose random numbers were drawn on the way to it."""

    images: Tensor
    of_torch: bool
    of_others: bool


def _arrival(network: SelfEnsemble, first: GaussianNoise, images: Tensor) -> _Arrival:
    seen: list[_Arrival] = []
    before = _states_of_others()

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(_Arrival(args[0].clone(), numbers.drew, _states_of_others() != before))

    with OwnNumbers() as numbers, OwnHooks() as hooks:
        hooks.add(first.register_forward_pre_hook, note)
        network.draw_logits(images)
    return seen[0]


def _states_of_others() -> tuple[object, ...]:
    """Where the generators of Python and of numpy stand, to be compared."""
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002


def _in_pixels(network: SelfEnsemble, first: GaussianNoise, images: Tensor) -> float:
    low, high = network.bounds or (0.0, 1.0)
    arrived = arrives_at(network, first, images)
    if arrived.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the first noise acts on {arrived.dtype}, whose rounding moves the image: certify a float32 "
            "network (an optimised copy keeps its first layer in float32)"
        )
    found = pixel_map(lambda each: arrives_at(network, first, each), images, low, high)
    if found is None or not bool((found.slope != 0).any()):
        raise ValueError(
            "what comes before the first noise is not an affine map of each pixel (resizing, a "
            f"nonlinearity): {_CURE}"
        )
    if first.sampling == "shared" and not keeps_images(found, images):
        raise ValueError(
            "parts of one image (frames, windows) are in the batch where the first noise acts, and shared "
            'noise is the same on each of them: use SelfEnsemble(..., sampling="per_image")'
        )
    std = float(pixel_levels(found, first.std, images).min())
    if std > 0 and math.isfinite(std):
        return std
    raise ValueError("some channels of the image have no noise on them: no radius can be certified")


def _probes(images: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    chance = torch.rand(images.shape, generator=generator, dtype=torch.float32, device="cpu").to(images)
    return torch.full_like(images, low), torch.full_like(images, high), low + (high - low) * chance


def _check_no_way_around(network: SelfEnsemble, first: GaussianNoise, images: Tensor) -> None:
    """With what leaves the first noise held fixed, other images must give the same answer."""
    probes = (images, *_probes(images, *(network.bounds or (0.0, 1.0))))
    for fixed in [arrives_at(network, first, probe) for probe in probes]:
        with OwnHooks() as hooks:
            hooks.add(first.register_forward_hook, lambda module, args, output, fixed=fixed: fixed)
            answers = [_seeded(network, each) for each in probes]
            again = [_seeded(network, probes[0]) for _ in range(PASSES)]
        if not all(torch.equal(answers[0], other) for other in again):
            raise ValueError(
                "the network draws random numbers that no seed holds (numpy's, Python's or of a generator of "
                "its own): whether the image has a way around the first noise cannot be told: draw by torch"
            )
        if not all(torch.equal(answers[0], other) for other in answers[1:]):
            raise ValueError(
                "the image has a way around the first noise (a second branch that reads it, such as a "
                "shortcut): " + _CURE
            )


def _check_alone(network: SelfEnsemble, images: Tensor) -> None:
    """The answer to an image must not depend on the others of its batch.

    Passes of the same size: those of different sizes differ by the rounding of their kernels.
    """
    image, (black, white, mixed) = images[:1], _probes(images[:1], *(network.bounds or (0.0, 1.0)))
    alone, *among = (
        _seeded(network, torch.cat([image, *others])).softmax(dim=1)[0].float()
        for others in ([image, image], [black, white], [mixed, mixed])
    )
    if not all(torch.allclose(alone, each, rtol=0, atol=1e-3) for each in among):
        raise ValueError(
            "the answer to an image depends on the other images of its batch (batch norm without running "
            "statistics does so): nothing can be certified for an image"
        )


def _seeded(network: SelfEnsemble, images: Tensor) -> Tensor:
    """Logits of the same draw, whatever the images."""
    with noise_draw(0, 0, "shared"), OwnNumbers(0):
        return check_finite(network.draw_logits(images))
