"""Random numbers of layers other than `GaussianNoise`: an entry a draw where it is shared, or an image.

Seeded, the entry of an image depends on its place in the batch, and on no other image: neither on what they
are nor on how many come after it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .graphs import is_recording
from .layer import RandomLayer
from .streams import Source, random_source


def source_of(layer: RandomLayer, inputs: Tensor, shared: bool) -> Source:
    """Where the numbers for a batch come from.

    Args:
        layer: that wants them.
        inputs: (B, ...).
        shared: the choice of the layer, which that of `noise_draw` overrides.

    Raises:
        RuntimeError: a graph is being recorded, of which the numbers of one draw would become constants.
        ValueError: the batch cannot hold the draws of the surrounding `noise_draw`.
    """
    if is_recording():
        raise RuntimeError(
            f"{type(layer).__name__} draws random numbers that no recorded graph can hold: run the network "
            "as it is, without torch.compile, torch.export, torch.jit.trace or ONNX"
        )
    source = random_source(layer.layer, shared, inputs.device)
    if source.shared:
        source.check_batch(len(inputs))
    return source


def entries(source: Source, images: int) -> int:
    """G: draws of the batch, or images of it."""
    return source.count if source.shared else images


def gaussian(source: Source, shape: Sequence[int], images: int) -> Tensor:
    """(G, *shape) float32, independent standard normal."""
    numbers = torch.empty((entries(source, images), *shape), device=source.device)
    if source.shared:
        source.fill_shared_(numbers, 1.0)
    else:
        source.fill_images_(numbers)
    return numbers


def uniform(source: Source, shape: Sequence[int], images: int) -> Tensor:
    """(G, *shape) float32, independent and uniform in [0, 1)."""
    numbers = torch.empty((entries(source, images), *shape), device=source.device)
    if source.shared:
        for one, generator in source.split(numbers):
            one.uniform_(generator=generator)
    elif source.draw.seed is None:
        numbers.uniform_(generator=source.generator())
    else:
        generator = source.generator()
        for one in numbers:
            one.uniform_(generator=generator)
    return numbers


def per_image(numbers: Tensor, inputs: Tensor) -> Tensor:
    """(B, ...) or (1, ...): entries repeated for the images that share them."""
    if len(numbers) in (1, len(inputs)):
        return numbers
    return numbers.repeat_interleave(len(inputs) // len(numbers), dim=0)
