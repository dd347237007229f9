"""Measuring a defense: the judge, and accuracy against the strength of an attack."""

from .curves import CurvePoint, cw_curve
from .judge import Verdict, judge

__all__ = ["CurvePoint", "Verdict", "cw_curve", "judge"]
