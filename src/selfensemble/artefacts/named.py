"""What made a network of a user, as a `config.json` says it: a name, and no leave to import it."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from ..networks.importing import is_file_name, is_importable
from ..networks.naming import name_of, network_from
from .outline import NamedRecord

_OF_LIBRARIES = ("timm:", "torchvision:")
_FOREIGN = "the folder was not written by this package, leave it alone"
# Arguments by which a file could have others read.
_READING = ("checkpoint", "path", "file", "url", "hub", "cfg", "cache", "weights")


class UntrustedNetwork(ValueError):
    """A saved ensemble whose network is code of a user, which nobody said to import.

    Attributes:
        folder: of the ensemble.
        named: what its `config.json` says of the network, if anything.
    """

    def __init__(self, folder: str | Path, named: "NamedNetwork | None") -> None:
        self.folder, self.named = folder, named
        said = (
            "does not say what makes its network"
            if named is None
            else f"holds a network that {named.name} makes, whose code is not in it and was not imported"
        )
        super().__init__(
            f'{folder} {said}: pass the network or its name, rse.load(folder, model="mynets.py:make")'
            + ("" if named is None else ", or, if you trust that name, rse.load(folder, trust_network=True)")
        )


class OtherArguments(ValueError):
    """A saved ensemble whose network was asked for with other arguments than it was saved with.

    Attributes:
        folder: of the ensemble.
        named: what its `config.json` says of the network.
    """

    def __init__(self, folder: str | Path, named: "NamedNetwork", given: Mapping[str, Any]) -> None:
        self.folder, self.named = folder, named
        self.said = (
            f"{folder} holds a network that {named.name} made with the arguments "
            f"{json.dumps(named.arguments)}, and does not fit the network of "
            f"{json.dumps(dict(given), default=str)}"
        )
        super().__init__(f"{self.said}: leave arguments= out, which takes those that were saved")


class NamedNetwork(NamedRecord):
    """A network that is neither one of `MODELS` nor of transformers, see `NamedRecord`."""

    @classmethod
    def of(cls, network: nn.Module) -> Self | None:
        """Of a network that was asked for by name, or whose class can be imported by its own."""
        known = name_of(network)
        if known is None:
            name, arguments = _class_name(network), None
        else:
            name, arguments = _portable(known[0]), _plain(known[1])
        if name is None:
            return None
        try:
            return cls(name=name, arguments=arguments)
        except ValueError:  # of letters that no name should have
            return None

    @property
    def needs_trust(self) -> bool:
        """Whether code would be run that is not of a known library, or files read that it names."""
        if not self.name.startswith(_OF_LIBRARIES):
            return True
        return any(part in key.lower() for key in self.arguments or {} for part in _READING)

    @property
    def is_here(self) -> bool:
        """Whether its code lies in the current folder or is installed; none of it is run."""
        return not self._is_of_python and is_importable(self.name)

    @property
    def _is_of_python(self) -> bool:
        return self.name.partition(":")[0].partition(".")[0] in sys.stdlib_module_names

    def build(self, name: str | None = None, arguments: Mapping[str, Any] | None = None) -> nn.Module:
        """The network with fresh weights. Its code runs.

        Args:
            name: where it is to be found now, if elsewhere.
            arguments: instead of those it was made with.
        """
        if name is None and self._is_of_python:
            raise ValueError(f"{self.name} is of Python itself, and makes no network: {_FOREIGN}")
        chosen = self.arguments if arguments is None else arguments
        return network_from(name or self.name, chosen, pretrained=False)


def _class_name(network: nn.Module) -> str | None:
    kind = type(network)
    module = kind.__module__
    if "<" in kind.__qualname__ or module.partition(".")[0] in ("torch", "selfensemble", "builtins"):
        return None
    if module == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        return None if file is None else f"{Path(file).name}:{kind.__qualname__}"
    return f"{module}:{kind.__qualname__}"


def _portable(name: str) -> str:
    """Without the folders of this machine that a file lies in."""
    place, _, attribute = name.rpartition(":")
    if name.startswith(_OF_LIBRARIES) or not is_file_name(place) or not Path(place).is_absolute():
        return name
    path, here = Path(place).resolve(), Path.cwd()
    below = path.relative_to(here) if path.is_relative_to(here) else Path(path.name)
    return f"{below.as_posix()}:{attribute}"


def _plain(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """As they stand in JSON; None where they are objects."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(arguments, allow_nan=False))
    except (TypeError, ValueError):
        return None
    return found
