"""Honesty checks that attack the model: does a stronger attack do better, and a weaker one worse?

Accuracies are shares of right answers to three queries of each image, on images that were right without
attack. Two attacks differ when they differ by more than `MARGIN`, or three standard errors of the paired
difference if that is more.
"""

import itertools
import math

import torch
from torch import Tensor

from ...attacks import apgd, pgd, random_noise, square
from ...attacks.masking import NoGradientError
from ...attacks.norms import largest_eps
from ...ensemble.randomness import global_noise, other_seed
from ...noise.injection import noise_disabled
from ...noise.streams import noise_draw
from ..results import CheckRecord
from .findings import failed, not_applicable, passed
from .subject import Subject

MARGIN = 0.05
_LARGE = {"linf": 0.5, "l2": 0.25, "l1": 0.25}  # large eps: a share of the box's diameter


def _large_eps(subject: Subject) -> float:
    return subject.width * _LARGE[subject.norm] * largest_eps(subject.norm, subject.all_inputs[:1].numel())


def _difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean of `one - other`, and what it must exceed to count."""
    paired = one - other
    spread = float(paired.std()) / math.sqrt(len(paired)) if len(paired) > 1 else 0.0
    return float(paired.mean()), max(MARGIN, 3 * spread)


def _share(values: Tensor) -> str:
    return f"{100 * float(values.mean()):.1f} %"


def grows_with_eps(subject: Subject) -> CheckRecord:
    """Accuracy falls as eps grows, and to nothing at a large eps."""
    large = _large_eps(subject)
    most = subject.width * largest_eps(subject.norm, subject.all_inputs[:1].numel())
    radii = sorted({min(eps, most) for eps in (subject.eps / 2, subject.eps, 2 * subject.eps, large)})
    found = [subject.base_line if eps == subject.eps else subject.white_box(eps=eps) for eps in radii]
    figure = ", ".join(f"{_share(value)} at {eps:.3g}" for eps, value in zip(radii, found, strict=True))
    for before, after in itertools.pairwise(found):
        rise, allowed = _difference(after, before)
        if rise > allowed:
            return failed(figure, "accuracy rises with eps: the attack is stuck; look for masked gradients")
    if float(found[-1].mean()) > max(MARGIN, 2 / len(found[-1])):
        return failed(
            figure,
            f"at eps = {radii[-1]:.3g} almost any image is within reach, so accuracy must be near 0: the "
            "attack does not see the model's real gradients",
        )
    return passed(figure)


def frozen_noise_falls(subject: Subject) -> CheckRecord:
    """With its noise frozen the model is deterministic, and plain PGD must break it at a large eps."""
    if not subject.is_random:
        return not_applicable("the model has no randomness to freeze")
    inputs, labels = subject.clean
    large = _large_eps(subject)
    seed = subject.seed
    images = pgd(
        subject.model, inputs, labels, norm=subject.norm, eps=large, steps=subject.steps, restarts=2,  # type: ignore[arg-type]
        seed=seed, frozen=True, max_batch=subject.max_batch, loss="margin",
    )  # fmt: skip
    answers: list[Tensor] = []
    again: list[Tensor] = []
    with torch.no_grad():
        for part in images.split(subject.max_batch):
            for store in (answers, again):
                with noise_draw(seed, 0, subject.sampling), global_noise(other_seed(seed, 0)):
                    store.append(subject.once(part).argmax(dim=1).cpu())
    if not torch.equal(torch.cat(answers), torch.cat(again)):
        return not_applicable("the noise comes from a source that a seed does not freeze")
    right = (torch.cat(answers) == labels.cpu()).double()
    figure = f"{_share(right)} at {large:.3g}"
    if float(right.mean()) > MARGIN:
        return failed(figure, "even frozen noise survives PGD: gradients are masked by something else")
    return passed(figure)


def _twice(subject: Subject, what: str, **settings: int) -> CheckRecord:
    more = subject.white_box(**settings)
    gain, allowed = _difference(subject.base_line, more)
    figure = f"{_share(subject.base_line)}, then {_share(more)}; allowed: {100 * allowed:.1f} points less"
    if gain > allowed:
        return failed(figure, f"the attack still gains: evaluate with more {what}")
    return passed(figure)


def twice_the_steps(subject: Subject) -> CheckRecord:
    """Twice the steps do not help the attack."""
    return _twice(subject, "steps", steps=2 * subject.steps)


def twice_the_restarts(subject: Subject) -> CheckRecord:
    """Twice the restarts do not help the attack."""
    return _twice(subject, "restarts", restarts=4)


def twice_the_draws(subject: Subject) -> CheckRecord:
    """Twice the noise draws a step do not help the attack."""
    if not subject.is_random:
        return not_applicable("the model is deterministic: one draw is all")
    return _twice(subject, "draws a step (eot)", eot=2 * subject.draws)


def _weaker(subject: Subject, other: Tensor, name: str, advice: str) -> CheckRecord:
    gain, allowed = _difference(subject.base_line, other)
    figure = f"white box {_share(subject.base_line)}, {name} {_share(other)}"
    figure += f"; allowed: {100 * allowed:.1f} points less"
    return failed(figure, advice) if gain > allowed else passed(figure)


def random_noise_is_weaker(subject: Subject) -> CheckRecord:
    """Random images of the ball do no more than the white-box attack."""
    eot = 2 if subject.is_random else 1
    found = subject.attack(random_noise, tries=20, eot=eot, early_stop=True)
    return _weaker(subject, found, "random noise", "the gradients mislead: random noise does better")


def transfer_is_weaker(subject: Subject) -> CheckRecord:
    """Images made on the same network without noise do no more than those made on it with noise."""
    if not subject.is_random or not any(layer.varies for layer in subject.random_layers):
        return not_applicable("there are no random layers whose absence makes a static base")
    with noise_disabled(subject.model):
        inputs, labels = subject.clean
        images = apgd(
            subject.model, inputs, labels, norm=subject.norm, eps=subject.eps, loss="dlr",  # type: ignore[arg-type]
            steps=2 * subject.steps, seed=subject.seed, max_batch=subject.max_batch,
        )  # fmt: skip
    found = subject.accuracy(images, 7)
    advice = "the noise hides the gradient: raise eot, or attack the static base and transfer"
    return _weaker(subject, found, "transfer", advice)


def black_box_is_weaker(subject: Subject) -> CheckRecord:
    """The Square Attack, which sees no gradients, does no more than the white-box attack."""
    found = subject.attack(square, queries=300, eot=3 if subject.is_random else 1)
    try:
        subject.base_line  # noqa: B018
    except NoGradientError:
        return failed(
            f"white box not possible, Square {_share(found)}",
            "gradients are masked: the model passes none to its inputs. What Square leaves is an upper bound "
            "from a weak attack: replace what breaks the gradient by a differentiable approximation",
        )
    advice = "gradients are masked: an attack without them does better, so a white-box figure means nothing"
    return _weaker(subject, found, "Square", advice)
