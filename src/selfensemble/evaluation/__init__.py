"""Measuring a defense: the judge, runs of protocols, honesty checks."""

from .doctor.examination import doctor
from .judge import Verdict, judge
from .protocol import Protocol, load_protocol
from .results import Results, read_results
from .runner import Evaluation

__all__ = [
    "Evaluation",
    "Protocol",
    "Results",
    "Verdict",
    "doctor",
    "judge",
    "load_protocol",
    "read_results",
]
