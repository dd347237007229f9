"""Random noise: the attack that every other must beat."""

from typing import Unpack

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_count
from .averaging import Noise, NoiseOptions
from .driver import run_attack
from .expectation import Oracle
from .keeper import Keeper
from .losses import margin, of_labels
from .norms import Norm, check_eps, check_norm, per_image, project, random_start, size
from .units import in_own_units


@in_own_units("eps")
def random_noise(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    tries: int = 100,
    early_stop: bool = False,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """The best of `tries` random images at the edge of the ball; no gradients.

    Args:
        tries: random images tried for each image; signs for L-inf, uniform directions for L2 and L1.
        model, inputs, labels, targeted, norm, eps, early_stop, max_batch, noise: see `pgd`.

    Returns:
        (B, C, H, W) in the ball and in [0, 1]; judge them on fresh noise.
    """
    check_norm(norm)
    check_eps(eps, norm, inputs)
    check_count("tries", tries)

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        keep = Keeper(oracle, x, y, targeted)
        best, images = x.new_full((len(x),), -torch.inf), x.clone()
        active = keep.candidates(early_stop)
        for step in range(tries):
            if len(active) == 0:
                break
            start = x[active]
            change = random_start(start, norm, eps, oracle.generator)
            if norm == "linf":
                change = project(eps * change.sign(), norm, eps, start)
            else:
                change *= per_image(eps / size(change, norm).clamp(min=1e-12), change)
                change = project(change, norm, eps, start)
            estimate = oracle.evaluate(start + change, of_labels(margin, y[active], targeted))
            better = estimate.loss > best[active]
            best[active[better]] = estimate.loss[better]
            images[active[better]] = (start + change)[better]
            stay = keep.visit(active, start + change, estimate, stop=early_stop, step=step)
            active = active[stay]
        keep.finish(active, images[active], of_labels(margin, y[active], targeted))
        return keep.best

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)
