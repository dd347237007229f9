"""Honesty checks of what the model returns: its mode, outputs and gradients."""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ...attacks.losses import margin
from ...noise.calls import own_modes, switched_on
from ...noise.streams import noise_draw
from ..results import CheckRecord
from .findings import PASSES, ROUNDING, differ, failed, not_applicable, passed, share
from .subject import Subject

_STEP = 0.05  # Euclidean length of the steps that gradients must predict, of images in [0, 1]
_UNDERFLOW = 88.0  # a margin beyond which float32 softmax has no gradient left


def eval_mode_on(subject: Subject) -> CheckRecord:
    """The model and its batch-norm layers are in eval mode."""
    modes = own_modes(subject.model)
    norms = [mode for module, mode in modes if isinstance(module, _BatchNorm)]
    whole, training = modes[0][1], sum(norms)
    figure = f"model in {'training' if whole else 'eval'} mode"
    figure += f", {training} of {len(norms)} batch-norm layers in training mode"
    if on := switched_on(subject.model):
        figure += f", {on} other modules in training mode by themselves"
    if whole or training:
        return failed(figure, "call model.eval(): in training mode answers depend on the batch, and change")
    return passed(figure)


def batch_independence(subject: Subject) -> CheckRecord:
    """An image is answered alike alone and among others (under the same shared noise)."""
    images = subject.few
    if len(images) < 2:
        return not_applicable("needs two images")

    def frozen(x: Tensor) -> Tensor:
        with noise_draw(0, 0, "shared"):
            return subject.once(x)

    together = frozen(images)
    advice = (
        "answers depend on the other images of the batch: batch norm uses batch statistics (call eval(), "
        "or train with track_running_stats), or noise is tied to the place in the batch"
    )
    if not torch.equal(together, frozen(images)):
        # Noise that no seed freezes: the means of many passes have to agree.
        many = torch.stack([subject.once(images) for _ in range(PASSES)]).float()
        each = [torch.cat([subject.once(image[None]) for image in images]) for _ in range(PASSES)]
        figure = f"means of {PASSES} passes"
        return failed(figure, advice) if differ(many, torch.stack(each).float()) else passed(figure)
    alone = torch.cat([frozen(image[None]) for image in images])
    gap = float((together - alone).abs().max() / together.abs().max().clamp(min=1e-12))
    figure = f"largest relative difference {gap:.1e}"
    rounding = 10 * ROUNDING if together.dtype in (torch.float32, torch.float64) else 0.1
    return failed(figure, advice) if gap > rounding else passed(figure)


def input_range(subject: Subject) -> CheckRecord:
    """The model reads images within its bounds: it is not better on [0, 255] or on standardised ones."""
    x, y = subject.all_inputs, subject.all_labels
    dims = [0, *range(2, x.dim())]
    low, high = subject.bounds
    unit, own = (x - low) / subject.width, f"[{low:g}, {high:g}]"
    others = {
        "[0, 1]": unit,
        "[0, 255]": 255 * unit,
        "[-1, 1]": 2 * unit - 1,
        "standardised": (unit - unit.mean(dims, keepdim=True)) / unit.std(dims, keepdim=True).clamp(min=1e-6),
    }
    views = {own: x} | {name: view for name, view in others.items() if name != own}
    found = {name: _right(subject, view, y) for name, view in views.items()}
    figure = ", ".join(f"{100 * value:.1f} % on {name}" for name, value in found.items())
    best = max(found, key=lambda name: found[name])
    if found[best] > found[own] + 0.1:
        return failed(
            figure,
            f"the model expects {best} images: put the scaling into the model, so that eps and std are in "
            f"units of {own} pixels",
        )
    return passed(figure)


def _right(subject: Subject, images: Tensor, labels: Tensor) -> float:
    """Accuracy by the mean softmax of as many draws as an answer has; 0 where the model refuses."""
    draws = range(subject.answer_draws)
    try:
        answers = [
            torch.stack([subject.once(part).float().softmax(dim=1) for _ in draws]).mean(dim=0).argmax(dim=1)
            for part in images.split(subject.max_batch)
        ]
    except (ValueError, TypeError, AssertionError, RuntimeError):
        return 0.0
    return share(torch.cat(answers).cpu() == labels.cpu())


