"""What an evaluation does about a model that passes no gradient to its inputs.

Attacks that need gradients are recorded as impossible. At each radius where one was planned and no Square
Attack is, Square takes its place: without it nothing would be measured there, and that is no robustness.
Where gradients exist and are zero (rounding), Square is added to them: such attacks run, and find nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..attacks import ATTACKS
from ..attacks.driver import device_of, single_draw
from ..attacks.losses import cross_entropy, margin
from ..attacks.masking import NEED_NO_GRADIENT, NoGradientError
from ..attacks.units import bounds_of
from ..noise.injection import noise_disabled
from .protocol import Protocol, Run
from .results import Impossible

_SQUARE = {"queries": 500, "eot": 5}  # as `honest` has it


@dataclass
class Planned:
    """What is left of a protocol.

    Attributes:
        runs: attacks that can be made, Square among them where it was added.
        impossible: the others.
    """

    runs: list[Run]
    impossible: list[Impossible] = field(default_factory=list)


def possible(
    protocol: Protocol, runs: Sequence[Run], models: Sequence[nn.Module], inputs: Tensor, labels: Tensor
) -> Planned:
    """The attacks of a protocol that can be made on a model.

    Args:
        protocol: whose runs they are.
        runs: all of them.
        models: what is attacked, last, and others whose noise is off where it is attacked without noise.
        inputs, labels: a few images.

    Raises:
        ValueError: none of them can be made, and no radius is known at which Square could take their place.
    """
    reasons = {base: _reason(models, inputs, labels, base) for base in {run.surrogate for run in runs}}
    blocked = [run for run in runs if run.attack not in NEED_NO_GRADIENT and reasons[run.surrogate]]
    if not blocked:
        needing = [run for run in runs if run.attack not in NEED_NO_GRADIENT and run.surrogate is None]
        zero = needing and _is_flat(models[-1], inputs, labels)
        return Planned([*runs, *_square(needing if zero else [], runs, len(protocol.attacks))])
    left = [run for run in runs if run not in blocked]
    left += _square(blocked, left, len(protocol.attacks))
    if not left:
        raise ValueError(
            f"{reasons[blocked[0].surrogate]}. Every attack of protocol {protocol.name} needs gradients: "
            "take a protocol with attacks that need none, --protocol honest (for digits, demo-honest)"
        )
    return Planned(left, [each for run in blocked for each in _records(run, reasons[run.surrogate])])


def _reason(models: Sequence[nn.Module], inputs: Tensor, labels: Tensor, base: str | None) -> str:
    """Why no attack can follow gradients; empty where attacks can."""
    low, high = bounds_of(models[-1])
    with ExitStack() as without:
        for model in models if base is not None else ():
            without.enter_context(noise_disabled(model))
        try:
            ATTACKS["pgd"](models[-1], inputs[:1], labels[:1], eps=0.01 * (high - low), steps=1, seed=0)
        except NoGradientError as error:
            return str(error).partition(":")[0]
    return ""


def _is_flat(model: nn.Module, inputs: Tensor, labels: Tensor) -> bool:
    """Whether of most images every pixel's gradient is zero, by the cross-entropy and by the margin."""
    device = device_of(model, inputs)
    inputs, labels = inputs.to(device), labels.to(device)
    some = torch.zeros(len(inputs), device=device, dtype=torch.bool)
    for loss in (cross_entropy, margin):
        images = inputs.detach().clone().requires_grad_()
        with torch.enable_grad():
            losses = loss(single_draw(model)(images).float(), labels, False)
        some |= (torch.autograd.grad(losses.sum(), images)[0].flatten(1) != 0).any(dim=1)
    return 2 * int(some.sum()) < len(some)


def _square(blocked: Sequence[Run], left: Sequence[Run], number: int) -> Iterator[Run]:
    """A Square Attack for each threat model that has lost attacks and has none."""
    has = {(run.norm, eps) for run in left if run.attack == "square" for eps in run.radii}
    for run in blocked:
        for eps in run.radii:
            if run.norm is None or (run.norm, eps) in has:
                continue
            has.add((run.norm, eps))
            settings = {"norm": run.norm, "eps": eps} | _SQUARE
            title = "Square (added: gradients are masked)"
            yield Run(
                f"{number:02d}-{len(has):02d}-square", title, "square", None, settings, run.norm, (eps,)
            )


def _records(run: Run, reason: str) -> Iterator[Impossible]:
    for eps in run.radii or (None,):
        yield Impossible(title=run.title, attack=run.attack, norm=run.norm, eps=eps, reason=reason)
