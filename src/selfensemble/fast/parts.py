"""Layers of a network, and which of them feeds which alone: what rewriting needs to know.

Of a graph that was traced, or of a network that no tracer can follow, by watching a pass of it.
"""

import copy
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from ..ensemble.checks import logits_of
from ..noise.calls import OwnHooks
from ..noise.layer import GaussianNoise
from ..noise.own_numbers import OwnNumbers
from ..noise.streams import noise_draw
from ..runtime.dispatch import DispatchMode

_RELUS = (torch.relu, torch.relu_, functional.relu, functional.relu_)
_METHODS = ("relu", "relu_")


class Parts(ABC):
    """Layers that a pass calls once.

    Attributes:
        root: the network.
        modules: by name, in the order of the pass. Functions that are ReLUs count as modules here.
        followers: of those whose output goes into one of the others and nowhere else, the name of that.
    """

    root: nn.Module
    modules: dict[str, nn.Module]
    followers: dict[str, str]

    @abstractmethod
    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module there."""

    @abstractmethod
    def _drop(self, name: str) -> None: ...

    def drop_follower(self, name: str) -> None:
        """Leave out what follows; what follows that follows then."""
        dropped = self.followers[name]
        self._drop(dropped)
        del self.modules[dropped]
        after = self.followers.pop(dropped, None)
        for each in [each for each, follower in self.followers.items() if follower == dropped]:
            if after is None:
                del self.followers[each]
            else:
                self.followers[each] = after


class GraphParts(Parts):
    """Of a graph, which is changed in place."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.root = self._graph = graph
        nodes = [node for node in graph.graph.nodes if node.op == "call_module"]
        times = Counter(node.target for node in nodes)
        known = dict(graph.named_modules())
        self._nodes = {str(node.target): node for node in nodes if times[node.target] == 1}
        self.modules = {name: known[name] for name in self._nodes}
        for node in graph.graph.nodes:
            if node.target in {"call_function": _RELUS, "call_method": _METHODS}.get(node.op, ()):
                name = f"function {node.name}"
                self._nodes[name], self.modules[name] = node, nn.ReLU()
        names = {node: name for name, node in self._nodes.items()}
        self.followers = {}
        for name, node in self._nodes.items():
            for after in node.users if len(node.users) == 1 else ():
                if after in names and after.args[:1] == (node,):
                    self.followers[name] = names[after]

    def replace(self, name: str, module: nn.Module) -> None:
        self._graph.set_submodule(name, module)
        self.modules[name] = module

    def _drop(self, name: str) -> None:
        node = self._nodes[name]
        node.replace_all_uses_with(node.args[0])
        self._graph.graph.erase_node(node)


class WatchedParts(Parts):
    """Of a network that is changed in place, by passes over floating-point images.

    The size of images can lead a pass elsewhere: images of twice and half the size, where the network takes
    them, must find the same.

    Raises:
        ValueError: the network's Python decides by values, which may lead other images elsewhere.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.root = network
        by_name = dict(network.named_modules(remove_duplicate=False))
        once, feeds = _watched(network, by_name, images)
        for other in _of_other_sizes(images):
            if (seen := _watched_elsewhere(network, other)) is not None:
                once = [name for name in once if name in seen[0]]
                feeds = {name: taker for name, taker in feeds.items() if seen[1].get(name) == taker}
        self.modules = {name: by_name[name] for name in once}
        self.followers = {name: feeds[name] for name in once if feeds.get(name) in self.modules}

    def replace(self, name: str, module: nn.Module) -> None:
        self.root.set_submodule(name, module)
        self.modules[name] = module

    def _drop(self, name: str) -> None:
        self.root.set_submodule(name, nn.Identity())


class _DecidesError(ValueError):
    """The network's Python decides by values."""


def _of_other_sizes(images: Tensor) -> list[Tensor]:
    """One image each, of twice and of half the size."""
    sides = images.dim() - 2
    if sides < 1:
        return []
    large = images[:1].repeat(1, 1, *[2] * sides)
    small = images[:1, :, *[slice(max(1, side // 2)) for side in images.shape[2:]]]
    return [large, small]


def _watched_elsewhere(network: nn.Module, images: Tensor) -> tuple[list[str], dict[str, str]] | None:
    """What `_watched` finds of a copy, or None where its own code does not take images of this size.

    On the CPU: what is wrong with an index ends a process's use of other devices.
    """
    try:
        apart = copy.deepcopy(network).cpu()
        return _watched(apart, dict(apart.named_modules(remove_duplicate=False)), images.cpu())
    except _DecidesError:
        raise
    except Exception:  # of a stranger's code
        return None


def _watched(
    network: nn.Module, by_name: dict[str, nn.Module], images: Tensor
) -> tuple[list[str], dict[str, str]]:
    """Layers that a pass over images calls once, and which of them feeds which alone."""
    places = Counter(by_name.values())  # under two names, only one of which would be exchanged
    reads = _Reads()
    calls: Counter[str] = Counter()
    takers: dict[_Key, str] = {}
    made: dict[str, _Key] = {}

    def before(module: nn.Module, args: tuple[Any, ...], name: str) -> None:
        reads.inside.append(name)
        if args and isinstance(args[0], Tensor):
            takers[reads.key(args[0])] = name

    def after(module: nn.Module, args: tuple[Any, ...], output: Any, name: str) -> None:
        reads.inside.pop()
        calls[name] += 1
        made[name] = reads.key(output) if isinstance(output, Tensor) else (0, 0)

    # With derivatives, so that values that leave torch (`numpy()`) are an error.
    with OwnHooks() as hooks, torch.inference_mode(False), torch.enable_grad(), OwnNumbers(0):
        for name, module in by_name.items():
            if name and places[module] == 1 and _is_layer(module):
                hooks.add(module.register_forward_pre_hook, _named(before, name))
                hooks.add(module.register_forward_hook, _named(after, name))
        with noise_draw(0, sampling="shared"), reads:
            logits_of(network(images.detach().clone().requires_grad_()), len(images))
    if reads.decides:
        raise _DecidesError("its Python decides by values")
    once = [name for name in made if calls[name] == 1]
    followers = {}
    for name in once:
        key = made[name]
        if key in takers and reads.readers.get(key, set()) - {name} == {takers[key]}:
            followers[name] = takers[key]
    return once, followers


_Key = tuple[int, int]
_DECISIONS = ("_local_scalar_dense", "equal", "is_nonzero")


class _Reads(DispatchMode):
    """Notes which layers read which tensor, in which state of it.

    Attributes:
        inside: names of layers that are being called, the innermost last.
        readers: names by tensor; "" for what is done outside of layers.
        decides: whether a value became a number of Python outside of layers.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: list[str] = []
        self.readers: dict[_Key, set[str]] = {}
        self.decides = False
        self._kept: list[Tensor] = []  # another would get the number of one that is gone

    def key(self, tensor: Tensor) -> _Key:
        """The tensor as it is now: what is written into it later is another."""
        self._kept.append(tensor)
        return id(tensor), tensor._version

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        layer = self.inside[-1] if self.inside else ""
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor):
                self.readers.setdefault(self.key(each), set()).add(layer)
        self.decides |= not layer and func.__name__.partition(".")[0] in _DECISIONS
        return func(*args, **(kwargs or {}))


def _is_layer(module: nn.Module) -> bool:
    """Whether it holds no others but the noise before it, and does something."""
    bare = all(isinstance(child, GaussianNoise) for child in module.children())
    return bare and not isinstance(module, nn.Identity)


def _named(hook: Any, name: str) -> Any:
    return lambda *args: hook(*args, name)
