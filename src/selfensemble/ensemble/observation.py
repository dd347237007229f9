"""What a network does in a forward pass, for `validate`: what runs, reads the image, draws noise."""

import inspect
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from ..networks.flipping import FlipAveraged
from ..noise.calls import OwnHooks
from ..noise.graphs import as_recorded
from ..noise.injection import CHILD, call, eval_mode
from ..noise.layer import GaussianNoise
from ..noise.own_numbers import OwnNumbers
from ..noise.streams import drawn_layers, noise_draw
from ..runtime.dispatch import DispatchMode
from ..runtime.random_state import kept_random_state
from .checks import is_of_inputs, logits_of

_COPIES = {torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.contiguous}
# A pixel stays what it is with constants beside it, and where it is written into another tensor.
_COPIES |= {torch.ops.aten.constant_pad_nd, torch.ops.aten.copy_}
_OF_ITS_KIND = ("new_", "empty_like", "zeros_like", "ones_like", "full_like")  # which read its shape alone


@dataclass(slots=True)
class Trace:
    """What forward passes did.

    Attributes:
        entered: names of all modules that ran.
        called: names of those that noise goes before, in their order.
        batches: size of the batch that each of them met.
        functional: module and operator of convolutions called as functions, and where.
        image_readers, image_ops: what reads the image: layers that noise goes before; other operators.
        output: of the model.
        failure: of the pass, if it failed.
        drawn: how often each number of a layer drew noise, in passes as the network runs by itself, with the
            graphs that have been compiled of it.
        repeats: whether two such passes gave the same.
    """

    entered: set[str] = field(default_factory=set)
    called: list[str] = field(default_factory=list)
    batches: dict[str, int] = field(default_factory=dict)
    functional: dict[tuple[str, str], str] = field(default_factory=dict)
    image_readers: list[str] = field(default_factory=list)
    image_ops: dict[str, str] = field(default_factory=dict)
    output: Any = None
    failure: Exception | None = None
    drawn: list[Counter[int]] = field(default_factory=list)
    repeats: bool = False


