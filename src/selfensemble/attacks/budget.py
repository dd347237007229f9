"""What attacks spend, counted in evaluations of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


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
