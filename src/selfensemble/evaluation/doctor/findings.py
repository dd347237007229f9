"""What a check finds, and when two figures count as equal."""

from torch import Tensor

from ..results import CheckRecord

ROUNDING = 1e-3  # relative: two figures closer than this are equal up to rounding
PASSES = 24  # over the same images, where means are compared


def passed(figure: str) -> CheckRecord:
    """A check that found nothing."""
    return CheckRecord(name="", passed=True, figure=figure, advice="")


def failed(figure: str, advice: str) -> CheckRecord:
    """A check that found a fault."""
    return CheckRecord(name="", passed=False, figure=figure, advice=advice)


def not_applicable(reason: str) -> CheckRecord:
    """A check that has no meaning for this model."""
    return CheckRecord(name="", passed=None, figure="", advice=reason)


def share(found: Tensor) -> float:
    """Of the entries (B,) that are true; on the CPU, for not every device has float64."""
    return float(found.cpu().double().mean())


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether the means of outputs (N, B, K) of N passes differ by more than 7 standard errors."""
    error = ((one.var(dim=0) + other.var(dim=0)) / len(one)).sqrt()
    scale = one.abs().amax().clamp(min=1e-12)
    return bool(((one.mean(dim=0) - other.mean(dim=0)).abs() > 7 * error + ROUNDING * scale).any())
