"""One server for the tests that leave it as it was; each starts a process that loads PyTorch."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    from .test_server import Server

    running = Server("--precision", "float32")
    yield running
    assert running.stop() == 0
