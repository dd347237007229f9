"""What noise injection would miss or get wrong in a network, found before it costs a training run.

`validate` runs a few forward passes and applies every rule. Each problem says why it is one and what to do.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..noise.calls import own_modes
from ..noise.copies import OptimizedCopy
from ..noise.filters import Filter, filter_named, is_linear, matching
from ..noise.graphs import closed_parts
from ..noise.injection import CHILD, FilterFn, is_convolution, noise_layers, random_layers
from ..noise.layer import GaussianNoise
from ..noise.records import lost_noise
from ..noise.streams import Sampling
from .checks import check_call, check_images, logits_of
from .ensemble import SelfEnsemble
from .observation import (
    IN_FRONT,
    OF_FORWARD,
    PER_IMAGE,
    Trace,
    batch_of,
    failed,
    images_of,
    observe,
    parts_in_batch,
    without_flips,
)
from .order import CURE, wrong_first

_IN_FRONT = IN_FRONT[0].upper() + IN_FRONT[1:]


@dataclass(frozen=True, slots=True)
class Issue:
    """One problem.

    Attributes:
        rule: name of the rule that found it.
        severity: "error": noise is missing or the ensemble will not work; "warning": it works, but
            perhaps not as meant.
        where: fully qualified name of the module, "" for the whole model.
        message: what is wrong and why that is a problem.
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


def validate(
    model: nn.Module,
    example_inputs: Any,
    *,
    filter_fn: FilterFn | Filter = is_convolution,
    sampling: Sampling | None = None,
) -> list[Issue]:
    """Everything about `model` that would make its self-ensemble wrong, weak or impossible.

    It makes three or four forward passes: one module by module, the others through the network as it is.

    Args:
        model: before or after `inject_noise_`; it stays unchanged. For an optimised copy, pass the original.
        example_inputs: a batch of at least 2 (a tensor, a tuple of arguments or a dict of keywords).
        filter_fn: the one that noise is injected by.
        sampling: the one that predictions will have; by default that of the noise there is, else "shared".

    Returns:
        The issues, errors first; an empty list when all is well.
    """
    issues = list[Issue]()
    filter_fn = filter_named(filter_fn)
    if isinstance(model, OptimizedCopy):
        issues += _parted(model)
        model = model.original
    matched = matching(model, filter_fn)
    issues += [issue for rule in _STATIC_RULES for issue in rule(model, matched)]
    issues += _closed(model, filter_fn)
    trace = observe(model, example_inputs, matched)
    if trace.failure is not None:
        issues.append(Issue("forward", "error", "", *failed(model, example_inputs, trace.failure)))
    else:
        issues += [issue for rule in _TRACE_RULES for issue in rule(trace, matched)]
        issues += [issue for rule in _NOISE_RULES for issue in rule(model, trace)]
        images = images_of(example_inputs)
        issues += [
            *_output(trace, batch_of(example_inputs)),
            *_range(images, model.bounds if isinstance(model, SelfEnsemble) else (0.0, 1.0)),
        ]
        issues += _folded(model, trace, batch_of(example_inputs), sampling)
    return sorted(issues, key=lambda issue: issue.severity)


def _parted(model: OptimizedCopy) -> Iterator[Issue]:
    try:
        model.check_original()
    except ValueError as error:
        yield Issue("other-original", "error", "", str(error), "See optimize")


def _nothing(model: nn.Module, matched: list[str]) -> Iterator[Issue]:
    if not matched:
        yield Issue(
            "no-convolution", "error", "", "no module matches filter_fn, so no noise would be injected",
            'Pass a filter_fn: "linear", "conv+linear" (--filter), or a function of module and name',
        )  # fmt: skip


def _inputs(model: nn.Module, matched: list[str]) -> Iterator[Issue]:
    try:
        check_call(model)
    except ValueError as error:
        yield Issue("inputs", "error", "", str(error), OF_FORWARD)


def _closed(model: nn.Module, filter_fn: FilterFn) -> Iterator[Issue]:
    for fqn, kind, what in closed_parts(model, filter_fn):
        yield Issue(
            kind, "error", fqn, f"it is {what}: no noise enters the layers in it",
            "Add noise to the original network before you script, export or quantise it",
        )  # fmt: skip


