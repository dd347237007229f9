"""Networks as graphs that can be rewritten, where the graph does what the network does."""

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..ensemble.checks import logits_of
from ..ensemble.randomness import PASSES, answers_differ
from ..ensemble.settings import as_text, settings_of
from ..noise.injection import CHILD, _pre_hook
from ..noise.layer import RandomLayer
from ..noise.own_numbers import OwnNumbers
from ..noise.streams import noise_draw
from ..runtime.random_state import states_of_others
from .parts import GraphParts, Parts, WatchedParts

_TRIES = 3  # other threads may draw from Python's generators meanwhile

# torch.fx puts its own functions into nn.Module while it traces, for all threads.
_tracing = threading.Lock()


class _Tracer(fx.Tracer):
    """Keeps random layers as they are: what they draw must not become a constant of the graph.

    Passes of other threads go on as if nothing was traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Those of a call with images alone: `*args` and `**kwargs` of its forward are empty."""
        forward, found = super().create_args_for_root(root_fn, is_module, concrete_args)
        args: list[Any] = []
        for each in found:
            name = str(each.node.target) if isinstance(each, fx.Proxy) else ""
            if name.startswith("*"):
                self.graph.erase_node(each.node)
                each = {} if name.startswith("**") else ()
            args.append(each)
        return forward, args

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, RandomLayer) or super().is_leaf_module(module, qualified_name)


def rewritten(
    network: nn.Module,
    rewrite_: Callable[[Parts], None],
    example_inputs: Tensor,
    tolerance: float,
    half: bool = False,
) -> nn.Module:
    """The network after `rewrite_`; as it is where answers change by more than rounding.

    As a graph, where it can be traced. A graph holds what Python computed while it was traced: of a network
    whose Python draws numbers from global generators, or counts its passes in attributes or buffers, only
    layers are exchanged, and so where tracing fails. Generators and counters in objects of its own are known
    only by answers that differ, see `repeats_itself`.

    Args:
        network: in eval mode.
        rewrite_: changes parts in place.
        example_inputs: to compare the answers on.
        tolerance: of outputs, against the largest of them.
        half: whether the answers are to be compared under autocast.
    """
    for rewrite in (_as_graph, _as_it_stands):
        if rewrite is _as_it_stands and _takes_turns(network, example_inputs[:2]):
            break
        with suppress(Exception):  # of a stranger's code, which may do what no tracer can follow
            other = rewrite(network, rewrite_, example_inputs[:2])
            with torch.autocast(example_inputs.device.type, torch.bfloat16, enabled=half):
                if _same(network, other, example_inputs, tolerance):
                    return other
    return network


def _as_graph(network: nn.Module, rewrite_: Callable[[Parts], None], images: Tensor) -> nn.Module:
    graph = _graph_of(network)
    rewrite_(GraphParts(graph))
    if network._forward_pre_hooks:
        _put_in_front_(graph, copy.deepcopy(dict(network.named_children())[CHILD]))
    graph.recompile()
    graph.delete_all_unused_submodules()
    return graph


def _put_in_front_(graph: fx.GraphModule, noise: nn.Module) -> None:
    """Noise before the whole network, as a part of the graph, whose copies would lose its hooks."""
    graph.add_module(CHILD, noise)
    inputs = next(node for node in graph.graph.nodes if node.op == "placeholder")
    with graph.graph.inserting_after(inputs):
        noisy = graph.graph.call_module(CHILD, (inputs,))
    inputs.replace_all_uses_with(noisy, delete_user_cb=lambda user: user is not noisy)


def _as_it_stands(network: nn.Module, rewrite_: Callable[[Parts], None], images: Tensor) -> nn.Module:
    apart = copy.deepcopy(network)
    rewrite_(WatchedParts(apart, images))
    return apart


def _graph_of(network: nn.Module) -> fx.GraphModule:
    """A graph of a copy of the network, or a ValueError where passes would differ from it."""
    if network._forward_hooks or any(each is not _pre_hook for each in network._forward_pre_hooks.values()):
        raise ValueError("hooks of a root are not in its graph")
    for _ in range(_TRIES):
        apart, others = copy.deepcopy(network), states_of_others()
        state, before = _state_of(apart), {module: dict(vars(module)) for module in apart.modules()}
        with _tracing, OwnNumbers() as numbers:
            graph = fx.GraphModule(apart, _Tracer().trace(apart))
        _take_back_(before)
        if numbers.names or _state_of(apart) != state:
            break
        if states_of_others() == others:
            modes = {fqn: module.training for fqn, module in apart.named_modules()}
            for fqn, module in graph.named_modules():  # torch makes modules in between anew, in train mode
                module.training = modes.get(fqn, False)
            return graph
    raise ValueError("its Python draws numbers or counts its passes")


def _takes_turns(network: nn.Module, images: Tensor) -> bool:
    """Whether a pass draws numbers of Python or NumPy, or counts itself: the next can take another way."""
    for _ in range(_TRIES):
        apart, others = copy.deepcopy(network), states_of_others()
        before = _state_of(apart)
        with noise_draw(0, sampling="shared"), OwnNumbers(0):
            logits_of(apart(images), len(images))
        if _state_of(apart) != before:
            return True
        if states_of_others() == others:
            return False
    return True


def _state_of(network: nn.Module) -> set[object]:
    """What a pass might leave behind: attributes, and how often tensors were written to."""
    return {
        *((fqn, as_text((each,))) for fqn, module in network.named_modules() for each in settings_of(module)),
        *((id(each), each._version) for each in (*network.parameters(), *network.buffers())
          if not each.is_inference()),
    }  # fmt: skip


def _take_back_(before: dict[nn.Module, dict[str, Any]]) -> None:
    """Attributes that hold what a pass computes as they were: the tracer left its stand-ins in them."""
    for module, attributes in before.items():
        own = vars(module)
        for name in [name for name, value in own.items() if _is_computed(value)]:
            del own[name]
            if name in attributes:
                own[name] = attributes[name]


def _is_computed(value: object) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value))


def repeats_itself(network: nn.Module, inputs: Tensor) -> bool:
    """Whether passes with the same numbers of torch, and the same noise, give the same answers."""

    def forward(images: Tensor) -> Tensor:
        with noise_draw(0, sampling="shared"), OwnNumbers(0):
            return logits_of(network(images), len(images))

    try:
        return not answers_differ(forward, inputs, PASSES)
    except Exception:  # of somebody's code, which may refuse so few images
        return False


@torch.no_grad()
def _same(network: nn.Module, other: nn.Module, inputs: Tensor, tolerance: float) -> bool:
    """Whether both give the same logits with the same noise."""
    outputs = []
    for each in (network, other):
        with noise_draw(0, sampling="shared"), OwnNumbers(0):
            outputs.append(logits_of(each(inputs), len(inputs)).float())
    ours, theirs = outputs
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(ours.abs().max()))