def logits(subject: Subject) -> CheckRecord:
    """Outputs are logits: finite, not probabilities, not rounded, not saturated."""
    outputs = subject.outputs[0]
    if not torch.isfinite(outputs).all():
        return failed("NaN or infinite outputs", "fix the model: no attack can be judged on it")
    if subject.gives_labels:
        return failed(
            "only 0 and 1, one 1 in each row",
            "the outputs are labels (argmax, one-hot), not logits, and have no gradient: return the logits",
        )
    if subject.gives_probabilities:
        return failed("rows sum to 1", "return logits: leave out the final softmax, or take the logarithm")
    many = torch.cat([subject.once(part) for part in subject.all_inputs.split(subject.max_batch)])
    distinct = len(many.flatten().unique())
    best = many.float().topk(min(2, many.shape[1]), dim=1).values
    saturated = share(best[:, 0] - best[:, -1] > _UNDERFLOW)
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


def _cross_entropy(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """As everybody has it, where that of this package's attacks keeps a gradient."""
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return -loss if targeted else loss


def gradients(subject: Subject) -> CheckRecord:
    """Gradients exist, are not zero, and predict what a small step does."""
    images, labels = subject.clean
    # A little inside the box, so that small steps stay in it.
    low, high = subject.bounds
    edge = _STEP * subject.width
    images, labels = images[:32].clamp(low + edge, high - edge), labels[:32].to(subject.device)
    zero = {}
    for name, loss in (("cross-entropy", _cross_entropy), ("margin", margin)):
        outputs, leaf = subject.with_gradient(images)
        if not outputs.requires_grad:
            return failed(
                "none",
                "the outputs do not depend differentiably on the images: attack without gradients "
                "(square), or put an approximation instead of what breaks them",
            )
        (gradient,) = torch.autograd.grad(
            loss(outputs.float(), labels, False).sum(), leaf, materialize_grads=True
        )
        size = gradient.flatten(1).norm(dim=1)
        zero[name] = share((size == 0) | ~size.isfinite())
    figure = "zero: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in zero.items())
    if zero["margin"] > 0.05:
        return failed(figure, "a step in the network has no gradient (rounding, clipping, detach): attack "
                      "without gradients, or replace it by a differentiable approximation")  # fmt: skip
    if zero["cross-entropy"] > 0.05:
        return failed(figure, "the softmax saturates: attack with loss='margin' or 'dlr'")
    wrong = _error_of_prediction(subject, images, labels)
    if wrong is None:
        return passed(figure + "; noise cannot be frozen, so finite differences were not compared")
    figure += f"; median error of the predicted change {100 * wrong:.0f} %"
    if wrong > 0.5:
        return failed(figure, "gradients do not predict what small steps do: they are not the model's own")
    return passed(figure)


def _error_of_prediction(subject: Subject, images: Tensor, labels: Tensor) -> float | None:
    """Median relative error of the change that the gradient predicts for a small step along itself."""

    def value(x: Tensor) -> Tensor:
        with noise_draw(0, 0, "shared"):
            return margin(subject.once(x).float(), labels, False)

    if not torch.equal(value(images), value(images)):
        return None
    with noise_draw(0, 0, "shared"):
        outputs, leaf = subject.with_gradient(images)
        (gradient,) = torch.autograd.grad(margin(outputs.float(), labels, False).sum(), leaf)
    length = gradient.flatten(1).norm(dim=1)
    size = _STEP * subject.width
    step = size * gradient / length.reshape(-1, *[1] * (images.dim() - 1)).clamp(min=1e-12)
    change = value(leaf.detach() + step) - value(leaf.detach() - step)
    predicted = 2 * size * length
    return float(((change - predicted).abs() / predicted.clamp(min=1e-12)).median())
