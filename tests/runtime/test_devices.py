"""Devices by their names, and where figures come from."""

from importlib import metadata

import pytest
import torch

from selfensemble.runtime.devices import device_named
from selfensemble.runtime.errors import InputError
from selfensemble.runtime.provenance import provenance


def test_auto_is_an_accelerator_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that torch was only built for: the wheels with CUDA run on machines without."""

    def built_for(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    assert device_named("auto") == torch.device("cpu")
    with pytest.raises(InputError, match=r"no device 'abacus' here.* pass one of cpu$"):
        device_named("abacus")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its source is on the path: results are written all the same."""
    real = metadata.version

    def version(package: str) -> str:
        if package == "selfensemble":
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(metadata, "version", version)
    versions = provenance()["versions"]
    assert versions["selfensemble"] == "unknown"
    assert versions["torch"] == torch.__version__
