"""The HTTP server: a real process and real requests; limits with small settings in one process."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from selfensemble.ensemble.stopping import Calibrated

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402

from selfensemble.cli import serving as commands  # noqa: E402, F401  (adds its command to the app)
from selfensemble.cli.base import app as app_of_commands  # noqa: E402
from selfensemble.serving.app import create_app  # noqa: E402
from selfensemble.serving.batching import Batcher  # noqa: E402
from selfensemble.serving.keyed import keyed_seed  # noqa: E402
from selfensemble.serving.settings import Settings  # noqa: E402
from selfensemble.serving.turns import BusyError  # noqa: E402

from ..command import error  # noqa: E402

CLASSES = tuple("0123456789")


def png(image: torch.Tensor, kind: str = "PNG") -> bytes:
    """A (1, H, W) image in [0, 1] as a file."""
    file = io.BytesIO()
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(file, kind)
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def digits() -> tuple[list[bytes], list[int]]:
    data = rse.load_data("digits", "test")
    return [png(image) for image in data.inputs(slice(40))], data.labels[:40].tolist()


class Server:
    """`selfensemble serve digits-rse` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "selfensemble", "serve", "digits-rse", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + self.process.stderr.read()  # type: ignore[union-attr]
        self.url = found.group()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        for _ in range(200):
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            threading.Event().wait(0.05)
        raise AssertionError("not ready")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.client.close()
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.returncode


