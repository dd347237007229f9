"""Random resize-and-pad: a randomised layer before a network, in training and at test time.

Source: Xie et al., Mitigating Adversarial Effects Through Randomization, ICLR 2018. They resize by the
nearest neighbour; here it is bilinear, which gives attacks a better gradient. Athalye et al. (ICML 2018,
section 5.3) broke it by expectation over transformation.
"""

from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from .graphs import is_recording
from .layer import RandomLayer
from .operators import call_number, called_off
from .streams import LAYERS, Sampling, random_source

# Away from the numbers of noise layers and of `fresh_seed`.
_LAYER = LAYERS - 2


class ResizePadConfig(BaseModel):
    """Sides of the squares that images are resized to, in pixels.

    Attributes:
        smallest, largest: both inclusive; the network gets images of the largest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    smallest: Annotated[int, Field(ge=1)]
    largest: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.smallest >= self.largest:
            raise ValueError("smallest must be below largest: otherwise nothing is random")
        return self


class ResizePad(RandomLayer):
    """Resizes each image to a random side and pads it with zeros to the largest, at a random place.

    Sides are uniform from `smallest` to `largest`, places uniform among those that there are for a side.
    Each image has its own; where sampling is shared, the batch has one a forward pass. Switched off, it
    does not resize and puts the image in the middle: the network gets the size that it was trained on.

    Args:
        config: the sides.
        layer, sampling: see `RandomLayer`.

    Shape: (B, C, S, S) with S at most `largest`, to (B, C, largest, largest).
    """

    is_continuous = False

    def __init__(
        self, config: ResizePadConfig, *, layer: int = _LAYER, sampling: Sampling = "per_image"
    ) -> None:
        super().__init__(layer, sampling)
        self.config = config
        self._varies = True

    @property
    def varies(self) -> bool:
        return self._varies

    def fix_(self) -> None:
        self._varies = False

    def forward(self, inputs: Tensor) -> Tensor:
        largest = self.config.largest
        side = inputs.shape[-1]
        if inputs.dim() != 4 or inputs.shape[-2] != side or side > largest:
            raise ValueError(
                f"resize-and-pad takes square images of at most {largest} pixels a side, (B, C, S, S), got "
                f"{tuple(inputs.shape)}: raise resize_pad.largest, or crop the images"
            )
        if not self.is_active:
            return pad_to(inputs, largest)
        shared = self.sampling == "shared" and not self.training
        draw, call = (_placement, call_number(self.identity)) if is_recording() else (_draw_placement, -1)
        placement: Tensor = draw(inputs.detach(), self.config.smallest, largest, self.layer, shared, call)
        return resize_and_place(inputs, placement, largest)

    def extra_repr(self) -> str:
        state = ("" if self.enabled else ", off") + ("" if self.varies else ", fixed")
        return f"{self.config.smallest} to {self.config.largest}, sampling={self.sampling}{state}"


def pad_to(inputs: Tensor, largest: int) -> Tensor:
    """(B, C, largest, largest), the images in the middle of zeros."""
    side = inputs.shape[-1]
    before = (largest - side) // 2
    after = largest - side - before
    return functional.pad(inputs, (before, after, before, after))


def resize_and_place(inputs: Tensor, placement: Tensor, largest: int) -> Tensor:
    """Images resized bilinearly and padded with zeros, each in its own way.

    Args:
        inputs: (B, C, H, W).
        placement: (B, 3) float: side, rows above, columns to the left; all whole pixels.
        largest: side of the output.

    Returns:
        (B, C, largest, largest). Differentiable in `inputs`.
    """
    side, top, left = placement[:, :, None].unbind(dim=1)
    position = torch.arange(largest, device=inputs.device, dtype=torch.float32) + 0.5
    # Of the centre of each output pixel within the resized image, from -1 to 1: (B, largest).
    down, across = 2 * (position - top) / side - 1, 2 * (position - left) / side - 1
    shape = (-1, largest, largest)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], dim=3)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    resized = functional.grid_sample(
        inputs.to(dtype), grid.to(dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
    inside = (down.abs() < 1)[:, None, :, None] & (across.abs() < 1)[:, None, None, :]
    return (resized * inside).to(inputs.dtype)


def _draw_placement(
    inputs: Tensor, smallest: int, largest: int, layer: int, shared: bool, call: int
) -> Tensor:
    """(B, 3) float32, see `resize_and_place`."""
    if inputs.device.type == "meta":
        return inputs.new_empty((len(inputs), 3), dtype=torch.float32)
    if called_off(call):
        own = inputs.shape[-1]
        middle = [float(own), float((largest - own) // 2), float((largest - own) // 2)]
        return torch.tensor(middle, dtype=torch.float32, device=inputs.device).repeat(len(inputs), 1)
    source = random_source(layer, shared, inputs.device)
    if source.shared:
        source.check_batch(len(inputs))
        each = torch.empty(source.count, 3, dtype=torch.float32, device=inputs.device)
        for one, generator in source.split(each):
            one.uniform_(generator=generator)
        chance = each.repeat_interleave(len(inputs) // source.count, dim=0)
    else:
        chance = torch.rand(
            len(inputs), 3, generator=source.generator(), dtype=torch.float32, device=inputs.device
        )
    side = smallest + (chance[:, :1] * (largest - smallest + 1)).floor()
    offsets = (chance[:, 1:] * (largest - side + 1)).floor()
    return torch.cat([side, offsets], dim=1)


# One opaque operator in a compiled graph, as noise is.
_placement = torch.library.custom_op(
    "selfensemble::placement", _draw_placement, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)


@_placement.register_fake
def _(inputs: Tensor, smallest: int, largest: int, layer: int, shared: bool, call: int) -> Tensor:
    return inputs.new_empty((inputs.shape[0], 3), dtype=torch.float32)


class ResizePadNetwork(nn.Module):
    """`network` with `ResizePad` before it.

    Args:
        network: takes images of `config.largest` a side.
        config: the sides.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, config: ResizePadConfig) -> None:
        super().__init__()
        self.config = config
        self.resize_pad = ResizePad(config)
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.network(self.resize_pad(inputs))
        return output
