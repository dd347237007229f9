"""The callback of Lightning: `from selfensemble.lightning import RandomSelfEnsemble`."""

from .training.lightning import RandomSelfEnsemble

__all__ = ["RandomSelfEnsemble"]