def test_json_and_files_are_answered(server: Server, digits: tuple[list[bytes], list[int]]) -> None:
    files, labels = digits
    body = {"images": [encoded(data) for data in files], "draws": 20, "top": 3}
    answer = server.client.post("/v1/predict", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()["images"]
    assert np.mean([int(each["label"]) == label for each, label in zip(found, labels, strict=True)]) > 0.9
    for each in found:
        assert each["draws"] == 20
        assert len(each["classes"]) == 3
        probabilities = [one["probability"] for one in each["classes"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert each["label"] == each["classes"][0]["label"]
        assert all(one["spread"] >= 0 for one in each["classes"])
    form = [("images", (f"{k}.png", data, "image/png")) for k, data in enumerate(files)]
    options = {"options": json.dumps({"stop": "exact"})}
    again = server.client.post("/v1/predict/files", files=form, data=options).json()["images"]
    assert np.mean([one["label"] == two["label"] for one, two in zip(found, again, strict=True)]) > 0.9
    assert all(6 <= each["draws"] <= 20 for each in again)


def test_decisions_and_certificates_on_request(server: Server, digits: tuple[list[bytes], list[int]]) -> None:
    files, _ = digits
    body = {
        "images": [encoded(data) for data in files[:4]], "decide": {"alpha": 0.01, "max_draws": 200},
        "certify": {"n": 200, "n0": 50, "alpha": 0.01},
    }  # fmt: skip
    for each in server.client.post("/v1/predict", json=body).json()["images"]:
        decision, certificate = each["decision"], each["certificate"]
        assert decision["label"] in (None, decision["leader"])
        assert 0 <= decision["low"] <= decision["high"] <= 1
        assert decision["draws"] <= 200
        assert (certificate["label"] is None) == (certificate["radius"] == 0)
        assert certificate["draws"] == 250
        assert certificate["verdict"] is None
    body["certify"] = {"n": 1000, "n0": 50, "alpha": 0.01, "radius": 0.05}
    wanted = [each["certificate"] for each in server.client.post("/v1/predict", json=body).json()["images"]]
    assert [each["verdict"] == "reached" for each in wanted] == [each["radius"] >= 0.05 for each in wanted]
    assert "reached" in {each["verdict"] for each in wanted}
    body["certify"] = {"n": 200, "n0": 50, "alpha": 0.01, "grid": True}
    found = server.client.post("/v1/predict", json=body).json()["images"]
    assert max(each["certificate"]["radius"] for each in found) > 0


def test_many_clients_at_once_get_their_own_answers(
    server: Server, digits: tuple[list[bytes], list[int]]
) -> None:
    files, _ = digits
    body = {"images": [encoded(data) for data in files], "draws": 100}
    alone = [each["label"] for each in server.client.post("/v1/predict", json=body).json()["images"]]
    before = passes(server)

    def ask(place: int) -> str:
        one = {"images": [encoded(files[place])], "draws": 100}
        answer = httpx.post(f"{server.url}/v1/predict", json=one, timeout=60)
        label: str = answer.json()["images"][0]["label"]
        return label

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, [*range(40)] * 2))
    agreeing = np.mean([one == two for one, two in zip(alone * 2, together, strict=True)])
    assert agreeing > 0.95
    assert passes(server) - before < 80 * 100 / 2  # requests share passes


def passes(server: Server) -> float:
    text = server.client.get("/metrics").text
    return float(re.findall(r"^selfensemble_passes (\S+)", text, re.MULTILINE)[0])


def test_what_it_tells_of_itself(server: Server) -> None:
    assert server.client.get("/health").json() == {"status": "alive"}
    about = server.client.get("/v1/model").json()
    assert about["classes"] == list(CLASSES)
    assert about["shape"] == [1, 8, 8]
    assert "secret" not in json.dumps(about["limits"])
    schema = server.client.get("/openapi.json").json()
    assert {"/v1/predict", "/v1/predict/files", "/health", "/ready"} <= set(schema["paths"])
    metrics = server.client.get("/metrics").text
    assert 'selfensemble_requests_total{path="/health",status="200"}' in metrics
    assert server.client.get("/nothing").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "about"),
    [
        ({"images": []}, 422, "images"),
        ({}, 422, "images"),
        ({"images": ["%%%"]}, 422, "image 0: this is not base64"),
        ({"images": [encoded(b"GIF89a broken")]}, 422, "image 0"),
        ({"images": [encoded(b"hello")]}, 422, "image 0: this is not an image"),
        ({"images": ["x"], "draws": 0}, 422, "draws"),
        ({"images": ["x"], "colour": 1}, 422, "colour"),
        ({"images": ["x"], "decide": {"alpha": 2}}, 422, "alpha"),
        ({"images": ["x"] * 65}, 413, "65 images"),
    ],
)
def test_mistakes_are_named(server: Server, body: Any, status: int, about: str) -> None:
    answer = server.client.post("/v1/predict", json=body)
    assert answer.status_code == status
    assert about in answer.json()["error"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_what_it_took_when_it_is_stopped(
    digits: tuple[list[bytes], list[int]], number: signal.Signals
) -> None:
    running = Server()
    files, _ = digits
    body = {"images": [encoded(files[0])] * 40, "draws": 100}
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(httpx.post, f"{running.url}/v1/predict", json=body, timeout=60) for _ in range(4)
        ]
        while passes(running) < 1:
            pass
        assert running.stop(number) == 0
        answers = [future.result() for future in asked]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(len(answer.json()["images"]) == 40 for answer in answers)


def test_other_machines_need_a_key() -> None:
    assert "--api-key" in error("serve", "digits-rse", "--host", "0.0.0.0")


def test_a_key_that_is_refused_is_not_printed() -> None:
    """Nor is a secret; the option is named."""
    for option, value in (("--api-key", "hushed"), ("--secret", "hushed as well")):
        said = error("serve", "digits-rse", option, value)
        assert option in said
        assert "hushed" not in said


def client(ensemble: rse.SelfEnsemble | None = None, **settings: Any) -> TestClient:
    ensemble = ensemble or rse.load("digits-rse")
    return TestClient(create_app(ensemble, CLASSES, (1, 8, 8), Settings(**settings)))


