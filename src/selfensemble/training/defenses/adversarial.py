"""Training on attacked images: Madry et al., SmoothAdv, and RSE with adversarial training.

Which of them it is, the noise levels say: none is adversarial training (Madry et al., ICLR 2018), noise
on the input alone is SmoothAdv (Salman et al., NeurIPS 2019, section 2.2), noise before every
convolution is adversarial training of a Random Self-Ensemble. With noise the attack maximises the loss
of the ensemble, `-log(mean softmax over eot draws)`; every step draws fresh noise, and so does the
training pass (Salman et al. keep one set of draws for all of them).
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from ...attacks import norms
from ...attacks.norms import Norm, ascent, project
from ...ensemble.ensemble import SelfEnsemble
from ...noise.injection import eval_mode
from ...runtime.schema import Count, Positive
from .base import Defense, Networks, logits_in_train_mode, targets


def maximise(
    ensemble: SelfEnsemble,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    norm: Norm,
    eps: float,
    steps: int,
    step_size: float,
    eot: int = 1,
    random_start: bool = True,
    start: float = 1.0,
    projected: bool = True,
) -> Tensor:
    """Projected gradient ascent, with input gradients alone.

    In eval mode, so that attacked images leave batch norm's statistics alone; its randomness is that of
    torch's global generator and of the `noise_draw` it runs in.

    Args:
        ensemble: the network.
        inputs: (B, ...) in the bounds of the ensemble, by default [0, 1].
        loss: (B, K) log-probabilities, of the mean over draws, to a scalar.
        norm, eps: the ball, in the units of the inputs.
        steps, step_size: of the ascent.
        eot: noise draws of one step.
        random_start: begin within the ball rather than at the images.
        start: radius of the ball that starts are drawn from, in `eps`.
        projected: bring each iterate into the ball.

    Returns:
        (B, ...), in the bounds and, where projected, in the ball.
    """
    low, high = ensemble.bounds or (0.0, 1.0)
    scale, given = high - low, inputs
    if scale != 1 or low != 0:  # in units of [0, 1]
        inputs = ((inputs - low) / scale).clamp(0.0, 1.0)
        eps, step_size = eps / scale, step_size / scale
    change = torch.zeros_like(inputs)
    if random_start:
        change = norms.random_start(inputs, norm, start * eps, _global_generator(inputs.device))
    with eval_mode(ensemble):
        draws = eot if eot > 1 and ensemble.varies(inputs) else 1
        for _ in range(steps):
            leaf = (inputs + change).requires_grad_()
            seen = leaf if inputs is given else low + scale * leaf
            each = [ensemble.draw_logits(seen).float().log_softmax(dim=1) for _ in range(draws)]
            over = torch.stack(each).logsumexp(dim=0) - math.log(draws)
            (gradient,) = torch.autograd.grad(loss(over), leaf)
            change = change + ascent(gradient.float(), norm, step_size, inputs + change)
            change = project(change, norm, eps, inputs) if projected else change.clamp(-inputs, 1 - inputs)
    found = (inputs + change).detach()
    return found if inputs is given else (low + scale * found).clamp(low, high)


def _global_generator(device: torch.device) -> torch.Generator:
    """That of the device, where torch shows it."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]  # a tensor's device has one
    return torch.default_generator


class Attacking(Defense):
    """The attack within the training step.

    Attributes:
        norm, eps: the ball.
        steps: gradient steps.
        step_size: by default `2.5 eps / steps`.
        eot: noise draws of one gradient step.
        random_start: begin within the ball rather than at the images. A single step in L2 does better
            without: a random direction uses up the radius.
        start: radius of the ball that random starts are drawn from, in `eps`.
        projected: bring each iterate into the ball. N-FGSM (de Jorge et al., NeurIPS 2022) is one step of
            length `eps` from a start within 2 `eps`, not projected: as good as several steps of PGD.
        least: each image goes a share of the way to its attacked one, uniform between `least` and 1, so
            that training meets distances up to eps rather than eps alone.
    """

    norm: Norm = "linf"
    eps: Positive = 8 / 255
    steps: Count = 7
    step_size: Positive | None = None
    eot: Count = 1
    random_start: bool = True
    start: Positive = 1.0
    projected: bool = True
    least: Annotated[float, Field(ge=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _stays_near(self) -> Self:
        if not self.projected and self.steps > 1:
            raise ValueError("an attack of several steps must be projected: set projected: true, or steps: 1")
        return self

    def attack(self, ensemble: SelfEnsemble, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        step_size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        attacked = maximise(
            ensemble, inputs, loss, norm=self.norm, eps=self.eps, steps=self.steps, step_size=step_size,
            eot=self.eot, random_start=self.random_start, start=self.start, projected=self.projected,
        )  # fmt: skip
        if self.least == 1:
            return attacked
        share = inputs.new_empty(len(inputs), *[1] * (inputs.dim() - 1)).uniform_(self.least, 1)
        return inputs.lerp(attacked, share)

    def attack_labels(self, ensemble: SelfEnsemble, inputs: Tensor, labels: Tensor) -> Tensor:
        """`inputs` attacked by the cross-entropy of their labels."""

        def loss(over: Tensor) -> Tensor:
            return functional.nll_loss(over, targets(labels, over))

        return self.attack(ensemble, inputs, loss)

    def half_attacked(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        """Half the cross-entropy of the images and half that of the attacked ones, in one pass over both."""
        attacked = self.attack_labels(networks.ensemble, inputs, labels)
        logits = logits_in_train_mode(networks, torch.cat([inputs, attacked]))
        labels = targets(labels, logits[: len(inputs)])
        return functional.cross_entropy(logits, labels.repeat(2))


class Adversarial(Attacking):
    """Cross-entropy of attacked images.

    Attributes:
        label_smoothing: share of the label that is spread over all classes.
    """

    name: Literal["adversarial"] = "adversarial"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def shows_images_once(self) -> bool:
        return True

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        attacked = self.attack_labels(networks.ensemble, inputs, labels)
        logits = logits_in_train_mode(networks, attacked)
        return functional.cross_entropy(logits, targets(labels, logits), label_smoothing=self.label_smoothing)


class Trades(Attacking):
    """Cross-entropy of the images, and how far the answer moves under attack (Zhang et al., ICML 2019).

    Attributes:
        beta: weight of the divergence; the paper's 1 / lambda.
    """

    name: Literal["trades"] = "trades"
    steps: Count = 10
    beta: Positive = 6.0

    @model_validator(mode="after")
    def _starts_elsewhere(self) -> Self:
        if not self.random_start:
            raise ValueError("trades needs random_start: at the image the divergence has no gradient")
        return self

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), eval_mode(networks.ensemble):
            answer = networks.ensemble.draw_logits(inputs).float().log_softmax(dim=1)

        def divergence(over: Tensor) -> Tensor:
            return functional.kl_div(over, answer, reduction="batchmean", log_target=True)

        attacked = self.attack(networks.ensemble, inputs, divergence)
        natural, moved = logits_in_train_mode(networks, torch.cat([inputs, attacked])).chunk(2)
        moved_far = functional.kl_div(
            moved.log_softmax(dim=1), natural.log_softmax(dim=1), reduction="batchmean", log_target=True
        )
        return functional.cross_entropy(natural, targets(labels, natural)) + self.beta * moved_far
