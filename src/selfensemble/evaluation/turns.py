"""Attacks in turn: each sees the images that no earlier one within its ball surely fools."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .protocol import Run
from .shards import CLEAN, Judged, Plan, encloses, leading

# Lead in mean probability, of at least 30 draws (3 queries of 10): some four standard errors.
SURE = 0.2


@dataclass(frozen=True, slots=True)
class Left:
    """What the earlier attacks left of B images.

    Attributes:
        open: (B,) bool, images that none of them surely fools.
        best: (B, ...) of each image the version that leads most.
    """

    open: Tensor
    best: Tensor


def earlier(plans: Sequence[Plan], runs: Sequence[Run], run: Run, pixels: int) -> list[str]:
    """Keys of the entries before `run` whose ball lies within its smallest, and of that without attack."""
    if run.norm is None or not run.radii:
        return [CLEAN]
    before = runs[: runs.index(run)]
    return [CLEAN] + [
        plan.key
        for plan in plans
        if plan.run in before
        and plan.norm is not None
        and plan.eps is not None
        and encloses(run.norm, min(run.radii), plan.norm, plan.eps, pixels)
    ]


def left_over(members: Sequence[Judged], labels: Tensor, seeds: int) -> Left:
    """What the members leave: who has `seeds` wrong answers and a lead of `SURE` need go no further."""
    leads = torch.stack([member.lead for member in members])
    wrong = torch.stack([(member.answers[:, :seeds] != labels[:, None]).all(dim=1) for member in members])
    return Left(~(wrong & (leads >= SURE)).any(dim=0), leading(members))