def test_sets_on_request(digits: tuple[list[bytes], list[int]]) -> None:
    ensemble, data = rse.load("digits-rse"), rse.load_data("digits", "test")
    sets = rse.conformal_sets(ensemble, data.inputs(slice(250, 450)), data.labels[250:], seed=0)
    files, labels = digits
    body = {"images": [encoded(each) for each in files], "sets": True}
    with client(ensemble) as http:
        assert http.get("/v1/model").json()["sets"] is False
        refused = http.post("/v1/predict", json=body)
        assert (refused.status_code, "calibrate --sets" in refused.json()["error"]) == (422, True)
        ensemble.sets = sets.rule
        assert http.get("/v1/model").json()["sets"] is True
        found = [each["set"] for each in http.post("/v1/predict", json=body).json()["images"]]
        assert {(each["alpha"], each["radius"], each["draws"]) for each in found} == {(0.1, 0.0, 20)}
        # At level 1e-3: how many of 40 images hold their label, the threshold being the 181st of 200.
        right = sum(str(label) in each["labels"] for label, each in zip(labels, found, strict=True))
        assert right >= stats.betabinom(40, 181, 20).ppf(0.001)
        form = {"images": ("digit.png", files[0], "image/png")}
        options = {"options": json.dumps({"sets": True})}
        (answer,) = http.post("/v1/predict/files", files=form, data=options).json()["images"]
        assert set(answer["set"]["labels"]) <= set(CLASSES)
        without = http.post("/v1/predict", json=body | {"sets": False}).json()["images"]
        assert all(each["set"] is None for each in without)
        assert http.post("/v1/predict", json=body | {"sets": "perhaps"}).status_code == 422
    with client(ensemble, secret="sixteen characters") as http:
        first, second = (http.post("/v1/predict", json=body).json() for _ in range(2))
        assert first == second


@pytest.mark.parametrize("secret", [None, "sixteen characters"])
def test_rules_are_refused_when_the_network_was_changed(
    digits: tuple[list[bytes], list[int]], secret: str | None
) -> None:
    ensemble, data = rse.load("digits-rse"), rse.load_data("digits", "test")
    ensemble.sets = rse.conformal_sets(ensemble, data.inputs(slice(50)), data.labels[:50], draws=2).rule
    ensemble.stopping = Calibrated(
        thresholds=(0.5, 0.0), epsilon=0.1, delta=0.05, mean_draws=1.5, disagreement=0.05, images=500,
        reference_draws=200,
    )  # fmt: skip
    bodies = [
        {"images": [encoded(digits[0][0])], **asked} for asked in ({"sets": True}, {"stop": "calibrated"})
    ]
    with client(ensemble, secret=secret, stop="calibrated") as http:
        assert [http.post("/v1/predict", json=body).status_code for body in bodies] == [200, 200]
        assert http.get("/v1/model").json()["calibrated"] is True
        with torch.no_grad():
            next(ensemble.parameters()).mul_(1.1)
        for body in bodies:
            answer = http.post("/v1/predict", json=body)
            assert answer.status_code == 422
            assert "calibrated on other weights" in answer.json()["error"]
        about = http.get("/v1/model").json()
        assert (about["calibrated"], about["sets"]) == (False, False)
    with pytest.raises(ValueError, match="calibrated on other weights"):
        client(ensemble, stop="calibrated")


def test_a_key_is_asked_for(digits: tuple[list[bytes], list[int]]) -> None:
    with client(api_key="open sesame") as http:
        body = {"images": [encoded(digits[0][0])]}
        assert http.post("/v1/predict", json=body).status_code == 401
        assert http.post("/v1/predict", json=body, headers={"X-API-Key": "wrong"}).status_code == 401
        assert http.get("/metrics").status_code == 401
        assert http.post("/v1/predict", json=body, headers={"X-API-Key": "open sesame"}).status_code == 200
        assert http.get("/health").status_code == 200


