"""AutoAttack's two ensembles of attacks.

Source: Croce & Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks, ICML 2020: versions "rand" and "standard".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from .apgd import apgd, apgd_targeted
from .averaging import Noise, NoiseOptions
from .driver import run_attack
from .expectation import Oracle
from .fab import fab
from .keeper import Keeper
from .losses import margin, of_labels
from .norms import Norm, check_eps, check_norm, project
from .square import square
from .units import in_own_units

_robust: ContextVar[list[Tensor] | None] = ContextVar("selfensemble_published_rule", default=None)


@contextmanager
def published_rule() -> Iterator[list[Tensor]]:
    """Collect what the published code would call robust, batch by batch of the calls within this context.

    There one forward pass decides: an image is robust if a single draw classifies it correctly without
    attack, and another draw after each part. For a random model that counts lucky draws as successes, so the
    verdict can lie below what the same images leave when they are judged again.

    Yields:
        A list to which every batch adds its (B,) bool.
    """
    found: list[Tensor] = []
    token = _robust.set(found)
    try:
        yield found
    finally:
        _robust.reset(token)


@in_own_units("eps")
def autoattack_rand(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    steps: int = 100,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """APGD on the cross-entropy, then on DLR, 100 steps each, 1 restart, rho 0.75, `eot=20` by default.

    Unlike the published code, means over all draws accept iterates and set step sizes (there: the last
    draw), and a success must be confirmed on fresh draws (there: one forward pass). L1 has the same one
    restart as the other norms (there: five, over larger radii first).

    Args:
        model, inputs, labels, targeted, norm, eps, max_batch, noise: see `pgd`.
        steps: of each part.

    Returns:
        (B, C, H, W) in the ball and in [0, 1]; judge them on fresh noise.
    """
    options: NoiseOptions = {"eot": 20, **noise}
    parts: list[Callable[..., Tensor]] = [
        lambda *args, **more: apgd(*args, targeted=targeted, steps=steps, loss="ce", **more),
        lambda *args, **more: apgd(*args, targeted=targeted, steps=steps, loss="dlr", **more),
    ]
    return _in_turn(model, inputs, labels, parts, targeted, norm, eps, max_batch, options)


@in_own_units("eps")
def autoattack_standard(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    steps: int = 100,
    queries: int = 5000,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """APGD-CE, APGD-T, FAB-T (9 targets each) and Square, for deterministic models.

    For random ones use `autoattack_rand`; this one runs on them too, with `eot` draws a step.

    Args:
        model, inputs, labels, norm, eps, max_batch, noise: see `pgd`; `targeted=True` is refused.
        steps: of each run of APGD and FAB.
        queries: of Square.
    """
    if targeted:
        raise ValueError("autoattack_standard takes true labels; to reach wanted ones use autoattack_rand")
    parts: list[Callable[..., Tensor]] = [
        lambda *args, **more: apgd(*args, steps=steps, loss="ce", **more),
        lambda *args, **more: apgd_targeted(*args, steps=steps, targets=9, **more),
        lambda *args, early_stop, **more: fab(*args, steps=steps, targets=9, **more),
        lambda *args, **more: square(*args, queries=queries, **more),
    ]
    return _in_turn(model, inputs, labels, parts, False, norm, eps, max_batch, noise)


def _in_turn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    parts: list[Callable[..., Tensor]],
    targeted: bool,
    norm: Norm,
    eps: float,
    max_batch: int | None,
    noise: NoiseOptions,
) -> Tensor:
    """Each part on the images that the earlier ones left; of failures, the one nearest to success."""
    check_norm(norm)
    check_eps(eps, norm, inputs)

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        keep = Keeper(oracle, x, y, targeted)
        verdicts = _robust.get()
        if verdicts is not None:
            robust = oracle.answers(x) == y
            verdicts.append(robust)
        for part in parts:
            left = keep.candidates(early_stop=True)
            if len(left) == 0:
                break
            fresh = int(torch.randint(2**62, (), generator=oracle.generator, device="cpu"))
            seed = oracle.seed if oracle.noise.frozen else fresh
            options: dict[str, Any] = {**noise, "seed": seed}
            images = part(model, x[left], y[left], norm=norm, eps=eps, early_stop=True, **options)
            # FAB looks for the nearest image, wherever that is.
            images = x[left] + project(images - x[left], norm, eps, x[left])
            if verdicts is not None:
                robust[left] &= oracle.answers(images) == y[left]
            keep.finish(left, images, of_labels(margin, y[left], targeted))
        return keep.best

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)