def _without_noise(model: nn.Module, matched: list[str]) -> Iterator[Issue]:
    """Modules that had noise."""
    try:
        lost = list(lost_noise(model))
    except ValueError as error:
        yield Issue(
            "lost-noise",
            "error",
            "",
            str(error),
            "See inject_noise_",
        )
        return
    for fqn in lost:
        yield Issue(
            "lost-noise", "error", fqn, "it had noise before it, and now there is none: the module was "
            "replaced, or the network was saved with noise and loaded without it",
            "Call remove_noise_(model), then inject; SelfEnsemble(model) restores what transformers saved",
        )  # fmt: skip


def _mixed_modes(model: nn.Module, matched: list[str]) -> Iterator[Issue]:
    """Batch norm that a network in eval mode has in train mode, which predictions do not leave so."""
    modes = dict(own_modes(model))
    for fqn, module in model.named_modules():
        if isinstance(module, _NormBase) and modes[module] and not modes.get(model, True):
            yield Issue(
                "mixed-modes", "warning", fqn, "it is in train mode, the network is not: predictions put "
                "it into eval mode, and what it is part of", "Call model.eval(), then train() of dropout",
            )  # fmt: skip


def _functional(trace: Trace, matched: list[str]) -> Iterator[Issue]:
    for (where, name), place in trace.functional.items():
        yield Issue(
            "functional-convolution", "error", where,
            f"{name} is called as a function at {place}: no hook sees it, so it gets no noise",
            "Call a torch.nn convolution there, or add GaussianNoise(std) to its input",
        )  # fmt: skip


def _not_called(trace: Trace, matched: list[str]) -> Iterator[Issue]:
    for fqn in matched:
        if fqn not in trace.called:
            yield Issue(
                "not-called", "warning", fqn, "the forward pass does not call this module: its noise does "
                "nothing, perhaps because only its weights are used",
                "Check that the example takes the same path as your data; leave the module out otherwise",
            )  # fmt: skip


def _first_noise(trace: Trace, matched: list[str]) -> Iterator[Issue]:
    first = next(iter(trace.image_readers), None)
    for fqn in trace.image_readers[1:]:
        yield Issue(
            "around-first-noise", "warning", fqn, f"it reads the image, as {first} does, but gets "
            "inner_std: the image has a way around the first noise, so no radius can be certified",
            _IN_FRONT,
        )  # fmt: skip
    for where, name in trace.image_ops.items():
        if first is None:
            yield Issue(
                "transformed-input", "warning", where, f"{name} changes the image before the first noise: "
                "init_std is then in the units of the result, not of pixels in [0, 1]",
                f"Scale init_std by the same factor, or {IN_FRONT}",
            )  # fmt: skip
        else:
            yield Issue(
                "around-first-noise", "warning", where, f"{name} reads the image beside {first}: the image "
                "has a way around the first noise, so no radius can be certified",
                _IN_FRONT,
            )  # fmt: skip


def _partly_noisy(model: nn.Module, trace: Trace) -> Iterator[Issue]:
    """Modules without noise beside others that have; behind noise on a whole network the first needs none."""
    noisy = noise_layers(model)
    try:
        lost = set(lost_noise(model))
    except ValueError:  # which another rule says
        return
    inside = [fqn for fqn in trace.called if fqn]
    in_front = [f"{fqn}." if fqn else "" for fqn, noise in noisy.items() if noise.varies]
    excused = [next((fqn for fqn in inside if fqn.startswith(each)), "") for each in in_front]
    for fqn in inside if noisy else []:
        if fqn not in noisy and fqn not in lost and fqn not in excused:
            yield Issue(
                "partly-noisy", "warning", fqn, "other modules have noise before them, but this one does not",
                "Call remove_noise_(model) and inject again with the filter_fn (--filter) you mean",
            )  # fmt: skip


def _order(model: nn.Module, trace: Trace) -> Iterator[Issue]:
    """The layer that has the noise of the first one is not the one that runs first."""
    noisy = noise_layers(model)
    first, called = next(iter(noisy), None), [fqn for fqn in trace.called if fqn in noisy]
    if first in called and (said := wrong_first(noisy, called)):
        yield Issue("order", "warning", first, said, CURE[0].upper() + CURE[1:])


