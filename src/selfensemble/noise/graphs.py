"""Networks that run as graphs rather than as modules: compiled, scripted, exported, quantised.

Noise enters by hooks. A graph that was recorded without them runs without them, and does not say so.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

_CONVOLUTION, _LINEAR = re.compile(r"conv(\d|ol|_)", re.IGNORECASE), re.compile("linear|addmm", re.IGNORECASE)
_COMPILER = "torch._dynamo"  # takes seconds to import, and where it is not, nothing has been compiled


class AfterImport:
    """A finder of `sys.meta_path` that has a function called with a module when it is imported.

    Args:
        name: of the module.
        then: is called once.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the others find, with the call behind the module's own code."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _guard_hooks(config: Any) -> None:
    """Have graphs that are recorded from now on checked for hooks before they are run.

    By default they are not: the graph of a network without noise would serve for its noisy copy, as both have
    the same code. Network and copy are then told apart neither by hooks nor by the child that they call.
    """
    config.skip_nnmodule_hook_guards = False


def forget_graphs() -> None:
    """Make `torch.compile` record again, at their next call, all graphs of this process.

    Which of them hold a given module is not known: a function around a network may be compiled as well.
    """
    if _COMPILER in sys.modules:
        sys.modules[_COMPILER].reset_code_caches()


# Wherever noise comes from, unpickled networks among it, this file is imported first.
if f"{_COMPILER}.config" in sys.modules:
    _guard_hooks(sys.modules[f"{_COMPILER}.config"])
    forget_graphs()
else:
    sys.meta_path.insert(0, AfterImport(f"{_COMPILER}.config", _guard_hooks))


def uncompiled() -> AbstractContextManager[Any]:
    """Within this context compiled networks run module by module, so that hooks see what they do."""
    return _stance("force_eager")


def as_recorded() -> AbstractContextManager[Any]:
    """Within this context graphs run where there are some that fit, and nothing is compiled."""
    return _stance("eager_on_recompile")


class _Stances:
    """How graphs run is one setting for all threads: what most restricts them of all that calls want now."""

    def __init__(self) -> None:
        self.lock, self.outside = threading.Lock(), ExitStack()
        self.wanted = {"force_eager": 0, "eager_on_recompile": 0}

    @contextmanager
    def want(self, name: str) -> Iterator[None]:
        self._change(name, 1)
        try:
            yield
        finally:
            self._change(name, -1)

    def _change(self, name: str, by: int) -> None:
        with self.lock:
            self.wanted[name] += by
            self.outside.close()
            stance = next((each for each, count in self.wanted.items() if count), None)
            if stance is not None:
                self.outside.enter_context(torch.compiler.set_stance(stance))


_stances = _Stances()


def _stance(name: str) -> AbstractContextManager[Any]:
    return _stances.want(name) if _COMPILER in sys.modules else nullcontext()


def original_modules(model: nn.Module) -> nn.Module:
    """`model` with what `torch.compile` wrapped instead of its wrappers; the parts are changed in place."""
    if isinstance(model, torch.jit.ScriptModule):
        return model
    for name, child in list(model._modules.items()):
        if child is not None and (original := original_modules(child)) is not child:
            setattr(model, name, original)
    wrapped = model._modules.get("_orig_mod")
    return model if wrapped is None else wrapped


def plain_name(fqn: str) -> str:
    """The name of a module or tensor without the wrappers of `torch.compile` that it lies in."""
    return ".".join(part for part in fqn.split(".") if part != "_orig_mod")


def unwrapped(model: nn.Module) -> nn.Module:
    """What `torch.compile` wrapped, if `model` is its wrapper; parts of it are left wrapped."""
    return model._modules.get("_orig_mod") or model


def leave_out_(graph: fx.GraphModule, name: str) -> None:
    """Take the calls of a module of one input out of a graph."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target == name:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()


def is_recording() -> bool:
    """Whether a graph is being recorded: noise must be an operator in it, not the numbers of one draw."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def closed_parts(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]
) -> Iterator[tuple[str, str, str]]:
    """Parts that compute what `filter_fn` chooses out of reach of hooks, and are not chosen themselves.

    The layers in them are no modules any more; `filter_fn` is asked about an `nn.Conv2d` or `nn.Linear` that
    stands for them, by the name of the part.

    Yields:
        Fully qualified name, kind ("torchscript", "quantized" or "exported") and what it is; of parts within
        parts the outermost.
    """
    found: list[str] = []
    for fqn, module in model.named_modules():
        if any(not above or fqn.startswith(f"{above}.") for above in found):
            continue
        kind, what, operators = _closed(module)
        if operators and kind != "torchscript" and filter_fn(module, fqn):
            continue  # chosen itself, and its own input is within reach
        if any(filter_fn(layer, fqn) for layer in _layers(operators)):
            found.append(fqn)
            yield fqn, kind, what


def _closed(module: nn.Module) -> tuple[str, str, set[str]]:
    """Kind, description, and names of the operators in it; none where hooks see everything."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "torchscript", "a TorchScript module, which takes no hooks", _script_operators(module)
    quantized = ".quantized" in type(module).__module__
    if quantized and not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return "quantized", f"a quantised {name}, which is no layer of torch.nn and may take integers", {name}
    if isinstance(graph := getattr(module, "graph", None), fx.Graph):
        names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
        return "exported", f"a graph ({name}) that calls its layers as functions, which take no hooks", names
    return "", "", set()


def _script_operators(module: torch.jit.ScriptModule) -> set[str]:
    graph = module.inlined_graph if hasattr(module, "forward") else torch._C.Graph()
    found = set[str]()
    blocks: list[Any] = [graph]
    while blocks:
        for node in blocks.pop().nodes():
            found.add(node.kind())
            blocks += node.blocks()
    return found


def _layers(operators: set[str]) -> list[nn.Module]:
    """Modules that stand for those among the operators that convolve or multiply by weights."""
    layers: list[nn.Module] = []
    if any(_CONVOLUTION.search(name) for name in operators):
        layers.append(nn.Conv2d(1, 1, 3, device="meta"))
    if any(_LINEAR.search(name) for name in operators):
        layers.append(nn.Linear(1, 1, device="meta"))
    return layers
