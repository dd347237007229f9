"""Whether noise acts.

It does where two passes without a seed differ, and as many layers draw as there are convolutions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import selfensemble as rse
from selfensemble.noise.streams import drawn_layers

Forward = Callable[[Tensor], Any]


def compiled(function: Any, **settings: Any) -> Any:
    return torch.compile(function, backend="eager", **settings)


@torch.no_grad()
def layers_that_draw(forward: Forward, images: Tensor) -> int:
    """How many layers draw noise in a pass; 0 only if two passes are equal, else they differ."""
    with drawn_layers() as drawn:
        one = forward(images)
    assert torch.equal(one, forward(images)) == (not drawn)
    return len(drawn)


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, _ConvNd) for module in model.modules())


def rules(model: nn.Module, images: Tensor) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for issue in rse.validate(model, images):
        found.setdefault(issue.rule, []).append(issue.where)
    return found
