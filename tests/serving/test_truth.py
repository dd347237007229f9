"""What the server says of itself, and of whose fault it is, is true."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.serving.app import create_app
from selfensemble.serving.logs import ACCESS, LOG, Writer, begin
from selfensemble.serving.settings import Settings

from .test_server import encoded, png


class Fickle(nn.Module):
    """A network that raises what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.error: BaseException | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        logits: Tensor = self.conv(inputs).mean(dim=(2, 3))
        return torch.where(inputs.mean(dim=(1, 2, 3))[:, None] > 0.9, torch.nan, logits)


ONE: dict[str, Any] = {"images": [encoded(png(torch.zeros(1, 8, 8)))]}


def served(**settings: Any) -> tuple[TestClient, Fickle]:
    network = Fickle()
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.01, 0.0)).eval()
    app = create_app(ensemble, tuple("abcd"), (1, 8, 8), Settings(page=False, **settings))
    return TestClient(app, raise_server_exceptions=False), network


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, for ten seconds at most; what it was waited for is asserted afterwards."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.parametrize("secret", [None, "sixteen characters"])
@pytest.mark.parametrize("error", [ValueError("secret.pt is torn"), RuntimeError("secret.pt is torn")])
def test_a_fault_of_the_network_is_the_servers(
    secret: str | None, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """500 without its text, which is in the log; not ready until a pass succeeds again."""
    session, network = served(secret=secret)
    with session as http:
        assert http.get("/ready").status_code == 200
        network.error = error
        for body in (ONE, ONE | {"certify": {"n": 20}}, ONE | {"decide": {}}):
            answer = http.post("/v1/predict", json=body)
            assert answer.status_code == 500
            assert answer.json() == {"error": "the network failed: see the log of the server"}
        assert "secret.pt is torn" in caplog.text
        network.error = None
        assert http.post("/v1/predict", json=ONE).status_code == 200
        assert http.get("/ready").status_code == 200


def test_ready_is_asked_of_the_network() -> None:
    session, network = served()
    with session as http:
        network.error = RuntimeError("torn")
        assert http.post("/v1/predict", json=ONE).status_code == 500
        unready = http.get("/ready")
        assert (unready.status_code, "the network fails" in unready.json()["error"]) == (503, True)
        assert http.get("/health").status_code == 200  # starting again would not mend it
        network.error = None
        again = http.get("/ready")
        assert again.status_code == 200, again.text


@pytest.mark.parametrize("secret", [None, "sixteen characters"])
def test_a_network_that_returns_no_numbers(secret: str | None) -> None:
    white: dict[str, Any] = {"images": [encoded(png(torch.ones(1, 8, 8)))]}
    session, _ = served(secret=secret)
    with session as http:
        for body in (white, white | {"decide": {}}, white | {"certify": {"n": 20}}):
            answer = http.post("/v1/predict", json=body)
            assert (answer.status_code, "no numbers" in answer.json()["error"]) == (500, True)
        assert http.post("/v1/predict", json=ONE).status_code == 200
        assert http.get("/ready").status_code == 200


def test_a_body_that_no_answer_can_hold_is_refused_in_words() -> None:
    session, _ = served()
    with session as http:
        answer = http.post("/v1/predict", content=b'{"\\ud800": 1, "\\ud800": 2}')
        assert answer.status_code == 422, answer.text


def test_the_last_line_is_written_before_the_end() -> None:
    """A line that the thread has taken, and that a full pipe keeps it from writing."""
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    writer = Writer(writes)
    writer.drain(0.0)  # nothing is left
    line = logging.LogRecord("some", logging.INFO, "", 0, "x" * 2**17, None, None)  # more than a pipe holds
    writer.emit(line)
    until(lambda: writer._lines.empty())
    began = time.monotonic()
    writer.drain(0.2)
    assert time.monotonic() - began > 0.15
    got = b""

    def everything() -> bool:
        nonlocal got
        with suppress(BlockingIOError):
            got += os.read(reads, 2**16)
        return got.endswith(b"\n")

    until(everything)
    writer.drain(10)
    assert got.count(b"x") == 2**17


def test_a_thread_that_has_ended_is_told(caplog: pytest.LogCaptureFixture) -> None:
    session, network = served()
    with session as http:
        network.error = SystemExit(1)
        assert http.post("/v1/predict", json=ONE).status_code == 503
        network.error = None
        assert "the thread that computes has ended" in caplog.text
        until(lambda: http.get("/health").status_code == 503)  # the thread that answered is about to end
        for path in ("/health", "/ready"):
            answer = http.get(path)
            assert (answer.status_code, "start" in answer.json()["error"]) == (503, True)
        assert http.post("/v1/predict", json=ONE).status_code == 503


def test_a_pass_without_end_is_not_ready() -> None:
    session, network = served(timeout=0.2)
    gate = threading.Event()

    def hold(module: nn.Module, args: Any) -> None:
        gate.wait(20)

    network.register_forward_pre_hook(hold)
    gate.set()
    with session as http:
        gate.clear()
        assert http.post("/v1/predict", json=ONE).status_code == 504
        until(lambda: http.get("/ready").status_code == 503)  # the pass began a moment after the request
        answer = http.get("/ready")
        assert (answer.status_code, "longer than 0.2 s" in answer.json()["error"]) == (503, True)
        gate.set()


def test_a_line_for_each_request_with_its_time() -> None:
    """In a file; no query, no line break of a path."""
    read, write = os.pipe()
    names = (LOG.name, "uvicorn")
    before = [(logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names]
    writer = begin(True, write)
    session, _ = served()
    with session as http:
        http.post("/v1/predict", json=ONE)
        http.get("/health?key=hidden")
        http.get("/no%0Athing")
    writer.drain(10)
    ACCESS.disabled = True
    for name, (handlers, propagate) in zip(names, before, strict=True):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
    lines = os.read(read, 65536).decode().splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"
    for line, rest in zip(
        lines, ("POST /v1/predict 200", "GET /health 200", "GET /no%0Athing 404"), strict=True
    ):
        assert re.fullmatch(rf"{time} testclient {re.escape(rest)} \d+\.\d ms", line), line
    os.close(read)
    os.close(write)


def test_a_log_that_nobody_reads_holds_nothing_up() -> None:
    read, write = os.pipe()
    writer = Writer(write)
    logger = logging.Logger("of this test")
    logger.addHandler(writer)
    for number in range(30_000):  # a megabyte and more into 64 kB
        logger.warning("%d %s", number, "x" * 60)
    writer.drain(0.01)
    first = os.read(read, 200).decode().splitlines()[0]
    assert first.endswith("x" * 60)
    os.close(read)  # the writer meets an error, and goes on
