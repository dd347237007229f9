"""Time, memory and cores are limited for everything that clients do; one server, real sockets."""

import asyncio
import io
import json
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

import selfensemble as rse
from selfensemble.ensemble.stopping import Fixed
from selfensemble.serving.app import create_app
from selfensemble.serving.batching import Batcher
from selfensemble.serving.gate import Gate
from selfensemble.serving.images import TooLargeError, cost_of
from selfensemble.serving.opening import Opener
from selfensemble.serving.service import Service
from selfensemble.serving.settings import Settings
from selfensemble.serving.turns import Turns

from .test_server import CLASSES, Server, encoded, png
from .test_serving import ensemble, images


def flat(side: int) -> bytes:
    """A grey PNG of one colour, small in bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((side + 1) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def digit() -> str:
    return encoded(png(rse.load_data("digits", "test").inputs(slice(1))[0]))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--timeout", "2", "--max-certify", "1000000")
    yield running
    running.stop()


def opened(server: Server, text: str) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(text.encode())
    return connection


def received(connection: socket.socket) -> bytes:
    """All until the server closes the connection."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def test_a_body_that_never_ends_is_refused(server: Server) -> None:
    head = "POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n"
    with opened(server, head + "{") as connection:
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not come within 2 s" in answer


def test_images_that_take_long_to_decode_keep_no_digit_waiting(server: Server, digit: str) -> None:
    """Eight requests of four images of 25 million pixels each; without limits 32 s of work, and 1.8 GB."""
    large = {"images": [encoded(flat(5000))] * 4}

    def ask(body: Any) -> tuple[int, float]:
        began = time.monotonic()
        answer = httpx.post(f"{server.url}/v1/predict", json=body, timeout=60)
        return answer.status_code, time.monotonic() - began

    before = memory(server)
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(ask, large) for _ in range(8)]
        quick = [ask({"images": [digit]}) for _ in range(5)]
        assert {status for status, _ in quick} == {200}
        assert {future.result()[0] for future in slow} <= {200, 504}
    assert memory(server) - before < 700


def memory(server: Server) -> float:
    """The most that was resident so far, in MB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found.group(1)) / 1024


def test_the_pixels_of_a_request_are_limited_together(server: Server) -> None:
    answer = server.client.post("/v1/predict", json={"images": [encoded(flat(5000))] * 9})
    assert (answer.status_code, "225,000,000 pixels together" in answer.json()["error"]) == (413, True)


def test_a_certificate_lets_plain_predictions_pass(server: Server, digit: str) -> None:
    """A million draws take minutes; plain predictions have their turns, and it is given up after 2 s."""
    body = {"images": [digit], "certify": {"n": 1_000_000}}
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(httpx.post, f"{server.url}/v1/predict", json=body, timeout=60)
        plain = []
        while not long.done():
            plain.append(server.client.post("/v1/predict", json={"images": [digit]}).status_code)
    assert long.result().status_code == 504
    assert len(plain) >= 4
    assert set(plain) == {200}


def test_work_whose_client_has_left_ends(server: Server, digit: str) -> None:
    body = json.dumps({"images": [digit] * 64, "draws": 1000})
    head = f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"

    def drawn() -> float:
        found = re.search(r"^selfensemble_passes (\S+)", server.client.get("/metrics").text, re.MULTILINE)
        assert found
        return float(found.group(1))

    before = drawn()
    with opened(server, head + body):
        while drawn() == before:
            pass
    while True:
        now = drawn()
        threading.Event().wait(0.3)
        if drawn() == now:
            break
    assert drawn() - before < 64 * 1000 / 32  # the passes that all would have taken


def test_it_stops_whatever_clients_do(digit: str) -> None:
    """Headers and bodies that never end, an answer that nobody reads, a certificate of a million draws."""
    running = Server("--max-certify", "1000000")
    body = json.dumps({"images": [digit] * 8, "certify": {"n": 1_000_000}})
    asked = [
        "GET /health HTTP/1.1\r\nHo",
        "POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n{",
        f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n{body}",
        "GET /v1/model HTTP/1.1\r\nHost: a\r\n\r\n" * 500,
    ]
    held = [opened(running, text) for text in asked]
    assert running.client.get("/health").status_code == 200
    running.client.close()
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    _, errors = running.process.communicate(timeout=60)
    taken = time.monotonic() - began
    for connection in held:
        connection.close()
    assert running.process.returncode == 0
    assert "Traceback" not in errors
    assert taken < 10


def test_headers_that_never_end_close_the_connection() -> None:
    """In one process, with half a second for headers."""
    import uvicorn

    from selfensemble.serving.connections import Server as Limited
    from selfensemble.serving.connections import configured

    app = create_app(rse.load("digits-rse"), CLASSES, (1, 8, 8), Settings(page=False))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    running: uvicorn.Server = Limited(configured(app, 60.0, 0.5))
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    while not running.started:
        threading.Event().wait(0.02)
    asked = [
        "",
        "GET /health HTTP/1.1\r\nHo",
        "GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /health HTTP/1.1\r\nHo",  # kept alive, then slow
    ]
    for text in asked:
        with socket.create_connection(listener.getsockname(), timeout=20) as connection:
            connection.sendall(text.encode())
            assert received(connection).count(b"alive") == text.count("Host: a")
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_small_images_pass_large_ones() -> None:
    """The thread of the large ones is held; a digit is opened meanwhile, and the large one afterwards."""
    opener = Opener((1, 8, 8), 25_000_000)
    gate = threading.Event()
    opener._large.submit(gate.wait, 30)

    async def both() -> None:
        large = asyncio.ensure_future(opener.open([flat(2000)]))
        small = await opener.open([png(torch.zeros(1, 8, 8))])
        assert not large.done()
        gate.set()
        assert [tuple(each.shape) for each in small + await large] == [(1, 8, 8)] * 2

    asyncio.run(both())
    opener.close()


def test_requests_with_large_images_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They took turns, image by image, so that of many at once none was answered in time."""
    opener, opened = Opener((1, 8, 8), 25_000_000), list[bytes]()
    files = {side: flat(side) for side in (1100, 1200, 1300)}

    def look(data: bytes, shape: tuple[int, int, int], most: int, centre: float) -> torch.Tensor:
        opened.append(data)
        return torch.zeros(shape, dtype=torch.uint8)

    monkeypatch.setattr("selfensemble.serving.opening.open_image", look)

    async def ask() -> None:
        asked = [asyncio.ensure_future(opener.open([file] * 3)) for file in files.values()]
        given_up = asyncio.ensure_future(opener.open([flat(1400)] * 3))
        await asyncio.sleep(0)
        given_up.cancel()  # holds nobody up
        await asyncio.gather(*asked)
        mixed = [files[1100], png(torch.zeros(1, 8, 8)), files[1200]]
        assert len(await opener.open(mixed)) == 3

    asyncio.run(ask())
    opener.close()
    assert opened[:9] == [file for file in files.values() for _ in range(3)]


