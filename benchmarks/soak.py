"""The server under load: malformed requests among good ones, killed twice, unable to write to a disk.

    python benchmarks/soak.py [--requests 20000] [--clients 16] [--disturbed [--alone FILE]] [--out FOLDER]

A supervisor restarts the server when it dies, as systemd would; it runs with a file size limit of 4 kB, as
on a disk that is full. Clients repeat what the connection lost. Images are those whose label 200 draws
agree on, so that each answer is known. Milliseconds are those of plain predictions, an image as JSON. With
`--disturbed` others beside them hold connections whose headers or bodies never end, leave in the middle of
certificates, and send images that are as large as may be. It ends with an error if an answer is wrong or
missing, a malformed request is not refused with a reason, memory grows, or the server takes ten seconds to
stop. `--alone` names the `soak.json` of a run of the same size without `--disturbed`: the 99th percentile of
the disturbed run may be at most twice as long as there.
"""

import asyncio
import base64
import io
import json
import random
import resource
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from timing import arguments, parsed, report, settings

import selfensemble as rse

_MOST_DISTURBED = 2  # times as long may plain predictions take that others disturb, 99 % of them
_KILLED_AT = (8, 4)  # after these parts of the requests
MODEL = "digits-rse"
MALFORMED = 0.05


def known_images() -> list[tuple[bytes, str]]:
    """PNG files and labels that do not depend on the noise of ten draws."""
    data = rse.load_data("digits", "test")
    answer = rse.load(MODEL).predict(data.inputs(), draws=200, seed=0)
    best = answer.probabilities.topk(2).values
    sure = ((best[:, 0] - best[:, 1]) > 0.6).nonzero().squeeze(1).tolist()
    found = []
    for place in sure[:100]:
        buffer = io.BytesIO()
        Image.fromarray(data.images[place, 0].numpy()).save(buffer, "PNG")
        found.append((buffer.getvalue(), str(int(answer.label[place]))))
    return found


def large(image: bytes) -> bytes:
    """The same image in a file of several MB, which a form would be spooled to a disk for."""
    with Image.open(io.BytesIO(image)) as small:
        buffer = io.BytesIO()
        small.resize((1600, 1600), Image.Resampling.NEAREST).save(buffer, "BMP")
    return buffer.getvalue()


