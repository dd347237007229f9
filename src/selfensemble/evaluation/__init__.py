"""Measuring a defense: the judge, runs of protocols, honesty checks, and curves."""

from .curves import CurvePoint, cw_curve
from .honesty import doctor
from .judge import Verdict, judge
from .protocol import Protocol, load_protocol
from .results import Results, read_results
from .runner import Evaluation

__all__ = [
    "CurvePoint",
    "Evaluation",
    "Protocol",
    "Results",
    "Verdict",
    "cw_curve",
    "doctor",
    "judge",
    "load_protocol",
    "read_results",
]
