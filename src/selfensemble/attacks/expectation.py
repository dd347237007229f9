"""Expectation over noise, shared by all attacks: losses, gradients and answers averaged over draws.

Source: Athalye et al., Synthesizing Robust Adversarial Examples, ICML 2018 (EOT).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from ..ensemble import SelfEnsemble, check_count, check_images, explain_shape, logits_of
from ..inject import eval_mode
from ..noise import fresh_seed, noise_draw, stream_seed

Forward = Callable[[Tensor], Tensor]
Average = Literal["losses", "probabilities"]

_CONFIRM_DRAWS = 10
OTHER_NOISE = 4094  # number of a layer that no network has: noise from torch's global generator


@dataclass(slots=True)
class Budget:
    """What an attack spent: evaluations of one image by one noise draw.

    Attributes:
        gradients: forward and backward passes.
        forwards: forward passes alone.
    """

    gradients: int = 0
    forwards: int = 0


_budgets: ContextVar[tuple[Budget, ...]] = ContextVar("selfensemble_budgets", default=())


@contextmanager
def count_evaluations() -> Iterator[Budget]:
    """Count the evaluations that attacks make within this context."""
    budget = Budget()
    token = _budgets.set((*_budgets.get(), budget))
    try:
        yield budget
    finally:
        _budgets.reset(token)


def spend(gradients: int = 0, forwards: int = 0) -> None:
    """Enter evaluations in every count that is open."""
    for budget in _budgets.get():
        budget.gradients += gradients
        budget.forwards += forwards


class NoiseOptions(TypedDict, total=False):
    """Keyword arguments that every attack takes: the fields of `Noise`."""

    eot: int
    average: Average
    confirm_draws: int | None
    frozen: bool
    seed: int | None


@dataclass(frozen=True, slots=True)
class Noise:
    """How an attack meets the noise of a model.

    Attributes:
        eot: noise draws averaged in a step.
        average: what is averaged, "losses" of single draws, or their "probabilities": the loss is then
            that of the ensemble, `loss(log(mean softmax))`.
        confirm_draws: fresh draws that must confirm a success; None for 10 where two passes differ. Where
            they do not, the model counts as deterministic, and one draw stands for all; set this to
            more than 1 for a model whose randomness is rare.
        frozen: every step meets the same draws, those of `predict(draws=eot, seed=seed)`, and they
            decide about success too. For checking attacks: frozen noise is no defense.
        seed: of the noise and of random starts; None for fresh entropy.
    """

    eot: int = 1
    average: Average = "losses"
    confirm_draws: int | None = None
    frozen: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        check_count("eot", self.eot)
        if self.confirm_draws is not None:
            check_count("confirm_draws", self.confirm_draws)
        if self.average not in get_args(Average):
            raise ValueError(f"average must be one of {', '.join(get_args(Average))}, got {self.average!r}")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Means over the draws of one step.

    Attributes:
        loss: (B,) the expected loss, or the loss of the expectation.
        probabilities: (B, K) mean softmax.
        gradient: of the loss, (B, ...); empty where none was asked for.
    """

    loss: Tensor
    probabilities: Tensor
    gradient: Tensor


