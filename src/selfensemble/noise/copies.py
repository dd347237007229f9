"""Networks that compute as others do, and those they are copies of: noise is taken out of both.

An optimised copy answers, and attacks on it decide on its original. With noise taken out of only one of them
they would decide on another network than the one that answers.
"""

from torch import nn


class OptimizedCopy:
    """Mixed into a module that computes as another one does, which is no part of it.

    Neither its parameters nor its state are the copy's; `deepcopy` and pickle take it along.
    """

    _original: tuple[nn.Module]  # in a tuple, so that torch does not take it for a submodule

    @property
    def original(self) -> nn.Module:
        """What this is a copy of."""
        return self._original[0]

    def check_original(self) -> None:
        """Raise a ValueError where the two are seen to differ; by default nobody looks."""


def with_originals(model: nn.Module) -> list[nn.Module]:
    """`model`, and the networks that it or modules within it are copies of."""
    found = [model]
    for network in found:  # which grows: a copy may be one of a copy
        for module in network.modules():
            if isinstance(module, OptimizedCopy) and module.original not in found:
                found.append(module.original)
    return found
