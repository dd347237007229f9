"""Requests a second: `selfensemble serve` against a plain FastAPI route with a loop over draws, 32 clients.

    python benchmarks/serving.py --data DATA [--model cifar10-vgg16-rse] [--clients 32] [--requests 600]

Images are the first 200 of the test set; answers are compared with those of 200 draws. Each server is a
process of its own on the same cores; they take turns. The plain route opens the image, passes it as often as
there are draws, with noise in front of every convolution, in float32, and answers with the mean. Clients keep
their connection and ask again as soon as they are answered; they share the cores too.
"""

import asyncio
import base64
import io
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import authors
from PIL import Image
from timing import arguments, parsed, report, settings

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from selfensemble.artefacts.zoo import locate

Request = dict[str, Any]


def plain(model: str, draws: int) -> None:
    """The plain route, in this process, on a free port."""
    import socket

    import uvicorn
    from fastapi import FastAPI

    from selfensemble.data.decoding import prepare_image

    config = read_config(locate(model))
    assert config.architecture is not None
    assert config.input_shape is not None
    channels, height, width = config.input_shape
    saved = rse.load(model)
    network = rse.create_model(**config.architecture.model_dump()).eval()
    network.load_state_dict(
        {key: value for key, value in saved.model.state_dict().items() if "gaussian_noise" not in key}
    )
    stds = [layer.std for layer in rse.noise_layers(saved.model).values()]
    noisy = authors.with_noise(network, *map(float, stds[:2]))  # type: ignore[arg-type]
    app = FastAPI()

    @app.post("/v1/predict")
    def predict(request: Request) -> dict[str, Any]:
        opened = Image.open(io.BytesIO(base64.b64decode(request["images"][0])))
        inputs = prepare_image(opened, channels, (height, width))[None].float() / 255
        mean = authors.predict(noisy, inputs, draws)[0] / draws
        return {"label": int(mean.argmax()), "probabilities": mean.tolist()}

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        print(f"listening at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


class Server:
    """A process, and the port that it printed."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r":(\d+)$", self.process.stdout.readline().strip())
        assert found
        self.port = int(found.group(1))

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate()


@dataclass
class Load:
    """What clients ask, and what became of it."""

    bodies: list[bytes]
    most: int
    taken: int = 0
    seconds: list[float] = field(default_factory=list)
    answers: list[tuple[int, int | str]] = field(default_factory=list)  # number of the image, label


async def client(port: int, load: Load) -> None:
    """Ask until `load.most` requests have been taken by all clients together."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while load.taken < load.most:
        load.taken += 1
        number = load.taken % len(load.bodies)
        body = load.bodies[number]
        lines = ["POST /v1/predict HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        began = time.perf_counter()
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
        length = re.search(rb"content-length: (\d+)", answer.lower())
        assert length
        found = json.loads(await reader.readexactly(int(length.group(1))))
        load.seconds.append(time.perf_counter() - began)
        load.answers.append((number, found["images"][0]["label"] if "images" in found else found["label"]))
    writer.close()


async def rate(port: int, load: Load, clients: int) -> float:
    """Requests a second."""
    began = time.perf_counter()
    await asyncio.gather(*(client(port, load) for _ in range(clients)))
    return len(load.seconds) / (time.perf_counter() - began)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--model", default="cifar10-vgg16-rse")
    parser.add_argument("--data", help="the data set, as for `selfensemble evaluate`")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="be the plain server")
    options = parsed(parser)
    if options.plain:
        plain(options.model, options.draws)
        return
    if options.data is None:
        parser.error("--data is missing: pass the data set of the model")
    data = rse.load_data(options.data, "test")
    inputs = data.inputs(slice(200))
    reference = rse.load(options.model).predict(inputs, draws=200).label.tolist()
    bodies = []
    for image in data.images[:200]:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(file, "PNG")
        bodies.append(json.dumps({"images": [base64.b64encode(file.getvalue()).decode()]}).encode())
    own = [str(Path(__file__)), "--plain", "--model", options.model, "--draws", str(options.draws)]
    ours = ["-m", "selfensemble", "serve", options.model, "--port", "0"]
    servers = {
        "plain route": Server(own),
        "selfensemble serve": Server([*ours, "--draws", str(options.draws)]),
        "selfensemble serve, exact": Server([*ours, "--draws", str(options.draws), "--stop", "exact"]),
    }
    try:
        rates: dict[str, list[float]] = {name: [] for name in servers}
        seconds: dict[str, list[float]] = {name: [] for name in servers}
        answers: dict[str, list[bool]] = {name: [] for name in servers}
        for number in range(options.rounds + 1):
            for name, server in servers.items():
                few = options.requests // 10 if name == "plain route" else options.requests
                load = Load(bodies, few)
                found = asyncio.run(rate(server.port, load, options.clients))
                if number:  # the first warms up
                    rates[name].append(found)
                    seconds[name] += load.seconds
                    answers[name] += [
                        label in (reference[place], data.classes[reference[place]])
                        for place, label in load.answers
                    ]
    finally:
        for server in servers.values():
            server.stop()
    rows, values = [], {}
    for name, each in rates.items():
        values[name] = {
            "requests a second": statistics.median(each),
            "median ms": 1e3 * statistics.median(seconds[name]),
            "99 % within ms": 1e3 * sorted(seconds[name])[int(0.99 * len(seconds[name]))],
            "against the plain route": statistics.median(
                a / b for a, b in zip(each, rates["plain route"], strict=True)
            ),
            "label of 200 draws, %": 100 * sum(answers[name]) / len(answers[name]),
        }
        rows.append([name, *(f"{cell:.1f}" for cell in values[name].values())])
    report(
        "serving",
        f"{options.model}, {options.draws} draws, {options.clients} clients, medians of {options.rounds} "
        "rounds",
        ["", *values["plain route"]],
        rows,
        {"settings": settings(options), "rates": rates, "figures": values},
        options.out,
    )


if __name__ == "__main__":
    main()
