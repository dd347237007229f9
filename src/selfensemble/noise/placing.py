"""Where random layers go in a network that exists: settings that know their places, and how they are called.

Layers with random weights take the place of a convolution or a linear layer, which becomes one of them.
Others are children of the module that they act on, called by a hook before it or behind it. Nothing is
renamed or replaced, as with `inject_noise_`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from .injection import execution_order
from .layer import RandomLayer
from .streams import LAYERS, Sampling

CHILD = "random_layer"
# Away from the numbers of injected noise, which begin at 0.
FIRST_NUMBER = LAYERS // 2
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardtanh, nn.Tanh)
Side = Literal["before", "behind"]


class PlacedLayer(RandomLayer):
    """A random layer that a `Randomness` puts into a network.

    Attributes:
        is_fixed: whether its randomness was taken out for good.
    """

    is_fixed: bool

    def begin_(self, layer: int, sampling: Sampling) -> None:
        super().begin_(layer, sampling)
        self.is_fixed = False

    @property
    def varies(self) -> bool:
        return not self.is_fixed

    def fix_(self) -> None:
        self.is_fixed = True

    def state(self) -> str:
        """For `extra_repr`."""
        off = "" if self.enabled else ", off"
        return f"layer={self.layer}, sampling={self.sampling}{off}{', fixed' if self.is_fixed else ''}"


class Randomness(BaseModel):
    """Settings of random layers, and where they go. Subclasses set `name`, their settings and `put_`.

    Attributes:
        modules: fully qualified names of the modules that become random, or get a random layer, in the order
            of the layers; None for those that the kind is made for, which is then filled in.
        fixed: whether the randomness was taken out again, see `make_static_`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modules: tuple[str, ...] | None = None
    fixed: bool = False
    # What its places are, for people.
    places: ClassVar[str] = "modules"

    def fits(self, module: nn.Module) -> bool:
        """Whether the kind is made for such modules."""
        raise NotImplementedError

    def can_take(self, module: nn.Module) -> bool:
        """Whether it can go there all the same, where `modules` says so."""
        return self.fits(module)

    def chosen(self, called: Sequence[str]) -> list[str]:
        """Those of them that are taken, of all that a pass calls, in its order; by default all."""
        return list(called)

    def put_(self, module: nn.Module, index: int, model: nn.Module) -> None:
        """Make `module` random, in place.

        Args:
            module: of `modules`.
            index: its place among them, from 0; the number of its layer is `FIRST_NUMBER + index`.
            model: that it is a part of.
        """
        raise NotImplementedError

    def measured(self, model: nn.Module, example_inputs: Any) -> "Randomness":  # noqa: ARG002
        """The same with what has to be known of the network's activations."""
        return self

    def in_place(self, model: nn.Module, example_inputs: Any) -> "Randomness":
        """The same with `modules` and whatever else depends on the network filled in.

        Raises:
            ValueError: there is no place for it.
        """
        if self.modules is not None:
            self._check(model)
            return self.measured(model, example_inputs)
        found = [fqn for fqn, module in model.named_modules() if self.fits(module)]
        if example_inputs is not None and found:
            found = execution_order(model, found, example_inputs)
        chosen = self.chosen(found)
        if not chosen:
            raise ValueError(
                f"the network has no {self.places} that a pass calls, and {self.kind} goes there: name "
                "other modules in `modules`, where it can"
            )
        filled = self.model_copy(update={"modules": tuple(chosen)})
        filled._check(model)
        return filled.measured(model, example_inputs)

    @property
    def kind(self) -> str:
        """`name`, for people."""
        return str(getattr(self, "name", type(self).__name__))

    def _check(self, model: nn.Module) -> None:
        modules = self.modules or ()
        if not modules or len(set(modules)) < len(modules):
            raise ValueError(f"{self.kind}: `modules` must name some modules, each once")
        for fqn in modules:
            try:
                module = model.get_submodule(fqn)
            except AttributeError as error:
                raise ValueError(f"{self.kind}: the network has no module {fqn!r}") from error
            if isinstance(module, torch.jit.ScriptModule) or not self.can_take(module):
                raise ValueError(
                    f"{self.kind} goes to {self.places}, and {fqn or 'the model'} is a "
                    f"{type(module).__name__}"
                )
            if hasattr(module, CHILD):
                raise ValueError(f"{fqn or 'the model'} has a random layer, or an attribute {CHILD!r}")


def is_activation(module: nn.Module) -> bool:
    """Whether it is an activation function."""
    return isinstance(module, ACTIVATIONS)


def is_plain_layer(module: nn.Module) -> bool:
    """Whether it is a convolution or linear layer of torch, no subclass: what that computes is not known."""
    return type(module) in (nn.Conv2d, nn.Linear)


def attach_(module: nn.Module, layer: RandomLayer, side: Side) -> None:
    """Have `layer` act on what goes into `module`, or on what comes out of it."""
    module.add_module(CHILD, layer.train(module.training))
    if side == "before":
        module.register_forward_pre_hook(_before)
    else:
        module.register_forward_hook(_behind)


def _before(module: nn.Module, args: tuple[Any, ...]) -> Any:
    return (getattr(module, CHILD)(args[0]), *args[1:])


def _behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return getattr(module, CHILD)(output)
