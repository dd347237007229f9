"""Honesty checks of the noise: is it there and fresh, do attacks meet it, where does it enter?"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ...attacks.driver import single_draw
from ...certainty.arrival import pixel_levels, pixel_map
from ...ensemble.checks import logits_of
from ...fast.ensemble import FastEnsemble
from ...noise.calls import OwnHooks, copied, without_weight_gradients
from ...noise.copies import with_originals
from ...noise.injection import eval_mode
from ...noise.layer import GaussianNoise, describe_std
from ...noise.own_numbers import OwnNumbers
from ...noise.streams import noise_draw
from ..results import CheckRecord
from .findings import PASSES, differ, failed, not_applicable, passed
from .subject import Subject

_NOISE = {"normal", "randn", "randn_like", "normal_functional", "rand", "rand_like", "uniform", "add_noise"}
_NOISE |= {"unit_noise", "placement"}
_OF_TORCH = set(vars(nn.Module()))
_ROUNDING_OF_COPIES = 0.1  # of the largest logit: twice what `optimize` lets bfloat16 change


def randomness(subject: Subject) -> CheckRecord:
    """A model that ought to be random is, with fresh noise at every call; others are deterministic."""
    outputs = subject.outputs
    distinct = sum(
        all(not torch.equal(one, other) for other in outputs[:index]) for index, one in enumerate(outputs)
    )
    figure = f"{distinct} distinct outputs in {len(outputs)} passes"
    # Layers of level 0 are a network without noise; layers that are off had some.
    noisy = [layer for layer in subject.random_layers if layer.varies]
    off = sum(not layer.is_on for layer in noisy)
    if off:
        advice = "random layers are switched off at test time: leave noise_disabled"
        return failed(f"{off} of {len(noisy)} random layers off", advice)
    if subject.is_random:
        # Places of an image are few, and meet again by chance.
        few = bool(noisy) and not any(layer.is_continuous for layer in noisy)
        if distinct < len(outputs) and not few:
            return failed(figure, "noise repeats: draw it afresh at every call, with no fixed seed")
        if subject.expect_random is False:
            return failed(figure, "the model is random, although it should not be: find the source")
        return passed(figure)
    if subject.random_ops or noisy:
        return failed(
            figure,
            "random numbers are drawn, yet all outputs are equal: the seed never changes, and an attacker "
            "always sees the same noise; draw from fresh entropy",
        )
    if _random_in_training(subject):
        return failed(figure, "the model is random in training mode only: its noise is off at test time")
    if subject.expect_random:
        return failed(figure, "the model should be random, and is not: its noise is off, or frozen")
    return passed(f"{figure}: deterministic")


def _random_in_training(subject: Subject) -> bool:
    """Whether noise other than dropout's (which draws bits) makes the model random in training mode."""
    model = copied(subject.model)  # whose modes are nobody else's
    for module in model.modules():
        usual = isinstance(module, _DropoutNd | _BatchNorm) or "drop" in type(module).__name__.lower()
        module.training = not usual
    with torch.no_grad(), OwnNumbers() as mode:
        model(subject.few.to(subject.device, subject.dtype))
    return bool(mode.names & _NOISE)


def nothing_hidden(subject: Subject) -> CheckRecord:
    """Attacks see what the judge sees: the same randomness with gradients as without, no hidden weights.

    An optimised copy answers as its original does, which attacks ask.
    """
    stray, strangers = _stray_parameters(subject), _hidden_modules(subject.model)
    if stray or strangers:
        return failed(
            f"{stray} parameters and {strangers} modules outside the module tree",
            "register the network as a submodule: eval(), noise layers and devices of what is hidden are "
            "out of reach",
        )
    if (found := _unlike_its_original(subject)) is not None:
        return found
    images = subject.few
    seen = torch.stack(subject.outputs[:PASSES]).float()
    attack = torch.stack([subject.with_gradient(images)[0].detach() for _ in range(PASSES)]).float()
    spread = (seen.std(dim=0), attack.std(dim=0))
    random = [bool((value > 0).any()) for value in spread]
    figure = (
        f"std of outputs {float(spread[0].mean()):.3g} without gradients, {float(spread[1].mean()):.3g} with"
    )
    advice = "attacks see a different model from the judge: it must not check whether gradients are enabled"
    if random[0] != random[1]:
        return failed(f"{figure}: random in only one of the two", advice)
    ratio = float((spread[1] / spread[0].clamp(min=1e-12)).median()) if all(random) else 1.0
    if differ(seen, attack) or not 0.5 < ratio < 2:
        return failed(figure, advice)
    return passed(figure)