class _Observer(DispatchMode):
    """Follows the image until it is read, and sees convolutions that no module announces."""

    def __init__(self, trace: Trace, matched: set[str], inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.matched = trace, matched
        self.stack: list[tuple[str, nn.Module]] = []
        tensors = images_of(inputs)
        self.kept = tensors  # so that no storage is freed and its address used again
        self.image = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def enter(self, fqn: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.stack.append((fqn, module))
        self.trace.entered.add(fqn)
        if fqn in self.matched and fqn not in self.trace.called:
            self.trace.called.append(fqn)
            if args and isinstance(args[0], Tensor) and args[0].dim() > 1:
                self.trace.batches[fqn] = len(args[0])

    def leave(self) -> None:
        if self.stack:  # a pre-hook that failed before ours entered nothing
            self.stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        announced = any(isinstance(module, _ConvNd) for _, module in self.stack)
        if "conv" in name and not announced and not any(fqn in self.matched for fqn, _ in self.stack):
            where = self.stack[-1][0] if self.stack else ""
            self.trace.functional.setdefault((where, name), _caller())
        else:
            self._follow_image(func, name, args, result)
        return result

    def _follow_image(self, func: Any, name: str, args: tuple[Any, ...], result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if not any(tensor.untyped_storage().data_ptr() in self.image for tensor in tensors):
            return
        if func.is_view or name.startswith(_OF_ITS_KIND):
            return
        if func.overloadpacket in _COPIES and isinstance(result, Tensor):
            self.image.add(result.untyped_storage().data_ptr())
            self.kept.append(result)
            return
        names = [fqn for fqn, _ in self.stack]
        reader = next((fqn for fqn in names if fqn in self.matched), None)
        if reader is None and self.stack and isinstance(self.stack[-1][1], GaussianNoise):
            # Injected noise runs just before the module that it belongs to.
            reader = names[-1].removesuffix(CHILD).removesuffix(".")
        if reader is None:
            self.trace.image_ops.setdefault(names[-1] if names else "", name)
        elif reader not in self.trace.image_readers:
            self.trace.image_readers.append(reader)


def images_of(inputs: Any) -> list[Tensor]:
    """The tensors of an example that can hold images or signals, rather than labels or masks."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.dim() >= 3] or tensors[:1]


PER_IMAGE = 'pass sampling="per_image" (--sampling per_image of commands, noise.sampling of recipes)'
IN_FRONT = (
    "put one GaussianNoise(init_std) before the whole network (--mean 0 --std 1 of a named network in "
    "commands, model.normalize {mean: 0, std: 1} of recipes)"
)
OF_FORWARD = "Change its forward, or write a module around it, for commands in path/to/file.py:attribute"
_EXAMPLES = "Pass example inputs that the model accepts; dicts become keywords, tuples arguments"
_OWN_CODE = "Its own code fails, whatever the inputs: mend that, and try model(inputs) by itself"
_WHOLE_BATCH = (
    "An ensemble calls model(inputs) with a tensor, and this forward takes a whole batch by its keys: write "
    "a module around it whose forward(inputs) passes the tensor on, model({'x': inputs}), labels apart"
)
_OF_KEYS = re.compile(r"invalid data type 'str'|'Tensor' object has no attribute|unexpected keyword argument")

_BY_KEY = re.compile(r"\w\[\s*['\"]")
_NOT_OURS = (torch.__path__[0], str(Path(__file__).parents[1]))  # no code of the user's


def failed(model: nn.Module, example_inputs: Any, error: Exception) -> tuple[str, str]:
    """What to say of a forward pass that fails, and what to do about it."""
    text, frames = " ".join(str(error).split())[:300], traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_OURS)]
    line = (frames[-1].line or "") if frames and isinstance(error, IndexError) else ""
    by_key = _OF_KEYS.search(text) or _BY_KEY.search(line)
    if by_key and _takes_a_batch(model, example_inputs):
        cure = _WHOLE_BATCH
    else:
        cure = _EXAMPLES if is_of_inputs(error) else _OWN_CODE
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"the forward pass fails: {type(error).__name__}: {text}{place}", cure


def _takes_a_batch(model: nn.Module, example_inputs: Any) -> bool:
    """Whether its forward may want the keys of its one argument: called with a tensor, or a dict spread."""
    if not isinstance(example_inputs, dict):
        return isinstance(example_inputs, Tensor)
    try:
        signature = inspect.signature(model.forward)
        signature.bind(None)
    except (TypeError, ValueError):
        return False
    return len(signature.parameters) == 1


def parts_in_batch(batches: Mapping[str, int], inputs: int | None) -> tuple[str, str] | None:
    """The first module whose batch is larger than that of the inputs, and what follows; None without one.

    Args:
        batches: size of the batch by the name of a module.
        inputs: how many there are, where it is known.
    """
    for fqn, size in batches.items():
        if inputs and size > inputs:
            return fqn, (
                f"it gets a batch of {size} for {inputs} inputs: parts of one input (frames, patches, "
                "windows) are in the batch, and shared noise is equal for all of them"
            )
    return None


def without_flips(model: nn.Module, batches: Mapping[str, int]) -> dict[str, int]:
    """Batches by the name of a module, without the flips of images, which may share the noise of those."""
    flipping = tuple(
        f"{fqn}." if fqn else "" for fqn, module in model.named_modules() if isinstance(module, FlipAveraged)
    )
    return {fqn: size // 2 if fqn and fqn.startswith(flipping) else size for fqn, size in batches.items()}


def check_answer(model: nn.Module, example_inputs: Any, noisy: Sequence[str] = ()) -> str | None:
    """Raise an `OutputError` unless the answer to an example is logits, as `validate` says it.

    Args:
        model, example_inputs: see `validate`.
        noisy: names of modules with noise that a batch is to share.

    Returns:
        What to say if the parts of an input would share it.
    """
    batches = dict[str, int]()

    def note(fqn: str, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() > 1:
            batches.setdefault(fqn, len(args[0]))

    try:
        with ExitStack() as stack:
            hooks = OwnHooks()
            if noisy:
                stack.enter_context(hooks)
            for fqn in noisy:
                if not isinstance(module := model.get_submodule(fqn), torch.jit.ScriptModule):
                    hooks.add(module.register_forward_pre_hook, lambda _, args, fqn=fqn: note(fqn, args))
            for context in (torch.no_grad(), OwnNumbers(), _in_eval_mode(model), warnings.catch_warnings()):
                stack.enter_context(context)
            warnings.filterwarnings("ignore", "Using a non-tuple sequence")  # of a tensor["key"], which fails
            output = call(model, example_inputs)
    except Exception as error:  # of whatever kind: the code is a user's own
        kinds = (ValueError, TypeError, RuntimeError)
        kind = next((each for each in kinds if isinstance(error, each)), ValueError)
        if isinstance(error, kinds) and type(error).__module__ != "builtins":  # says of itself what it is
            raise
        raise kind("{}. {}".format(*failed(model, example_inputs, error))) from error
    count = batch_of(example_inputs)
    logits_of(output, count)
    found = parts_in_batch(without_flips(model, batches), count)
    return None if found is None else f"{found[0] or 'the model'}: {found[1]}; {PER_IMAGE}"


def batch_of(inputs: Any) -> int | None:
    """Number of inputs in an example, where that can be told."""
    images = images_of(inputs)
    return len(images[0]) if images and images[0].dim() else None


def _caller() -> str:
    """file:line of the innermost frame outside torch and this package."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_NOT_OURS):
            return f"{frame.filename}:{frame.lineno}"
    return "unknown place"


def observe(model: nn.Module, example_inputs: Any, matched: list[str]) -> Trace:
    """What `model` does with the example, in eval mode and without gradients; it is left as it is.

    Args:
        model, example_inputs: see `validate`.
        matched: names of the modules that noise goes before.
    """
    trace, given = Trace(), example_inputs
    example_inputs = _copied(given)  # the network may write into them
    observer = _Observer(trace, set(matched), example_inputs)
    with ExitStack() as stack:
        hooks = stack.enter_context(OwnHooks())
        for fqn, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            hooks.add(module.register_forward_pre_hook, lambda m, args, fqn=fqn: observer.enter(fqn, m, args))
            hooks.add(
                module.register_forward_hook, lambda m, args, output: observer.leave(), always_call=True
            )
        stack.enter_context(_in_eval_mode(model))
        numbers = stack.enter_context(OwnNumbers())
        stack.enter_context(torch.no_grad())
        stack.enter_context(observer)
        try:
            trace.output = call(model, example_inputs)
        except Exception as error:  # whatever the user's network raises is a finding, not a crash
            trace.failure = error
    if trace.failure is None:
        _run_by_itself(model, _copied(given), trace, numbers.drew)
    return trace


def _copied(example_inputs: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.numel() else leaf, example_inputs
    )


def _run_by_itself(model: nn.Module, example_inputs: Any, trace: Trace, drew: bool) -> None:
    # Graphs differ by whether gradients are wanted. With them first: weight_norm keeps the last graph.
    compiled = "torch._dynamo" in sys.modules
    modes = (True, False, False) if compiled else (False, False)
    outputs = []
    with ExitStack() as stack:
        if drew:  # graphs as they are know no numbers but the process's
            stack.enter_context(kept_random_state() if compiled else OwnNumbers())
        for context in (_in_eval_mode(model), noise_draw(None), as_recorded()):
            stack.enter_context(context)
        for grad in modes:
            with torch.set_grad_enabled(grad), drawn_layers() as drawn:
                outputs.append(tree_leaves(call(model, example_inputs)))
            trace.drawn.append(drawn)
    pairs = [(one, other) for one, other in zip(*outputs[-2:], strict=False) if isinstance(one, Tensor)]
    trace.repeats = any(one.numel() for one, _ in pairs) and all(torch.equal(*pair) for pair in pairs)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        with suppress(NotImplementedError):  # an exported program has the mode that it was exported in
            stack.enter_context(eval_mode(model))
        yield