def _one_layer(model: nn.Module, trace: Trace) -> Iterator[Issue]:
    """Noise before one layer of many, as in most transformers, where the only convolution cuts patches."""
    others = [fqn for fqn, module in model.named_modules() if is_linear(module) and fqn not in trace.called]
    if len(trace.called) == 1 and len(others) > 1:
        yield Issue(
            "one-layer", "warning", trace.called[0], "noise goes before it alone, which is plain "
            f"smoothing by one Gaussian, not a self-ensemble; {len(others)} linear layers get none",
            'Pass filter_fn="conv+linear" (--filter conv+linear)',
        )  # fmt: skip


def _silent(model: nn.Module, trace: Trace) -> Iterator[Issue]:
    """Noise that is there and does not act."""
    layers = {
        fqn: module
        for fqn, module in model.named_modules()
        if isinstance(module, GaussianNoise)
        and type(module).forward is GaussianNoise.forward
        and module.is_active
    }
    running = Counter(layer.layer for fqn, layer in layers.items() if fqn in trace.entered)
    for fqn, layer in layers.items():
        where = fqn.removesuffix(CHILD).removesuffix(".")
        if fqn in trace.entered:
            if any(drawn[layer.layer] < running[layer.layer] for drawn in trace.drawn):
                yield Issue(
                    "silent-noise", "error", where, "it has noise, but the network runs as a compiled graph "
                    "that was recorded without it",
                    "Call torch.compiler.reset(), or compile the network again",
                )  # fmt: skip
        elif where != fqn and where in trace.entered:
            yield Issue(
                "silent-noise", "error", where, "it has noise that is not called: the hook that calls it is "
                "gone, or the module is called around it", "Call remove_noise_(model) and inject again",
            )  # fmt: skip
    if running and trace.repeats:
        yield Issue(
            "noise-without-effect", "warning", "", "noise is drawn, and two passes give the same outputs",
            "Check the layers after the noise: constant or rounded outputs cannot show it",
        )  # fmt: skip


def _unlisted(model: nn.Module, trace: Trace) -> Iterator[Issue]:
    """Noise that acts and is not there."""
    listed = {layer.layer for layer in random_layers(model) if layer.is_active}
    if any(set(drawn) - listed for drawn in trace.drawn):
        yield Issue(
            "unlisted-noise", "warning", "", "a compiled, traced or exported graph draws noise that no layer "
            "stands for: it cannot be seen, switched off or removed",
            "Use the original network; call torch.compiler.reset() if noise was removed from a compiled one",
        )  # fmt: skip


def _output(trace: Trace, batch: int | None) -> Iterator[Issue]:
    try:
        logits = logits_of(trace.output, batch)
    except ValueError as error:
        yield Issue("output", "error", "", str(error), OF_FORWARD)
        return
    sums = logits.float().sum(dim=-1)
    if len(logits) and logits.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        yield Issue(
            "probabilities", "error", "", "the outputs are probabilities: softmax would be applied twice, "
            "which flattens the ensemble and hides gradients from attacks",
            "Return logits: leave out the last softmax",
        )  # fmt: skip


def _folded(model: nn.Module, trace: Trace, batch: int | None, sampling: Sampling | None) -> Iterator[Issue]:
    noisy = noise_layers(model)
    shared = {
        fqn: size
        for fqn, size in trace.batches.items()
        if (sampling or (noisy[fqn].sampling if fqn in noisy else "shared")) == "shared"
    }
    if found := parts_in_batch(without_flips(model, shared), batch):
        yield Issue("folded-batch", "warning", *found, PER_IMAGE[0].upper() + PER_IMAGE[1:])


def _range(images: list[Tensor], bounds: tuple[float, float] | None) -> Iterator[Issue]:
    for leaf in images:
        if leaf.dim() >= 3:
            try:
                check_images(leaf, bounds)
            except (TypeError, ValueError) as error:
                yield Issue("input-range", "warning", "", str(error), "The published levels are for [0, 1]")


_STATIC_RULES: tuple[Callable[[nn.Module, list[str]], Iterator[Issue]], ...] = (
    _nothing, _without_noise, _mixed_modes, _inputs,
)  # fmt: skip
_TRACE_RULES: tuple[Callable[[Trace, list[str]], Iterator[Issue]], ...] = (
    _functional, _not_called, _first_noise,
)  # fmt: skip
_NOISE_RULES: tuple[Callable[[nn.Module, Trace], Iterator[Issue]], ...] = (
    _partly_noisy, _order, _one_layer, _silent, _unlisted,
)  # fmt: skip
