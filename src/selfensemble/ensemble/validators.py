"""What noise injection would miss or get wrong in a network, found before it costs a training run.

`validate` runs one forward pass and applies every rule. Each problem says why it is one and what to do.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..noise.copies import OptimizedCopy
from ..noise.injection import CHILD, FilterFn, call, eval_mode, is_convolution, noise_layers
from ..noise.layer import GaussianNoise
from .checks import check_images, logits_of

_COPIES = {torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.contiguous}


@dataclass(frozen=True, slots=True)
class Issue:
    """One problem.

    Attributes:
        rule: name of the rule that found it.
        severity: "error": noise is missing or the ensemble will not work; "warning": it works, but
            perhaps not as meant.
        where: fully qualified name of the module, "" for the whole model.
        message: what is the matter and why that is a problem.
        cure: what to do.
    """

    rule: str
    severity: Literal["error", "warning"]
    where: str
    message: str
    cure: str

    def __str__(self) -> str:
        place = f" {self.where}" if self.where else ""
        return f"{self.severity} [{self.rule}]{place}: {self.message}. {self.cure}."


@dataclass(slots=True)
class _Trace:
    """What one forward pass did."""

    called: list[str] = field(default_factory=list)
    batches: dict[str, int] = field(default_factory=dict)
    functional: dict[tuple[str, str], str] = field(default_factory=dict)
    image_readers: list[str] = field(default_factory=list)
    image_ops: dict[str, str] = field(default_factory=dict)
    output: Any = None
    failure: Exception | None = None


class _Observer(TorchDispatchMode):
    """Follows the image until it is read, and sees convolutions that no module announces."""

    def __init__(self, trace: _Trace, matched: set[str], inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.matched = trace, matched
        self.stack: list[tuple[str, nn.Module]] = []
        tensors = _images(inputs)
        self.kept = tensors  # so that no storage is freed and its address used again
        self.image = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def enter(self, fqn: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.stack.append((fqn, module))
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
        if func.is_view:
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


def _images(inputs: Any) -> list[Tensor]:
    """The tensors of an example that can hold images or signals, rather than labels or masks."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.dim() >= 3] or tensors[:1]


def _caller() -> str:
    """file:line of the innermost frame outside torch and this package."""
    inside = (torch.__path__[0], __file__)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(inside):
            return f"{frame.filename}:{frame.lineno}"
    return "unknown place"