def test_the_scans_of_a_jpeg_count() -> None:
    file = io.BytesIO()
    Image.new("L", (1000, 1000)).save(file, "JPEG", progressive=True)
    plain = file.getvalue()
    assert cost_of(plain, 10**6) == 10**6
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    bomb = plain[:-2] + scan * 2000 + plain[-2:]
    assert len(bomb) < 2**20
    with pytest.raises(TooLargeError, match="scans"):
        cost_of(bomb, 25_000_000)


def test_a_turn_goes_to_who_waited_longest() -> None:
    turns, order = Turns(), []
    ready = [threading.Event() for _ in range(3)]

    def ask(number: int) -> None:
        ready[number].set()
        with turns:
            order.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            ready[number].wait(10)
            while len(turns._waiting) <= number:
                pass
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2]


def test_nobody_computes_what_was_given_up() -> None:
    """Of images that are being answered, of those in the queue, and of a job in the middle of its draws."""
    model, probe = ensemble(0.5)
    with Batcher(model, images(1), most_waiting=4) as batcher:
        probe.gate.clear()
        probe.started.clear()
        active = batcher.submit(images(1), Fixed(10**6))
        probe.started.wait(20)
        queued = batcher.submit(images(4), Fixed(10**6))
        job = batcher.run(lambda: model.predict(images(1), draws=10**6), long=True)
        for future in (*active, *queued):
            assert future.cancel()
        (last,) = batcher.submit(images(1), Fixed(5))  # there is room again
        probe.gate.set()
        assert last.result(20).draws == 5
        done = batcher.passes
        assert job.cancel()
    # Closing waited for what was left: without cancelling, for hours.
    assert batcher.passes - done <= 1
    with pytest.raises(CancelledError):
        job.result(0)


def test_jobs_and_images_take_turns() -> None:
    """While a job draws for ever, images are answered; its own draws are those that it would have alone."""
    model, _ = ensemble(0.5)
    alone = model.predict(images(2), draws=50, seed=3).probabilities
    with Batcher(model, images(1)) as batcher:
        endless: Future[Any] = batcher.run(lambda: model.predict(images(1), draws=10**8), long=True)
        answers = [future.result(20).draws for future in batcher.submit(images(3), Fixed(40))]
        beside = batcher.run(lambda: model.predict(images(2), draws=50, seed=3).probabilities).result(20)
        assert answers == [40] * 3
        assert torch.equal(beside, alone)
        assert not endless.done()
        endless.cancel()


def test_bodies_that_are_held_are_limited() -> None:
    """Seventeen bodies, each as large as may be and without its last byte: the last is refused."""
    settings = Settings(max_body=1000, timeout=5)
    service = Service(rse.load("digits-rse"), CLASSES, (1, 8, 8), settings)
    statuses: list[int] = []

    async def ask(gate: Gate, left: asyncio.Event) -> None:
        parts = [{"type": "http.request", "body": bytes(1000), "more_body": True}]

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                left.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
        await gate(scope, receive, send)

    async def all_of_them() -> None:
        gate, left = Gate(FastAPI(), settings, service), asyncio.Event()
        await asyncio.gather(*(ask(gate, left) for _ in range(17)))
        assert gate._held == 0

    asyncio.run(all_of_them())
    assert statuses == [503]
