"""Accuracy against the strength c of the C&W attack, the paper's figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..attacks import cw_l2_paper
from ..noise import noise_draw, stream_seed
from .judge import Verdict, judge

# The strengths of the authors' curves.
PAPER_STRENGTHS = (
    0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.0, 2.0, 3.0, 4.0, 7.0, 10.0, 30.0, 70.0, 100.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One strength of the attack, with the attacked images and the verdict on them."""

    c: float
    adversarial: Tensor
    verdict: Verdict

    def record(self) -> dict[str, float]:
        """The figures of this point, as they stand in results files."""
        low, high = self.verdict.interval
        return {
            "c": self.c,
            "accuracy": self.verdict.accuracy,
            "low": low,
            "high": high,
            "rms_l2": self.verdict.rms_l2,
            "median_l2": float(self.verdict.l2.median()),
            "images": len(self.verdict.correct),
        }


def cw_curve(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    strengths: Sequence[float] = PAPER_STRENGTHS,
    *,
    steps: int = 300,
    lr: float = 1e-3,
    draws: int | None = None,
    seed: int | None = None,
    max_batch: int | None = None,
    progress: Callable[[CurvePoint], None] | None = None,
) -> list[CurvePoint]:
    """Attack all images with `cw_l2_paper` at each strength and judge them; c = 0 is no attack.

    Args:
        model, inputs, labels: see `cw_l2_paper`; untargeted.
        strengths: values of c.
        steps, lr: of the attack.
        draws: of the judge.
        seed: of the noise of attack and judge, which have separate streams; None for fresh entropy.
        max_batch: images at a time.
        progress: called with each point when it is done.
    """
    points: list[CurvePoint] = []
    for c in strengths:
        adversarial = inputs
        if c != 0:
            with noise_draw(None if seed is None else stream_seed(seed, len(points), 0)):
                adversarial = cw_l2_paper(model, inputs, labels, c=c, steps=steps, lr=lr, max_batch=max_batch)
        verdict = judge(
            model,
            inputs,
            adversarial,
            labels,
            draws=draws,
            seed=None if seed is None else stream_seed(seed, len(points), 1),
            max_batch=max_batch,
        )
        points.append(CurvePoint(c, adversarial, verdict))
        if progress is not None:
            progress(points[-1])
    return points
