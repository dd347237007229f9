"""Honesty checks that look at the model itself: its mode, outputs, noise and gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ...attacks.losses import cross_entropy, margin
from ...noise.layer import GaussianNoise, describe_std
from ...noise.streams import noise_draw
from ..results import CheckRecord
from .subject import Patient, RandomOps, failed, not_applicable, passed

_FEW = 1e-3  # relative: two figures closer than this are equal up to rounding
_NOISE = {"normal", "randn", "randn_like", "normal_functional", "rand", "rand_like", "uniform", "add_noise"}
_NOISE |= {"unit_noise", "placement"}
_OF_TORCH = set(vars(nn.Module()))
_STEP = 0.05  # Euclidean length of the steps that gradients must predict
_UNDERFLOW = 88.0  # a margin beyond which float32 softmax has no gradient left
_PASSES = 24  # over the same images, where means are compared


def eval_mode_on(patient: Patient) -> CheckRecord:
    """The model and its batch-norm layers are in eval mode."""
    norms = [module for module in patient.model.modules() if isinstance(module, _BatchNorm)]
    training = sum(module.training for module in norms)
    figure = f"model in {'training' if patient.model.training else 'eval'} mode"
    figure += f", {training} of {len(norms)} batch-norm layers in training mode"
    if patient.model.training or training:
        return failed(figure, "call model.eval(): in training mode answers depend on the batch, and change")
    return passed(figure)


def batch_independence(patient: Patient) -> CheckRecord:
    """An image is answered alike alone and among others (under the same shared noise)."""
    images = patient.few
    if len(images) < 2:
        return not_applicable("needs two images")

    def frozen(x: Tensor) -> Tensor:
        with noise_draw(0, 0, "shared"):
            return patient.once(x)

    together = frozen(images)
    advice = (
        "answers depend on the other images of the batch: batch norm uses batch statistics (call eval(), "
        "or train with track_running_stats), or noise is tied to the place in the batch"
    )
    if not torch.equal(together, frozen(images)):
        # Noise that no seed freezes: the means of many passes have to agree.
        many = torch.stack([patient.once(images) for _ in range(_PASSES)]).float()
        each = [torch.cat([patient.once(image[None]) for image in images]) for _ in range(_PASSES)]
        figure = f"means of {_PASSES} passes"
        return failed(figure, advice) if _differ(many, torch.stack(each).float()) else passed(figure)
    alone = torch.cat([frozen(image[None]) for image in images])
    gap = float((together - alone).abs().max() / together.abs().max().clamp(min=1e-12))
    figure = f"largest relative difference {gap:.1e}"
    rounding = 10 * _FEW if together.dtype in (torch.float32, torch.float64) else 0.1
    return failed(figure, advice) if gap > rounding else passed(figure)


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether the means of outputs (N, B, K) of N passes differ by more than 7 standard errors."""
    error = ((one.var(dim=0) + other.var(dim=0)) / len(one)).sqrt()
    scale = one.abs().amax().clamp(min=1e-12)
    return bool(((one.mean(dim=0) - other.mean(dim=0)).abs() > 7 * error + _FEW * scale).any())


def input_range(patient: Patient) -> CheckRecord:
    """The model reads images in [0, 1]: it is not better on [0, 255] or on standardised ones."""
    x, y = patient.all_inputs, patient.all_labels
    dims = [0, *range(2, x.dim())]
    views = {
        "[0, 1]": x,
        "[0, 255]": 255 * x,
        "[-1, 1]": 2 * x - 1,
        "standardised": (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True).clamp(min=1e-6),
    }
    found = {name: _right(patient, view, y) for name, view in views.items()}
    figure = ", ".join(f"{100 * value:.1f} % on {name}" for name, value in found.items())
    best = max(found, key=lambda name: found[name])
    if found[best] > found["[0, 1]"] + 0.1:
        return failed(
            figure,
            f"the model expects {best} images: put the scaling into the model, so that eps and std are in "
            "units of [0, 1] pixels",
        )
    return passed(figure)


def _right(patient: Patient, images: Tensor, labels: Tensor) -> float:
    """Accuracy by the mean softmax of as many draws as an answer has; 0 where the model refuses."""
    draws = range(patient.answer_draws)
    try:
        answers = [
            torch.stack([patient.once(part).float().softmax(dim=1) for _ in draws]).mean(dim=0).argmax(dim=1)
            for part in images.split(patient.max_batch)
        ]
    except (ValueError, TypeError, AssertionError, RuntimeError):
        return 0.0
    return float((torch.cat(answers).cpu() == labels.cpu()).double().mean())