def _hidden_modules(model: nn.Module) -> int:
    """Modules kept as plain attributes, in lists, tuples, sets or dicts, and nowhere in the tree."""
    known = {module for network in with_originals(model) for module in network.modules()}
    hidden = set()

    def search(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            if value not in known:
                hidden.add(value)
        elif depth and isinstance(value, list | tuple | set | frozenset):
            for item in value:
                search(item, depth - 1)
        elif depth and isinstance(value, dict):
            search(list(value.values()), depth - 1)

    for module in known:
        for name, value in vars(module).items():
            # What torch itself keeps there: submodules, hooks and tensors.
            if not (name.startswith("_") and name in _OF_TORCH):
                search(value, 3)
    return len(hidden)


def _frozen(model: nn.Module, subject: Subject) -> Tensor:
    """Logits (B, K) of one draw, always of the same noise."""
    with noise_draw(0, 0, "shared"), OwnNumbers(0), torch.no_grad(), eval_mode(model):
        return single_draw(model)(subject.few.to(subject.device)).float()


def _unlike_its_original(subject: Subject) -> CheckRecord | None:
    """A fault where the model is an optimised copy that answers otherwise than its original."""
    copied = subject.model
    if not isinstance(copied, FastEnsemble):
        return None
    try:
        copied.check_original()
    except ValueError as error:
        return failed("it is no copy of its original any more", str(error))
    ours, again, theirs = (_frozen(each, subject) for each in (copied, copied, copied.original))
    if not torch.equal(ours, again):
        return None  # noise that no seed freezes tells nothing
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    if gap <= _ROUNDING_OF_COPIES:
        return None
    return failed(
        f"logits differ from the original's by {gap:.2g} of the largest",
        "attacks ask the original, the judge the copy: optimize the original again, as it is now",
    )


def _stray_parameters(subject: Subject) -> int:
    """Leaves of the outputs' graph that are neither the images nor the model's parameters."""
    known = {id(parameter) for parameter in subject.model.parameters()}
    with without_weight_gradients(subject.model), eval_mode(subject.model), torch.enable_grad():
        leaf = subject.few.detach().to(subject.device, subject.dtype, copy=True).requires_grad_()
        outputs = subject.model(leaf)
    outputs = logits_of(outputs)
    todo, seen, stray = [outputs.grad_fn], set(), 0
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        stray += variable is not None and variable is not leaf and id(variable) not in known
        todo += [following for following, _ in node.next_functions]
    return stray


def _meets(subject: Subject, images: Tensor) -> tuple[GaussianNoise, Tensor] | None:
    """The noise layer that acts first on these images, and what it acts on."""
    order: list[tuple[GaussianNoise, Tensor]] = []
    with OwnHooks() as hooks:
        for layer in subject.noise_layers:
            if layer.is_active:
                hooks.add(layer.register_forward_pre_hook, partial(_note, order))
        subject.once(images)
    return order[0] if order else None


def _note(order: list[tuple[GaussianNoise, Tensor]], layer: GaussianNoise, args: tuple[Tensor, ...]) -> None:
    order.append((layer, args[0].detach()))


def where_noise_enters(subject: Subject) -> CheckRecord:
    """The first noise layer acts on the pixels: on a view of them, padded, scaled and shifted or not."""
    if not any(layer.is_active for layer in subject.noise_layers):
        return not_applicable("there are no noise layers")
    images = subject.few[:2]
    met = _meets(subject, images)
    if met is None:
        return failed("no noise layer is called", "the forward pass goes around the noise")
    layer, arrived = met
    low, high = getattr(subject.model, "bounds", None) or (0.0, 1.0)

    def arrive(probe: Tensor) -> Tensor:
        found = _meets(subject, probe)
        return arrived if found is None else found[1]

    found = pixel_map(arrive, images.cpu(), low, high)
    if found is None or not bool((found.slope != 0).any()):
        return failed(
            f"the first noise does not get an affine map of each pixel, of shape {tuple(arrived.shape)}",
            "no noise acts on the pixels: put some there, or the defense is weaker, its std is not in pixel "
            "units, and nothing can be certified",
        )
    levels = pixel_levels(found, layer.std, images)
    by_channel = levels.transpose(0, 1).flatten(1).amin(dim=1) if levels.dim() > 2 else levels.amin()[None]
    shown = ", ".join(f"{float(value):.3g}" if value < torch.inf else "unknown" for value in by_channel)
    title = f"std {describe_std(layer.std)} at the first noise layer"
    return passed(f"{title}, in [{low:g}, {high:g}] pixels by channel: {shown}")
