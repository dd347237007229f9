"""Whether the layer with the noise of the first one runs first, which one pass tells."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..noise.calls import OwnHooks
from ..noise.graphs import unwrapped
from ..noise.injection import noise_layers
from ..noise.layer import GaussianNoise
from ..noise.streams import drawn_layers
from ..runtime.remarks import Remark

CURE = (
    "call remove_noise_(model), and pass example_inputs when noise is put in: they tell what runs first "
    "(commands have them for a named network)"
)


def is_by_registration(model: nn.Module) -> bool:
    """Whether noise was put in without an example: the layer that was made first counts as the first."""
    return any(layer.by_registration for layer in noise_layers(model).values())


def wrong_first(noisy: dict[str, GaussianNoise], called: list[str]) -> str | None:
    """What to say where the first of the layers that a pass calls has not the noise of the first layer.

    Args:
        noisy: the noise by the name of the module behind it, in the order of their numbers.
        called: names of those that run, in their order.
    """
    first = next(iter(noisy), None)
    if first is None or not called or called[0] == first or noisy[called[0]].std == noisy[first].std:
        return None
    return (
        f"it has the noise of the first layer, and {called[0]} runs before it: noise was put in by the order "
        "of registration"
    )


@contextmanager
def order_watched(model: nn.Module) -> Iterator[None]:
    """Within this context `model` makes a pass; at its end a `Remark` says if another layer runs first."""
    noisy, called = noise_layers(model), list[str]()
    compiled = any(
        unwrapped(module) is not module or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if compiled:  # hooks would have it run without its graphs; layers of level 0 draw nothing
        names = {layer.layer: fqn for fqn, layer in noisy.items()}
        with drawn_layers() as drawn:
            yield
        called = [names[number] for number in drawn if number in names]
    else:
        with OwnHooks() as hooks:
            for fqn in noisy:
                module = model.get_submodule(fqn)
                hooks.add(module.register_forward_pre_hook, lambda _, args, fqn=fqn: called.append(fqn))
            yield
    if said := wrong_first(noisy, called):
        warnings.warn(f"{next(iter(noisy)) or 'the model'}: {said}; {CURE}", Remark, stacklevel=2)