def logits(patient: Patient) -> CheckRecord:
    """Outputs are logits: finite, not probabilities, not rounded, not saturated."""
    outputs = patient.outputs[0]
    if not torch.isfinite(outputs).all():
        return failed("NaN or infinite outputs", "mend the model: no attack can be judged on it")
    if patient.gives_probabilities:
        return failed("rows sum to 1", "return logits: leave out the final softmax, or take the logarithm")
    many = torch.cat([patient.once(part) for part in patient.all_inputs.split(patient.max_batch)])
    distinct = len(many.flatten().unique())
    best = many.float().topk(min(2, many.shape[1]), dim=1).values
    saturated = float((best[:, 0] - best[:, -1] > _UNDERFLOW).double().mean())
    figure = f"{distinct} distinct values of {many.numel()}"
    figure += f", margin above {_UNDERFLOW:g} on {100 * saturated:.1f} % of images"
    wide = many.dtype in (torch.float32, torch.float64)  # others are coarse by themselves
    if wide and distinct < 0.5 * many.numel() and many.numel() >= 40:
        return failed(
            figure, "outputs are quantised or clipped: gradients vanish; attack the values before that"
        )
    if saturated > 0.5:
        return failed(
            figure,
            "outputs are so large that softmax saturates and the cross-entropy has no gradient: divide the "
            "logits, and attack with loss='margin' or 'dlr'",
        )
    return passed(figure)


def randomness(patient: Patient) -> CheckRecord:
    """A model that ought to be random is, with fresh noise at every call; others are deterministic."""
    outputs = patient.outputs
    distinct = sum(
        all(not torch.equal(one, other) for other in outputs[:index]) for index, one in enumerate(outputs)
    )
    figure = f"{distinct} distinct outputs in {len(outputs)} passes"
    # Layers of level 0 are a network without noise; layers that are off had some.
    noisy = [layer for layer in patient.random_layers if layer.varies]
    off = sum(not layer.enabled for layer in noisy)
    if off:
        advice = "random layers are switched off at test time: leave noise_disabled"
        return failed(f"{off} of {len(noisy)} random layers off", advice)
    if patient.is_random:
        # Places of an image are few, and meet again by chance.
        few = bool(noisy) and not any(layer.is_continuous for layer in noisy)
        if distinct < len(outputs) and not few:
            return failed(figure, "noise repeats: draw it afresh at every call, with no fixed seed")
        if patient.expect_random is False:
            return failed(figure, "the model is random, although it should not be: find the source")
        return passed(figure)
    if patient.random_ops or noisy:
        return failed(
            figure,
            "random numbers are drawn, yet all outputs are equal: the seed never changes, and an attacker "
            "meets always the same noise; draw from fresh entropy",
        )
    if _random_in_training(patient):
        return failed(figure, "the model is random in training mode only: its noise is off at test time")
    if patient.expect_random:
        return failed(figure, "the model should be random, and is not: its noise is off, or frozen")
    return passed(f"{figure}: deterministic")


def _random_in_training(patient: Patient) -> bool:
    """Whether noise other than dropout's (which draws bits) makes the model random in training mode."""
    modules = list(patient.model.modules())
    before = [module.training for module in modules]
    try:
        for module in modules:
            usual = isinstance(module, _DropoutNd | _BatchNorm) or "drop" in type(module).__name__.lower()
            module.training = not usual
        with torch.no_grad(), RandomOps() as mode:
            patient.model(patient.few.to(patient.device, patient.dtype))
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
    return bool(mode.names & _NOISE)


def nothing_hidden(patient: Patient) -> CheckRecord:
    """Attacks see what the judge sees: the same randomness with gradients as without, no hidden weights."""
    stray, strangers = _stray_parameters(patient), _hidden_modules(patient.model)
    if stray or strangers:
        return failed(
            f"{stray} parameters and {strangers} modules outside the module tree",
            "register the network as a submodule: eval(), noise layers and devices of what is hidden are "
            "out of reach",
        )
    images = patient.few
    seen = torch.stack(patient.outputs[:_PASSES]).float()
    attack = torch.stack([patient.with_gradient(images)[0].detach() for _ in range(_PASSES)]).float()
    spread = (seen.std(dim=0), attack.std(dim=0))
    random = [bool((value > 0).any()) for value in spread]
    figure = (
        f"std of outputs {float(spread[0].mean()):.3g} without gradients, {float(spread[1].mean()):.3g} with"
    )
    advice = "attacks meet another model than the judge: it must not ask whether gradients are wanted"
    if random[0] != random[1]:
        return failed(f"{figure}: random in only one of the two", advice)
    ratio = float((spread[1] / spread[0].clamp(min=1e-12)).median()) if all(random) else 1.0
    if _differ(seen, attack) or not 0.5 < ratio < 2:
        return failed(figure, advice)
    return passed(figure)


def _hidden_modules(model: nn.Module) -> int:
    """Modules kept as plain attributes, in lists, tuples, sets or dicts, and nowhere in the tree."""
    known, hidden = set(model.modules()), set()

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


