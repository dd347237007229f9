"""Learn2Perturb: Gaussian noise with a learned level for every neuron, before every activation function.

Source: Jeddi et al., Learn2Perturb: an End-to-end Feature Perturbation Learning to Improve Adversarial
Robustness, CVPR 2020: a module after each block adds `theta * N(0, 1)` to its features before the
activation, theta of the shape of the features, above 0, from 0.25 at the start and never below 0.01 (their
code). Its training, with the harmonic regulariser, is `PerturbationTraining`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .calls import OwnHooks
from .injection import call, device_of_parameters, eval_mode, noise_disabled
from .numbers import gaussian, per_image, source_of
from .placing import FIRST_NUMBER, PlacedLayer, Randomness, attach_, is_activation
from .streams import Sampling


class LearnedPerturbation(PlacedLayer):
    """Adds `theta * N(0, 1)`, theta learned, one a neuron.

    In train mode each image has its own noise (the authors' code has one draw a batch, which batch norm would
    partly cancel); elsewhere where sampling is per image. Shared, all images of a batch have the same.

    Args:
        shape: of the features of one image.
        start: theta before training.
        least: theta is never below.
        layer, sampling: see `RandomLayer`.

    Attributes:
        theta: learned, of that shape.
        passes: training steps so far, as `PerturbationTraining` counts them.

    Shape: (B, *shape), to the same.
    """

    theta: nn.Parameter

    def __init__(
        self,
        shape: tuple[int, ...],
        start: float = 0.25,
        least: float = 0.01,
        *,
        layer: int = 0,
        sampling: Sampling = "per_image",
        device: torch.device | None = None,
    ) -> None:
        super().__init__(layer, sampling)
        self.least = least
        place = device or torch.device("cpu")
        self.theta = nn.Parameter(torch.full(shape, start, device=place))
        self.register_buffer("passes", torch.zeros((), device=place))

    def levels_learned(self) -> list[nn.Parameter]:
        return [self.theta]

    def levels(self) -> Tensor:
        """Theta, at least `least`."""
        return self.theta.clamp(min=self.least)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.is_active or inputs.is_meta:
            return inputs
        source = source_of(self, inputs, self.sampling == "shared" and not self.training)
        if inputs.shape[1:] != self.theta.shape:
            raise ValueError(
                f"the noise was made for features of shape {tuple(self.theta.shape)} an image, and meets "
                f"{tuple(inputs.shape[1:])}: Learn2Perturb takes images of the size that it was made with"
            )
        noise = per_image(gaussian(source, inputs.shape[1:], len(inputs)), inputs)
        return inputs + (self.levels() * noise).to(inputs.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.theta.shape)}, least={self.least:g}, {self.state()}"


class PerturbationConfig(Randomness):
    """Learned noise before every activation function.

    Attributes:
        start: theta before training.
        least: theta is never below.
        shapes: of the features of one image, in the order of `modules`; filled in from example inputs.
    """

    places: ClassVar[str] = "activation modules (nn.ReLU and the like)"
    name: Literal["learned-perturbation"] = "learned-perturbation"
    start: float = Field(default=0.25, gt=0, allow_inf_nan=False)
    least: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    shapes: tuple[tuple[int, ...], ...] | None = None

    def fits(self, module: nn.Module) -> bool:
        return is_activation(module)

    def can_take(self, module: nn.Module) -> bool:  # noqa: ARG002
        return True

    def measured(self, model: nn.Module, example_inputs: Any) -> "PerturbationConfig":
        modules = self.modules or ()
        if self.shapes is not None:
            if len(self.shapes) != len(modules):
                raise ValueError(f"there are {len(self.shapes)} shapes for {len(modules)} modules")
            return self
        if example_inputs is None:
            raise ValueError("learned-perturbation needs example_inputs: a level for every neuron of them")
        shapes = _shapes(model, modules, example_inputs)
        if missing := [fqn for fqn in modules if fqn not in shapes]:
            raise ValueError(f"a pass over the example inputs does not call {missing[0]}: leave it out")
        return self.model_copy(update={"shapes": tuple(shapes[fqn] for fqn in modules)})

    def put_(self, module: nn.Module, index: int, model: nn.Module) -> None:
        assert self.shapes is not None
        device = device_of_parameters(module, model)
        layer = LearnedPerturbation(
            self.shapes[index], self.start, self.least, layer=FIRST_NUMBER + index, device=device
        )
        attach_(module, layer, "before")


def _shapes(model: nn.Module, modules: tuple[str, ...], example_inputs: Any) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what goes into the modules, of one image."""
    found: dict[str, tuple[int, ...]] = {}

    def note(fqn: str, shape: tuple[int, ...]) -> None:
        if found.setdefault(fqn, shape) != shape:
            raise ValueError(
                f"{fqn} is called with features of shapes {found[fqn]} and {shape}: give each place a "
                "separate activation module, or leave it out of `modules`"
            )

    with OwnHooks() as hooks:
        for fqn in modules:
            hook = lambda module, args, fqn=fqn: note(fqn, tuple(args[0].shape[1:]))  # noqa: E731
            hooks.add(model.get_submodule(fqn).register_forward_pre_hook, hook)
        with torch.no_grad(), eval_mode(model), noise_disabled(model):
            call(model, example_inputs)
    return found


def perturbations(model: nn.Module) -> list[LearnedPerturbation]:
    """The layers of `model` that Learn2Perturb learns."""
    return [module for module in model.modules() if isinstance(module, LearnedPerturbation)]