class Supervisor:
    """Starts the server, and again when it has died."""

    def __init__(self, arguments: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [
            sys.executable,
            "-m",
            "selfensemble",
            "serve",
            MODEL,
            "--port",
            str(self.port),
            *arguments,
        ]
        self.starts = 0
        self.ending = False
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        return subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        )

    async def watch(self) -> None:
        while not self.ending:
            if self.process.poll() is not None:
                self.process = self._start()
            await asyncio.sleep(0.2)

    def memory(self) -> float:
        """Resident MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0


def malformed(chance: random.Random) -> dict[str, Any]:
    """A request that must be refused, as arguments of httpx."""
    return chance.choice(
        [
            {"content": b"{", "headers": {"Content-Type": "application/json"}},
            {"json": {"images": []}},
            {"json": {"images": ["not base64!"]}},
            {"json": {"images": [base64.b64encode(chance.randbytes(200)).decode()]}},
            {"json": {"images": ["AAAA"], "draws": -1}},
            {"json": {"images": ["AAAA"], "unknown": True}},
            {"json": {"images": ["AAAA"] * 1000}},
            {"content": bytes(20 * 2**20), "headers": {"Content-Type": "application/json"}},
        ]
    )


async def disturb(number: int, port: int, stop: asyncio.Event) -> None:
    """One client that is slow, or leaves, or asks for much; again and again."""
    file, digit = io.BytesIO(), io.BytesIO()
    Image.new("L", (5000, 5000)).save(file, "PNG")
    Image.new("L", (8, 8)).save(digit, "PNG")
    large, small = (base64.b64encode(each.getvalue()).decode() for each in (file, digit))
    long = json.dumps({"images": [small], "certify": {"n": 10_000}})
    asked, held = [
        ("GET /health HTTP/1.1\r\nHo", 20.0),
        ("POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n{", 40.0),
        (f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(long)}\r\n\r\n{long}", 0.2),
        (f'POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(large) + 15}\r\n\r\n'
         f'{{"images": ["{large}"]}}', 5.0),
    ][number % 4]  # fmt: skip
    while not stop.is_set():
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # between two servers
            await asyncio.sleep(0.2)
            continue
        try:
            writer.write(asked.encode())
            async with asyncio.timeout(held):
                await reader.read()
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()


async def client(
    number: int, base: str, work: asyncio.Queue[int], images: list[tuple[bytes, str]],
    counts: Counter[str], latencies: dict[str, list[float]],
) -> None:  # fmt: skip
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=base, timeout=60) as session:
        while True:
            try:
                place = work.get_nowait()
            except asyncio.QueueEmpty:
                return
            image, label = images[place % len(images)]
            wrong = chance.random() < MALFORMED
            form = chance.random() < 0.1
            while True:
                began = time.perf_counter()
                try:
                    if wrong:
                        reply = await session.post("/v1/predict", **malformed(chance))
                    elif form:
                        file = large(image) if chance.random() < 0.1 else image
                        reply = await session.post("/v1/predict/files", files={"images": ("a", file)})
                    else:
                        body = {"images": [base64.b64encode(image).decode()]}
                        reply = await session.post("/v1/predict", json=body)
                except httpx.TransportError as error:
                    counts[f"connections lost ({type(error).__name__})"] += 1
                    await asyncio.sleep(0.2)
                    continue
                if reply.status_code in (429, 503):
                    counts["asked to come back"] += 1
                    await asyncio.sleep(float(reply.headers.get("Retry-After", 1)))
                    continue
                break
            kind = "malformed" if wrong else "form" if form else "plain"
            latencies[kind].append(time.perf_counter() - began)
            if wrong:
                refused = reply.status_code in (413, 422) and bool(reply.json().get("error"))
                counts["refused" if refused else "malformed, not refused"] += 1
            elif reply.status_code == 200 and reply.json()["images"][0]["label"] == label:
                counts["right"] += 1
            else:
                counts["wrong or failed"] += 1
                print(reply.status_code, reply.text[:200], "wanted", label)


async def soak(options: Any) -> dict[str, Any]:
    images = known_images()
    supervisor = Supervisor([])
    base = f"http://127.0.0.1:{supervisor.port}"
    counts: Counter[str] = Counter()
    latencies: dict[str, list[float]] = {"plain": [], "form": [], "malformed": []}
    memory: list[tuple[int, float]] = []
    watching = asyncio.create_task(supervisor.watch())
    work: asyncio.Queue[int] = asyncio.Queue()
    for place in range(options.requests):
        work.put_nowait(place)
    began = time.perf_counter()
    clients = [
        asyncio.create_task(client(number, base, work, images, counts, latencies))
        for number in range(options.clients)
    ]
    stop = asyncio.Event()
    others = [
        asyncio.create_task(disturb(number, supervisor.port, stop)) for number in range(8 * options.disturbed)
    ]
    kills = [options.requests // share for share in _KILLED_AT]
    while not all(task.done() for task in clients):
        await asyncio.sleep(0.5)
        done = sum(map(len, latencies.values()))
        if kills and done >= kills[0]:
            kills.pop(0)
            supervisor.process.kill()
            await asyncio.sleep(1)
        elif not kills and supervisor.process.poll() is None:
            memory.append((done, supervisor.memory()))
    await asyncio.gather(*clients)
    seconds = time.perf_counter() - began
    supervisor.ending = True
    await watching
    began_stop = time.perf_counter()
    supervisor.process.terminate()
    status = await asyncio.to_thread(supervisor.process.wait, 60)
    stopped = time.perf_counter() - began_stop
    stop.set()
    for each in others:
        each.cancel()
    errors = (supervisor.process.stderr.read() if supervisor.process.stderr else b"").decode()
    # From when the last server has warmed up.
    warm = [megabytes for done, megabytes in memory if done > options.requests * 0.4] or [0.0]
    quarter = max(1, len(warm) // 4)
    first, last = (sum(part) / len(part) for part in (warm[:quarter], warm[-quarter:]))
    plain = sorted(latencies["plain"])
    return {
        "counts": dict(counts), "starts": supervisor.starts, "exit status": status, "stderr": errors[-2000:],
        "seconds to stop": stopped, "seconds": seconds, "requests a second": options.requests / seconds,
        "p50 ms": 1000 * plain[len(plain) // 2], "p99 ms": 1000 * plain[int(len(plain) * 0.99)],
        "memory MB": {
            "first quarter": first, "last quarter": last, "growth": last / max(first, 1.0) - 1,
            "after requests": dict(memory[:: max(1, len(memory) // 60)]),
        },
    }  # fmt: skip


def faults_of(found: dict[str, Any], requests: int, alone: dict[str, Any] | None) -> dict[str, int]:
    """How often what must not happen did happen.

    Args:
        found: the figures of a run.
        requests: that were sent.
        alone: the figures of a run that nobody disturbed, for one that was.
    """
    counts = found["counts"]
    answered = ("right", "refused", "wrong or failed", "malformed, not refused")
    return {
        "wrong or failed answers": counts.get("wrong or failed", 0),
        "malformed requests that were not refused": counts.get("malformed, not refused", 0),
        "requests without an answer": requests - sum(counts.get(key, 0) for key in answered),
        "exit status": found["exit status"],
        "starts of the server beside the first and those after the kills": abs(
            found["starts"] - 1 - len(_KILLED_AT)
        ),
        "no memory measured": int(not found["memory MB"]["after requests"]),
        "a stop that takes 10 s or more": int(found["seconds to stop"] >= 10),
        "memory that grows": int(found["memory MB"]["growth"] > 0.05),
        "a 99th percentile more than twice that of the run alone": int(
            alone is not None and found["p99 ms"] > _MOST_DISTURBED * alone["p99 ms"]
        ),
    }


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--disturbed", action="store_true", help="Slow, leaving and greedy clients beside.")
    parser.add_argument(
        "--alone", type=Path, help="soak.json of the run that a disturbed one is compared to."
    )
    options = parsed(parser)
    if options.alone is not None and not options.disturbed:
        parser.error("--alone is what a disturbed run is compared to: add --disturbed")
    alone = None if options.alone is None else json.loads(options.alone.read_text(encoding="utf-8"))
    found = asyncio.run(soak(options))
    counts, memory = found["counts"], found["memory MB"]
    rows = [[name, str(value)] for name, value in counts.items()]
    rows += [["starts of the server", str(found["starts"])]]
    rows += [
        [name, f"{found[name]:.1f}"] for name in ("requests a second", "p50 ms", "p99 ms", "seconds to stop")
    ]
    for part in ("first quarter", "last quarter"):
        rows.append([f"memory, {part}, MB", f"{memory[part]:.1f}"])
    title = f"{options.requests} requests, {options.clients} clients, {MODEL}"
    report("soak", title, ["", ""], rows, {"settings": settings(options)} | found, options.out)
    faults = faults_of(found, options.requests, alone)
    if any(faults.values()):
        raise SystemExit(f"faults: {faults}")


if __name__ == "__main__":
    main()