def _stray_parameters(patient: Patient) -> int:
    """Leaves of the outputs' graph that are neither the images nor the model's parameters."""
    known = {id(parameter) for parameter in patient.model.parameters()}
    with _trainable(patient.model), torch.enable_grad():
        training = [module for module in patient.model.modules() if module.training]
        patient.model.eval()
        try:
            leaf = patient.few.detach().to(patient.device, patient.dtype, copy=True).requires_grad_()
            outputs = patient.model(leaf)
        finally:
            for module in training:
                module.training = True
    outputs = getattr(outputs, "logits", outputs)
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


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """All parameters without gradients, so that only foreign leaves remain in the graph."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def where_noise_enters(patient: Patient) -> CheckRecord:
    """The first noise layer acts on the pixels, or on a known affine map of them."""
    layers = [layer for layer in patient.noise_layers if layer.is_active]
    if not layers:
        return not_applicable("there are no noise layers")
    order: list[tuple[GaussianNoise, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, layer=layer: order.append((layer, args[0].detach()))
        )
        for layer in layers
    ]
    try:
        patient.once(patient.few)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        return failed("no noise layer is called", "the forward pass goes around the noise")
    layer, met = order[0]
    images = patient.few.to(met.device)
    if met.shape != images.shape:
        return failed(
            f"the first noise meets a tensor of shape {tuple(met.shape)}",
            "no noise acts on the pixels: the defense is weaker there, and nothing can be certified",
        )
    dims = [0, *range(2, images.dim())]
    x, z = images.double(), met.double()
    centred = x - x.mean(dims, keepdim=True)
    slope = (centred * (z - z.mean(dims, keepdim=True))).sum(dims) / centred.square().sum(dims).clamp(
        min=1e-12
    )
    shape = [1, -1, *[1] * (x.dim() - 2)]
    rest = z - z.mean(dims, keepdim=True) - slope.view(shape) * centred
    if float(rest.abs().max()) > 10 * _FEW * float(z.abs().max()):
        return failed(
            "the first noise acts on a nonlinear map of the pixels",
            "noise enters after a preprocessor: its std is not in pixel units; put it on the pixels",
        )
    known = [abs(float(value)) for value in slope]
    stds = [layer.std] * len(known) if isinstance(layer.std, float) else layer.std
    levels = ", ".join(
        f"{std / value:.3g}" if value > 0 else "unknown" for std, value in zip(stds, known, strict=True)
    )
    title = f"std {describe_std(layer.std)} at the first noise layer"
    return passed(f"{title}, in [0, 1] pixels by channel: {levels}")


def gradients(patient: Patient) -> CheckRecord:
    """Gradients exist, are not zero, and predict what a small step does."""
    images, labels = patient.clean
    # A little inside the box, so that small steps stay in it.
    images, labels = images[:32].clamp(_STEP, 1 - _STEP), labels[:32].to(patient.device)
    zero = {}
    for name, loss in (("cross-entropy", cross_entropy), ("margin", margin)):
        outputs, leaf = patient.with_gradient(images)
        if not outputs.requires_grad:
            return failed(
                "none",
                "the outputs do not depend differentiably on the images: attack without gradients "
                "(square), or put an approximation in place of what breaks them",
            )
        (gradient,) = torch.autograd.grad(
            loss(outputs.float(), labels, False).sum(), leaf, materialize_grads=True
        )
        size = gradient.flatten(1).norm(dim=1)
        zero[name] = float(((size == 0) | ~size.isfinite()).double().mean())
    figure = "zero: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in zero.items())
    if zero["margin"] > 0.05:
        return failed(figure, "a step in the network has no gradient (rounding, clipping, detach): attack "
                      "without gradients, or replace it by a differentiable approximation")  # fmt: skip
    if zero["cross-entropy"] > 0.05:
        return failed(figure, "the softmax saturates: attack with loss='margin' or 'dlr'")
    wrong = _error_of_prediction(patient, images, labels)
    if wrong is None:
        return passed(figure + "; noise cannot be frozen, so finite differences were not compared")
    figure += f"; median error of the predicted change {100 * wrong:.0f} %"
    if wrong > 0.5:
        return failed(figure, "gradients do not predict what small steps do: they are not the model's own")
    return passed(figure)


def _error_of_prediction(patient: Patient, images: Tensor, labels: Tensor) -> float | None:
    """Median relative error of the change that the gradient predicts for a small step along itself."""

    def value(x: Tensor) -> Tensor:
        with noise_draw(0, 0, "shared"):
            return margin(patient.once(x).float(), labels, False)

    if not torch.equal(value(images), value(images)):
        return None
    with noise_draw(0, 0, "shared"):
        outputs, leaf = patient.with_gradient(images)
        (gradient,) = torch.autograd.grad(margin(outputs.float(), labels, False).sum(), leaf)
    length = gradient.flatten(1).norm(dim=1)
    step = _STEP * gradient / length.reshape(-1, *[1] * (images.dim() - 1)).clamp(min=1e-12)
    change = value(leaf.detach() + step) - value(leaf.detach() - step)
    predicted = 2 * _STEP * length
    return float(((change - predicted).abs() / predicted.clamp(min=1e-12)).median())