def test_bodies_and_images_have_a_size(digits: tuple[list[bytes], list[int]]) -> None:
    with client(max_body=20_000, max_pixels=10_000) as http:
        large = io.BytesIO()
        Image.new("L", (101, 100)).save(large, "PNG")  # small in bytes, too many pixels
        answer = http.post("/v1/predict", json={"images": [encoded(large.getvalue())]})
        assert (answer.status_code, "101 x 100" in answer.json()["error"]) == (413, True)
        body = {"images": [encoded(digits[0][0])] * 200}
        assert http.post("/v1/predict", json=body).status_code == 413
        text = json.dumps(body).encode()
        # Without a length, in pieces.
        pieces = (text[start : start + 5000] for start in range(0, len(text), 5000))
        answer = http.post("/v1/predict", content=pieces, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert http.post("/v1/predict", json={"images": [encoded(digits[0][0])]}).status_code == 200


def test_a_full_queue_and_a_slow_answer(
    digits: tuple[list[bytes], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = encoded(digits[0][0])
    with client(max_waiting=4) as http:
        answer = http.post("/v1/predict", json={"images": [one] * 5})  # for which there is never room
        assert (answer.status_code, "at most 4" in answer.json()["error"]) == (413, True)
        assert "Retry-After" not in answer.headers
        assert http.post("/v1/predict", json={"images": [one] * 4}).status_code == 200

        def full(batcher: Batcher, images: Tensor, rule: object) -> None:
            raise BusyError("4 images wait, at most 4 may")

        monkeypatch.setattr(Batcher, "submit", full)
        answer = http.post("/v1/predict", json={"images": [one]})
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        monkeypatch.undo()
    with client(timeout=0.001) as http:
        answer = http.post("/v1/predict", json={"images": [one] * 40, "draws": 1000})
        assert answer.status_code == 504
    with client(max_draws=10, max_certify=50) as http:
        for extra in ({"draws": 11}, {"decide": {"max_draws": 11}}, {"certify": {"n": 51}}):
            answer = http.post("/v1/predict", json={"images": [one]} | extra)
            assert (answer.status_code, "at most" in answer.json()["error"]) == (422, True)


def test_the_centre_of_images_is_that_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8))
    silent = rse.SelfEnsemble(rse.create_model("small-cnn", channels=1), rse.NoiseConfig(0, 0)).eval()
    framed = Image.new("L", (64, 64), 255)
    framed.paste(inner, (16, 16))
    answers = []
    for image, centre in ((inner, 1.0), (framed, 0.5), (framed, 1.0)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        app = create_app(silent, CLASSES, (1, 8, 8), Settings(), centre=centre)
        with TestClient(app) as http:
            body = {"images": [encoded(buffer.getvalue())]}
            answers.append(http.post("/v1/predict", json=body).json()["images"][0]["classes"])
    wanted, same, other = ([each["probability"] for each in classes] for classes in answers)
    assert same == pytest.approx(wanted, abs=1e-4)  # a pixel is rounded another way
    assert other != pytest.approx(wanted, abs=1e-3)

    given: dict[str, Any] = {}
    monkeypatch.setattr("selfensemble.serving.run.run", lambda *args, **about: given.update(about))
    config = read_config("digits-rse")
    assert config.recipe is not None
    rse.save(
        rse.load("digits-rse"), tmp_path / "mine", architecture=config.architecture, classes=CLASSES,
        input_shape=(1, 8, 8), recipe=config.recipe | {"data": config.recipe["data"] | {"centre": 0.875}},
    )  # fmt: skip
    assert not app_of_commands(["serve", str(tmp_path / "mine"), "--device", "cpu"], standalone_mode=False)
    assert given["centre"] == 0.875


def test_a_request_that_took_too_long_ends(digits: tuple[list[bytes], list[int]]) -> None:
    """Its images that are left are not certified behind everybody's back."""
    files, _ = digits
    body = {"images": [encoded(files[0])] * 40, "certify": {"n": 10_000}}
    with client(timeout=1) as http:
        assert http.post("/v1/predict", json=body).status_code == 504
        began = time.monotonic()
        # All forty take a minute.
        while http.post("/v1/predict", json={"images": [encoded(files[1])]}).status_code == 504:
            assert time.monotonic() - began < 20


def test_calibrated_stops_have_draws_of_their_own(digits: tuple[list[bytes], list[int]]) -> None:
    """A server that is told both does not start; one that is told draws answers who wants the stops."""
    ensemble = rse.load("digits-rse")
    ensemble.stopping = Calibrated(
        thresholds=(2.0, 0.0), epsilon=0.1, delta=0.1, mean_draws=2, disagreement=0.1, images=1,
        reference_draws=9,
    )  # fmt: skip
    with pytest.raises(ValueError, match="leave draws out"), client(ensemble, stop="calibrated", draws=20):
        pass
    body = {"images": [encoded(digits[0][0])]}
    with client(ensemble, draws=20) as http:
        stopped = http.post("/v1/predict", json=body | {"stop": "calibrated"})
        assert stopped.status_code == 200, stopped.text
        assert stopped.json()["images"][0]["draws"] == 2
        assert http.post("/v1/predict", json=body).json()["images"][0]["draws"] == 20
        assert http.post("/v1/predict", json=body | {"stop": "calibrated", "draws": 3}).status_code == 422


def test_radii_of_sets_are_those_of_images_between_0_and_1(digits: tuple[list[bytes], list[int]]) -> None:
    """As those of certificates are, whatever the bounds of the network's inputs."""
    network = rse.load("digits-rse").model
    ensemble = rse.SelfEnsemble(network, None, bounds=(-1.0, 1.0)).eval()
    data = rse.load_data("digits", "test")
    images = data.inputs(slice(200)) * 2 - 1
    ensemble.sets = rse.conformal_sets(ensemble, images, data.labels[:200], radius=0.2, draws=50, seed=0).rule
    body = {"images": [encoded(digits[0][0])], "sets": True}
    with client(ensemble) as http:
        (answer,) = http.post("/v1/predict", json=body).json()["images"]
    assert answer["set"]["radius"] == pytest.approx(0.1)


def test_with_a_secret_asking_again_gains_nothing(digits: tuple[list[bytes], list[int]]) -> None:
    files, _ = digits
    body: dict[str, Any] = {"images": [encoded(data) for data in files[:6]]}
    body |= {"decide": {"max_draws": 1}, "certify": {"n": 20, "n0": 2}}
    # Six clear images often get the same classes of one draw twice; forty did not in 150 requests.
    many = {"images": [encoded(data) for data in files], "decide": body["decide"]}
    with client(secret="sixteen characters") as http:
        first, second = (http.post("/v1/predict", json=body).json() for _ in range(2))
        alone = http.post("/v1/predict", json=body | {"images": body["images"][3:4]}).json()
    with client(secret="another of sixteen") as http:
        other = http.post("/v1/predict", json=body).json()
    with client() as http:
        fresh = [http.post("/v1/predict", json=many).json() for _ in range(2)]
    assert first == second
    assert alone["images"][0] == first["images"][3]
    assert other != first
    for part in ("probability", "decision"):
        assert [each[part] for each in fresh[0]["images"]] != [each[part] for each in fresh[1]["images"]]
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[1, 0, 0, 0] = 1
    assert keyed_seed("sixteen characters", images[0]) != keyed_seed("sixteen characters", images[1])


@pytest.mark.parametrize("stop", [None, "exact"])
def test_with_a_secret_an_image_has_one_answer(
    digits: tuple[list[bytes], list[int]], stop: str | None
) -> None:
    """However it is asked for: other draws, rules and risks, and the vote, choose none of their own."""
    files, _ = digits
    body: dict[str, Any] = {"images": [encoded(data) for data in files[:8]]}
    vote = {"image": body["images"][0]}
    chosen: list[dict[str, Any]] = [
        {"draws": 1},
        {"draws": 7},
        {"stop": "exact" if stop is None else "calibrated"},
    ]
    with client(secret="sixteen characters", stop=stop, draws=12) as http:
        first = http.post("/v1/predict", json=body).json()
        for same in ({}, {"draws": 12}, {"stop": stop}, {"draws": 12, "stop": stop}, {"top": 5}):
            assert http.post("/v1/predict", json=body | same).json() == first
        for other in chosen:
            answer = http.post("/v1/predict", json=body | other)
            assert (answer.status_code, "one answer" in answer.json()["error"]) == (422, True)
        for kind in ("decide", "certify"):
            answer = http.post("/v1/predict", json=body | {kind: {"alpha": 0.9}})
            assert (answer.status_code, f"{kind}.alpha" in answer.json()["error"]) == (422, True)
        assert http.post("/v1/votes", json=vote | {"draws": 1}).status_code == 422
        assert json.loads(http.post("/v1/votes", json=vote).text.splitlines()[-1])["draws"] == 12
    with client(draws=12) as http:
        assert http.post("/v1/predict", json=body | {"draws": 1}).json()["images"][0]["draws"] == 1
        assert json.loads(http.post("/v1/votes", json=vote).text.splitlines()[-1])["draws"] == 20