class Oracle:
    """A model as an attack sees it: one noise draw at a time, in the memory of one draw.

    Images of a batch share their draws, which leaves each image's expectation as it is.

    Args:
        forward: (B, ...) to logits (B, K) of one noise draw.
        noise: how the attack meets the noise.
        seed: of this oracle's draws.
        is_random: whether two passes can differ.
        classes: K.
        device: of the model; where not the CPU, its global generator counts too.
        reseed: draw noise of torch's global generators from the seed as well (dropout at test time).
    """

    def __init__(
        self,
        forward: Forward,
        noise: Noise,
        *,
        seed: int,
        is_random: bool = True,
        classes: int = 0,
        device: torch.device | None = None,
        reseed: bool = False,
    ) -> None:
        self.noise, self.seed = noise, seed
        self.classes = classes
        self.generator = torch.Generator().manual_seed(stream_seed(seed, 0, 0) & 0x7FFF_FFFF_FFFF_FFFF)
        # Who asks for confirmation by several draws knows of a randomness that two passes do not show.
        is_random = is_random or (noise.confirm_draws or 1) > 1
        self.is_random = is_random and not noise.frozen
        # Frozen noise of torch's global generators is that of a fixed batch.
        self.may_shrink = not (noise.frozen and reseed)
        self.eot = noise.eot if is_random else 1
        self._forward = forward
        self._seed = seed if noise.frozen else stream_seed(seed, 1, 0)
        self._confirm_seed = stream_seed(seed, 2, 0)
        self._drawn = self._confirmed = 0
        self._devices = [device] if device is not None and device.type != "cpu" else []
        self._reseed = reseed

    @property
    def confirm_draws(self) -> int:
        """Fresh draws that confirm a success."""
        if self.noise.confirm_draws is None:
            return _CONFIRM_DRAWS if self.is_random else 1
        return self.noise.confirm_draws

    def _logits(self, inputs: Tensor, seed: int, index: int) -> Tensor:
        with noise_draw(seed, index, "shared"):
            if not self._reseed:
                return self._forward(inputs).float()
            kind = self._devices[0].type if self._devices else "cuda"
            with torch.random.fork_rng(self._devices, device_type=kind):
                torch.manual_seed(stream_seed(seed, index, OTHER_NOISE))
                return self._forward(inputs).float()

    def _indices(self) -> range:
        """Numbers of the draws of the next step."""
        if self.noise.frozen:
            return range(self.eot)
        start = self._drawn
        self._drawn += self.eot
        return range(start, start + self.eot)

    def gradient(self, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Estimate:
        """Gradient of the expected `loss` (logits (B, K) to (B,)) with respect to `inputs`."""
        indices = self._indices()
        over = None
        if self.noise.average == "probabilities" and len(indices) > 1:
            # The draws twice: for the mean, and then each with its share in the gradient of the mean.
            over = self._mean_log(inputs, indices).requires_grad_()
            with torch.enable_grad():
                (outer,) = torch.autograd.grad(loss(over).sum(), over)
        gradient = torch.zeros_like(inputs)
        total, probabilities = inputs.new_zeros(len(inputs), dtype=torch.float32), None
        for index in indices:
            with torch.enable_grad():
                leaf = inputs.detach().requires_grad_()
                logits = self._logits(leaf, self._seed, index)
                drawn = logits.log_softmax(dim=1)
                if over is None:
                    values = loss(logits if self.noise.average == "losses" else drawn)
                else:
                    share = (drawn.detach() - over.detach()).exp() * outer
                    values = (share * drawn).sum(dim=1)
                if not values.requires_grad:
                    raise ValueError(
                        "the model passes no gradient to its inputs (detach, rounding, numpy?): attack it "
                        "with square or random_noise, or put a differentiable approximation in its place"
                    )
                gradient += torch.autograd.grad(values.sum(), leaf, materialize_grads=True)[0]
            total += values.detach()
            softmax = drawn.detach().exp()
            probabilities = softmax if probabilities is None else probabilities + softmax
        spend(gradients=len(inputs) * len(indices))
        assert probabilities is not None
        if over is not None:
            total = loss(over.detach()) * len(indices)
        return Estimate(total / len(indices), probabilities / len(indices), gradient / len(indices))

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Estimate:
        """The expected `loss`, without a gradient."""
        indices = self._indices()
        if self.noise.average == "probabilities":
            over = self._mean_log(inputs, indices)
            return Estimate(loss(over), over.exp(), inputs.new_empty(0))
        each = [self._logits(inputs, self._seed, index) for index in indices]
        spend(forwards=len(inputs) * len(each))
        total = sum((loss(logits) for logits in each), inputs.new_zeros(len(inputs)))
        softmax = torch.stack([logits.softmax(dim=1) for logits in each]).mean(dim=0)
        return Estimate(total / len(each), softmax, inputs.new_empty(0))

    @torch.no_grad()
    def _mean_log(self, inputs: Tensor, indices: range) -> Tensor:
        """Log of the mean softmax (B, K)."""
        over: Tensor | None = None
        for index in indices:
            drawn = self._logits(inputs, self._seed, index).log_softmax(dim=1)
            over = drawn if over is None else torch.logaddexp(over, drawn)
        spend(forwards=len(inputs) * len(indices))
        assert over is not None
        return over - math.log(len(indices))

    @torch.no_grad()
    def lead(self, inputs: Tensor, labels: Tensor, targeted: bool) -> tuple[Tensor, Tensor]:
        """(B,) by how much the attack leads in mean probability on fresh draws, and whether that is sure.

        The lead is `p_j - p_y` for the likeliest j != y (negative where the defender is right), or the
        negative if targeted. It is sure above two standard errors: searches ask often, and the luckiest
        of many answers proves little. Without randomness the answer is sure.
        """
        draws = self.noise.eot if self.noise.frozen else self.confirm_draws
        if self.noise.frozen:
            seed, start = self._seed, 0
        else:
            seed, start = self._confirm_seed, self._confirmed
            self._confirmed += draws
        each = torch.stack(
            [self._logits(inputs, seed, index).softmax(dim=1) for index in range(start, start + draws)]
        )
        spend(forwards=len(inputs) * draws)
        mean = each.mean(dim=0)
        rival = mean.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
        image = torch.arange(len(labels), device=labels.device)
        leads = each[:, image, rival] - each[:, image, labels]
        leads = -leads if targeted else leads
        success, lead = fooled(mean, labels, targeted), leads.mean(dim=0)
        if self.is_random and draws > 1:
            success &= lead > 2 * leads.std(dim=0) / math.sqrt(draws)
        return lead, success

    def confirmed(self, inputs: Tensor, probabilities: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        """(B,) whether `probabilities` of a step claim a success and fresh draws agree."""
        claims = fooled(probabilities, labels, targeted)
        # Without randomness the step's own answer is all there is to know.
        if not claims.any() or not self.is_random:
            return claims
        chosen = claims.nonzero().squeeze(1)
        claims[chosen] = self.lead(inputs[chosen], labels[chosen], targeted)[1]
        return claims


def fooled(probabilities: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """(B,) whether the largest probability is what the attack wants."""
    answers = probabilities.argmax(dim=1)
    return answers == labels if targeted else answers != labels


def single_draw(model: nn.Module) -> Forward:
    """The logits of one noise draw: of an ensemble, a single draw rather than the mean of many.

    Inputs of another floating dtype than the model's are converted on the way, differentiably.
    """
    draw = model.draw_logits if isinstance(model, SelfEnsemble) else lambda x: logits_of(model(x))
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(floating, None)
    return draw if dtype is None else lambda inputs: draw(inputs.to(dtype))


@contextmanager
def attacked(model: nn.Module) -> Iterator[Forward]:
    """The single-draw forward of `model` in eval mode, without gradients of its parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
            yield single_draw(model)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def run_attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    run: Callable[[Oracle, Tensor, Tensor], Tensor],
    noise: Noise,
    max_batch: int | None = None,
) -> Tensor:
    """Check the input, then `run(oracle, images, labels)` on `max_batch` images at a time.

    Returns:
        What `run` returned, clamped into [0, 1], on the device and in the dtype of `inputs`.
    """
    check_batch(inputs, labels)
    if len(inputs) == 0:
        return inputs.clone()
    size = len(inputs) if max_batch is None else check_count("max_batch", max_batch)
    seed = fresh_seed() if noise.seed is None else noise.seed
    device, parts = device_of(model, inputs), []
    with attacked(model) as forward:
        with explain_shape(model, inputs):
            first = inputs[:size].detach().to(device, torch.float32, copy=True)
            classes, is_random, reseed = _probe(model, forward, first)
        if int(labels.max()) >= classes:
            raise ValueError(
                f"labels must be below {classes}, the number of classes; got {int(labels.max())}"
            )
        for number, (x, y) in enumerate(zip(inputs.split(size), labels.split(size), strict=True)):
            own = seed if number == 0 or noise.frozen else stream_seed(seed, number, 1)
            oracle = Oracle(
                forward, noise, seed=own, is_random=is_random, classes=classes, device=device, reseed=reseed
            )
            # In float32, whatever the model computes in: smaller types cannot hold small changes.
            part = run(oracle, x.detach().to(device, torch.float32, copy=True), y.to(device, copy=True))
            parts.append(part.detach().clamp(0.0, 1.0).to(inputs.device, inputs.dtype))
    return torch.cat(parts)


@torch.no_grad()
def _probe(model: nn.Module, forward: Forward, inputs: Tensor) -> tuple[int, bool, bool]:
    """Number of classes, whether two passes differ, and whether they use torch's global generators."""
    before = _global_states(inputs.device)
    first = forward(inputs)
    after = _global_states(inputs.device)
    if not torch.isfinite(first).all():
        raise ValueError("the model returns NaN or infinite logits: mend it before attacking it")
    if looks_like_probabilities(first):
        raise ValueError(
            "the model returns probabilities, and attacks need logits: leave out its final softmax, or wrap "
            "it in a module that returns their logarithm"
        )
    reseed = any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    _restore(before, inputs.device)
    if isinstance(model, SelfEnsemble) and not model.is_random and not reseed:
        return first.shape[1], False, False
    return first.shape[1], reseed or not torch.equal(first, forward(inputs)), reseed


def looks_like_probabilities(outputs: Tensor) -> bool:
    """Whether every row of outputs (B, K) is a distribution."""
    sums = outputs.float().sum(dim=1)
    return bool((outputs >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3))


def _global_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@torch.no_grad()
def mean_probabilities(forward: Forward, inputs: Tensor, draws: int) -> Tensor:
    """Mean softmax (B, K) over fresh noise draws."""
    spend(forwards=len(inputs) * draws)
    return torch.stack([forward(inputs).float().softmax(dim=-1) for _ in range(draws)]).mean(dim=0)


def check_batch(inputs: Tensor, labels: Tensor) -> None:
    """Raise a ValueError or TypeError unless inputs and labels fit each other and the rules."""
    check_images(inputs)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"labels must be int64 of shape ({len(inputs)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if len(labels) and int(labels.min()) < 0:
        raise ValueError("labels must be class numbers >= 0")


def device_of(model: nn.Module, inputs: Tensor) -> torch.device:
    """Where the model lives."""
    return next((parameter.device for parameter in model.parameters()), inputs.device)
