"""Packages that only some of the library needs: extras, and libraries of others."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingPackage


@contextmanager
def needs(wanted: str) -> Iterator[None]:
    """Around imports of optional packages.

    Args:
        wanted: what to install, as pip reads it: "selfensemble[train]", "timm".

    Raises:
        MissingPackage: one of them is not installed; the message is the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or wanted).partition(".")[0]
        raise MissingPackage(f"{package} is not installed: pip install '{wanted}'") from error