def _observe(model: nn.Module, example_inputs: Any, matched: set[str]) -> _Trace:
    trace = _Trace()
    observer = _Observer(trace, matched, example_inputs)
    with ExitStack() as stack:
        for fqn, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            enter = module.register_forward_pre_hook(lambda m, args, fqn=fqn: observer.enter(fqn, m, args))
            leave = module.register_forward_hook(lambda m, args, output: observer.leave(), always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        stack.enter_context(observer)
        try:
            trace.output = call(model, example_inputs)
        except Exception as error:  # whatever the user's network raises is a finding, not a crash
            trace.failure = error
    return trace


def validate(model: nn.Module, example_inputs: Any, *, filter_fn: FilterFn = is_convolution) -> list[Issue]:
    """Everything about `model` that would make its self-ensemble wrong, weak or impossible.

    Args:
        model: before or after `inject_noise_`; it is left as it is. Of an optimised copy, its original.
        example_inputs: a batch of at least 2 (a tensor, a tuple of arguments or a dict of keywords).
        filter_fn: the one that noise is injected by.

    Returns:
        The issues, errors first; an empty list when all is well.
    """
    if isinstance(model, OptimizedCopy):
        model = model.original
    matched = [fqn for fqn, module in model.named_modules() if filter_fn(module, fqn)]
    issues = [issue for rule in _STATIC_RULES for issue in rule(model, matched)]
    trace = _observe(model, example_inputs, set(matched))
    if trace.failure is not None:
        text = " ".join(str(trace.failure).split())
        issues.append(
            Issue(
                "forward", "error", "", f"the forward pass fails: {type(trace.failure).__name__}: {text}",
                "Pass example inputs that the model accepts; dicts become keywords, tuples arguments",
            )
        )  # fmt: skip
    else:
        issues += [issue for rule in _TRACE_RULES for issue in rule(trace, matched)]
        issues += [*_folded(trace, _images(example_inputs)), *_range(_images(example_inputs))]
    return sorted(issues, key=lambda issue: issue.severity)


def _nothing(model: nn.Module, matched: list[str]) -> Iterator[Issue]:
    if not matched:
        yield Issue(
            "no-convolution", "error", "", "no module matches filter_fn, so no noise would be injected",
            "Pass a filter_fn, e.g. lambda module, fqn: isinstance(module, torch.nn.Linear)",
        )  # fmt: skip


def _scripted(model: nn.Module, matched: list[str]) -> Iterator[Issue]:
    for fqn, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield Issue(
                "torchscript", "error", fqn, "TorchScript modules take no hooks, so no noise enters them",
                "Inject noise into the original module, before scripting or tracing it",
            )  # fmt: skip
            return


def _quantized(model: nn.Module, matched: list[str]) -> Iterator[Issue]:
    for fqn, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            yield Issue(
                "quantized", "error", fqn, "quantised layers take integers, to which noise cannot be added",
                "Inject noise into the floating-point network",
            )  # fmt: skip


def _partly_noisy(model: nn.Module, matched: list[str]) -> Iterator[Issue]:
    noisy = noise_layers(model)
    for fqn in matched if noisy else []:
        if fqn not in noisy:
            yield Issue(
                "partly-noisy", "warning", fqn, "other modules have noise in front of them, this has not",
                "Call remove_noise_(model) and inject again with the filter_fn you mean",
            )  # fmt: skip


def _functional(trace: _Trace, matched: list[str]) -> Iterator[Issue]:
    for (where, name), place in trace.functional.items():
        yield Issue(
            "functional-convolution", "error", where,
            f"{name} is called as a function at {place}: no hook sees it, so it gets no noise",
            "Call a torch.nn convolution there, or add GaussianNoise(std) to its input",
        )  # fmt: skip


def _not_called(trace: _Trace, matched: list[str]) -> Iterator[Issue]:
    for fqn in matched:
        if fqn not in trace.called:
            yield Issue(
                "not-called", "warning", fqn, "the forward pass does not call this module: its noise does "
                "nothing, perhaps because only its weights are used",
                "Check that the example takes the same path as your data; leave the module out otherwise",
            )  # fmt: skip


def _first_noise(trace: _Trace, matched: list[str]) -> Iterator[Issue]:
    first = next(iter(trace.image_readers), None)
    for fqn in trace.image_readers[1:]:
        yield Issue(
            "around-first-noise", "warning", fqn, f"it reads the image, as {first} does, but gets "
            "inner_std: the image has a way around the first noise, so no radius can be certified",
            "Put one GaussianNoise(init_std) in front of the whole network instead",
        )  # fmt: skip
    for where, name in trace.image_ops.items():
        if first is None:
            yield Issue(
                "transformed-input", "warning", where, f"{name} changes the image before the first noise: "
                "init_std is then in the units of what comes out, not of pixels in [0, 1]",
                "Scale init_std by the same factor, or put GaussianNoise(init_std) in front of the network",
            )  # fmt: skip
        else:
            yield Issue(
                "around-first-noise", "warning", where, f"{name} reads the image beside {first}: the image "
                "has a way around the first noise, so no radius can be certified",
                "Put one GaussianNoise(init_std) in front of the whole network instead",
            )  # fmt: skip


def _output(trace: _Trace, matched: list[str]) -> Iterator[Issue]:
    try:
        logits = logits_of(trace.output)
    except ValueError as error:
        yield Issue("output", "error", "", str(error), "See SelfEnsemble")
        return
    sums = logits.float().sum(dim=-1)
    if len(logits) and logits.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        yield Issue(
            "probabilities", "error", "", "the outputs are probabilities: softmax would be applied twice, "
            "which flattens the ensemble and hides gradients from attacks",
            "Return logits, i.e. leave the last softmax out",
        )  # fmt: skip


def _folded(trace: _Trace, images: list[Tensor]) -> Iterator[Issue]:
    batch = len(images[0]) if images else 0
    for fqn, size in trace.batches.items():
        if size > batch > 0:
            yield Issue(
                "folded-batch", "warning", fqn, f"it gets a batch of {size} for {batch} inputs: parts of one "
                "input (frames, patches, windows) stand in the batch, and shared noise would be one for all",
                'Use SelfEnsemble(..., sampling="per_image")',
            )  # fmt: skip
            return


def _range(images: list[Tensor]) -> Iterator[Issue]:
    for leaf in images:
        if leaf.dim() >= 3:
            try:
                check_images(leaf)
            except (TypeError, ValueError) as error:
                yield Issue("input-range", "warning", "", str(error), "The published levels are for [0, 1]")


_STATIC_RULES: tuple[Callable[[nn.Module, list[str]], Iterator[Issue]], ...] = (
    _nothing, _scripted, _quantized, _partly_noisy,
)  # fmt: skip
_TRACE_RULES: tuple[Callable[[_Trace, list[str]], Iterator[Issue]], ...] = (
    _functional, _not_called, _first_noise, _output,
)  # fmt: skip
