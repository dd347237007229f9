"""The page of the server: its routes, and itself in a headless Chromium if there is one."""

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import selfensemble as rse

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
from fastapi.testclient import TestClient

from selfensemble.serving.app import create_app
from selfensemble.serving.settings import Settings

from ..conftest import serious_faults
from .test_server import CLASSES, Server, encoded, png


@pytest.fixture(scope="module")
def digit() -> bytes:
    return png(rse.load_data("digits", "test").inputs(slice(1))[0])


def client(**settings: Any) -> TestClient:
    app = create_app(rse.load("digits-rse"), CLASSES, (1, 8, 8), Settings.model_validate(settings))
    return TestClient(app)


def stream(reply: Any) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    return [json.loads(line) for line in reply.text.splitlines()]


def test_votes_are_those_of_the_draws(digit: bytes) -> None:
    """Keyed noise makes the stream the very draws of the answer; without a key the counts add up."""
    with client(secret="a secret of some length", draws=12) as session:
        answer = session.post("/v1/predict", json={"images": [encoded(digit)]}).json()["images"][0]
        lines = stream(session.post("/v1/votes", json={"image": encoded(digit), "draws": 12}))
    assert lines[-1]["draws"] == 12
    best = max(lines[-1]["classes"], key=lambda each: each["probability"])
    assert best["label"] == answer["label"]
    assert best["probability"] == pytest.approx(answer["probability"], abs=1e-5)
    with client() as session:
        lines = stream(session.post("/v1/votes", json={"image": encoded(digit), "draws": 7}))
    static = rse.load("digits-rse")
    with rse.noise_disabled(static):
        plain = static.predict(rse.load_data("digits", "test").inputs(slice(1)))
    assert lines[0]["plain"]["label"] == CLASSES[int(plain.label[0])]
    assert lines[0]["plain"]["probability"] == pytest.approx(float(plain.probabilities.max()), abs=1e-5)
    assert [line["draws"] for line in lines[1:]] == list(range(1, 8))
    for line in lines[1:]:
        assert sum(each["votes"] for each in line["classes"]) <= line["draws"]
    assert lines[1]["classes"][0]["votes"] == 1


class Dropout(nn.Module):
    """With dropout at test time."""

    def __init__(self) -> None:
        super().__init__()
        self.network = rse.load("digits-rse").model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(nn.functional.dropout(inputs, 0.3, training=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("sampling", ["shared", "per_image"])
def test_keyed_votes_are_those_of_noise_of_any_kind(digit: bytes, sampling: Any) -> None:
    ensemble = rse.SelfEnsemble(Dropout(), None, draws=5, sampling=sampling).eval()
    app = create_app(ensemble, CLASSES, (1, 8, 8), Settings(secret="a secret of some length"))
    with TestClient(app) as session:
        answer = session.post("/v1/predict", json={"images": [encoded(digit)]}).json()["images"][0]
        one, other = (
            stream(session.post("/v1/votes", json={"image": encoded(digit), "draws": 5}))[-1]["classes"]
            for _ in range(2)
        )
    assert one == other
    best = max(one, key=lambda each: each["probability"])
    assert best["probability"] == pytest.approx(answer["probability"], abs=1e-5)


@pytest.mark.parametrize("target", ["plain", "ensemble"])
def test_attacks_change_what_they_say_they_change(digit: bytes, target: str) -> None:
    """The answers are those of the file that is sent back; far enough, both networks are fooled."""
    with client(attacks=True) as session:
        asked = {"image": encoded(digit), "target": target, "eps": 4.0}
        found = session.post("/v1/attack", json=asked).json()
        again = session.post("/v1/votes", json={"image": found["after"], "draws": 60}).text.splitlines()
        near = session.post("/v1/attack", json=asked | {"eps": 0.01}).json()
    by_name = {each["who"]: each for each in found["answers"]}
    ensemble, plain = by_name["the ensemble"], by_name["the network without noise"]
    fooled = {"plain": plain, "ensemble": ensemble}[target]
    assert fooled["before"]["label"] != fooled["after"]["label"]
    assert json.loads(again[0])["plain"]["label"] == plain["after"]["label"]
    if target == "ensemble":
        leader = max(json.loads(again[-1])["classes"], key=lambda each: each["probability"])
        assert leader["label"] != ensemble["before"]["label"]
    before, after = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found[name])))) / 255
        for name in ("before", "after")
    )
    assert np.linalg.norm(after - before) == pytest.approx(found["l2"], abs=1e-4)
    assert found["l2"] < 4.05  # rounding to 8 bits moves a little
    change = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["change"])))) / 255
    expected = (0.5 + found["magnified"] * (after - before)).clip(0, 1)
    assert np.abs(change - expected).max() < 0.01
    assert all(each["before"]["label"] == each["after"]["label"] for each in near["answers"])
    assert near["gradients"] == 40 * (8 if target == "ensemble" else 1)


@pytest.mark.parametrize("target", ["plain", "ensemble"])
def test_cw_fools_its_target_in_a_file(target: str) -> None:
    """The nearest images lie at the boundary, and those that are sent back have 8 bits."""
    images = rse.load_data("digits", "test").inputs(slice(6 if target == "plain" else 2))
    with client(attacks=True) as session:
        for image in images:
            asked = {"image": encoded(png(image)), "target": target, "attack": "cw"}
            found = session.post("/v1/attack", json=asked).json()
            answer = found["answers"][0 if target == "ensemble" else 1]
            assert answer["before"]["label"] != answer["after"]["label"]
            assert 0.05 < found["l2"] < 4


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_attacks_may_go_as_far_as_the_page_says(bounds: tuple[float, float], digit: bytes) -> None:
    ensemble = rse.SelfEnsemble(rse.create_model("small-cnn", channels=1), bounds=bounds).eval()
    app = create_app(ensemble, CLASSES, (1, 8, 8), Settings(attacks=True))
    with TestClient(app) as session:
        plain, *_ = stream(session.post("/v1/votes", json={"image": encoded(digit), "draws": 1}))
        asked = {"image": encoded(digit), "target": "plain", "eps": plain["reach"]}
        assert session.post("/v1/attack", json=asked).status_code == 200
        farther = session.post("/v1/attack", json=asked | {"eps": 1.01 * plain["reach"]})
    assert farther.status_code == 422
    assert 5.6 < plain["reach"] <= 8  # of 64 pixels in [0, 1], each half as far at the least


def test_samples_are_upright_and_of_any_kind(tmp_path: Path) -> None:
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
    turned.getexif()[0x112] = 6
    turned.save(tmp_path / "a.jpg", exif=turned.getexif())
    Image.new("CMYK", (2000, 1000)).save(tmp_path / "print.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"of a Mac")
    app = create_app(rse.load("digits-rse"), CLASSES, (1, 8, 8), Settings(samples=tmp_path))
    with TestClient(app) as session:
        upright, printed = session.get("/v1/model").json()["page"]["samples"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(each["image"]))) for each in (upright, printed)]
    assert [each.size for each in pictures] == [(20, 40), (768, 384)]
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        create_app(rse.load("digits-rse"), CLASSES, (1, 8, 8), Settings(samples=tmp_path))


def test_what_the_page_may_not_do(digit: bytes, tmp_path: Path) -> None:
    with client(page=False) as session:
        assert session.get("/").status_code == 404
        assert session.post("/v1/votes", json={"image": encoded(digit)}).status_code == 404
    with client(api_key="long enough") as session:
        page = session.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert session.get("/v1/model").status_code == 401
        assert session.post("/v1/votes", json={"image": encoded(digit)}).status_code == 401
        key = {"X-API-Key": "long enough"}
        assert session.post("/v1/attack", json={"image": encoded(digit)}, headers=key).status_code == 404
        assert session.get("/v1/model", headers=key).json()["page"]["attack"] is False
        for wrong in (
            {"image": "!"},
            {"image": encoded(b"no image")},
            {"image": encoded(digit), "draws": 10**6},
        ):
            reply = session.post("/v1/votes", json=wrong, headers=key)
            assert reply.status_code == 422
            assert reply.json()["error"]
    with pytest.raises(ValueError, match="no PNG or JPEG"):
        client(samples=tmp_path)
    (tmp_path / "mine.png").write_bytes(digit)
    with client(samples=tmp_path) as session:
        samples = session.get("/v1/model").json()["page"]["samples"]
    assert [each["name"] for each in samples] == ["mine"]


@pytest.mark.parametrize(("eps", "found"), [(0.01, False), (4.0, True)])
@pytest.mark.parametrize("target", ["plain", "ensemble"])
def test_an_attack_says_whether_it_found_anything(digit: bytes, target: str, eps: float, found: bool) -> None:
    """Of its target, not of the other network."""
    with client(attacks=True) as session:
        asked = {"image": encoded(digit), "target": target, "eps": eps}
        answer = session.post("/v1/attack", json=asked).json()
    assert (answer["found"], answer["target"]) == (found, target)
    compared = answer["answers"][0 if target == "ensemble" else 1]
    assert (compared["before"]["label"] != compared["after"]["label"]) == found


def test_distances_that_no_image_has_are_refused(digit: bytes) -> None:
    """From a black image the farthest one is white, at 8; from a grey one, 128 levels away in each pixel."""
    for level, reach in ((0, 8.0), (255, 8.0), (127, 8 * 128 / 255)):
        file = io.BytesIO()
        Image.new("L", (8, 8), level).save(file, "PNG")
        with client(attacks=True) as session:
            asked = {"image": encoded(file.getvalue()), "target": "plain"}
            lines = stream(session.post("/v1/votes", json={"image": asked["image"], "draws": 1}))
            assert lines[0]["reach"] == pytest.approx(reach, rel=1e-5)
            assert session.post("/v1/attack", json=asked | {"eps": reach - 0.01}).status_code == 200
            refused = session.post("/v1/attack", json=asked | {"eps": reach + 0.01})
        assert (refused.status_code, f"{reach:.2f}" in refused.json()["error"]) == (422, True)


def test_the_network_and_its_figures_are_named(tmp_path: Path, digit: bytes) -> None:
    (tmp_path / "7.png").write_bytes(digit)
    metrics = {"test": {"accuracy": 0.98, "low": 0.96, "high": 0.99, "images": 450}}
    for samples in (None, tmp_path):
        app = create_app(
            rse.load("digits-rse"),
            CLASSES,
            (1, 8, 8),
            Settings(samples=samples),
            name="mine",
            metrics=metrics,
        )
        with TestClient(app) as session:
            about = session.get("/v1/model").json()
        assert (about["name"], about["metrics"]) == ("mine", metrics)
        assert about["noise"] == [0.47, 0.1, 0.1, 0.1]
        for each in about["page"]["samples"]:  # nothing that looks like an answer
            assert each["caption"].startswith("sample ")


def test_the_command_names_what_it_serves(server: Server) -> None:
    about = server.client.get("/v1/model").json()
    assert about["name"] == "digits-rse"
    assert about["metrics"]["test"]["images"] == 450


def test_an_attack_that_nobody_waits_for_is_given_up(digit: bytes) -> None:
    """After the time for it, and before its next pass; then another one may begin."""
    network = rse.load("digits-rse")
    gate = threading.Event()

    def slow(module: Any, args: Any) -> None:
        if torch.is_grad_enabled():  # in attacks alone
            gate.wait(20)

    network.model.register_forward_pre_hook(slow)
    app = create_app(network, CLASSES, (1, 8, 8), Settings(attacks=True, attack_timeout=0.5))
    asked = {"image": encoded(digit), "target": "ensemble", "eps": 0.01}
    with TestClient(app) as session:
        late = session.post("/v1/attack", json=asked)
        assert (late.status_code, "0.5 s" in late.json()["error"]) == (504, True)
        assert session.post("/v1/attack", json=asked).status_code == 429  # it is still in its pass
        gate.set()
        while session.post("/v1/attack", json=asked | {"target": "plain"}).status_code == 429:
            pass


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(
    server: Server, browser: Any, digit: bytes, pictures: Path, width: int, scheme: str
) -> None:
    """By keyboard, sample and file to votes and an attack.

    No request elsewhere, no error, nothing wider than the screen, and nothing that axe finds serious.
    """
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    problems: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(server.url)
    page.wait_for_selector("#samples button")

    page.keyboard.press("Tab")  # the link that skips the header
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.parentElement.id") == "samples"
    page.keyboard.press("Enter")
    page.locator("#count", has_text="20 draws have voted.").wait_for()
    assert page.inner_text("#ensemble").endswith("%")
    assert page.inner_text("#plain").endswith("%")
    assert sum(int(cell) for cell in page.locator("#votes td:nth-child(2)").all_inner_texts()) <= 20

    page.set_input_files("#file", files=[{"name": "one.png", "mimeType": "image/png", "buffer": digit}])
    page.fill("#draws", "8")
    page.click("#again")
    page.locator("#count", has_text="8 draws have voted.").wait_for()
    assert page.inner_text("#caption") == "one.png"

    page.fill("#eps", "4")
    page.click("#run")
    page.wait_for_selector("#result:not([hidden])", timeout=60_000)
    assert "fools its target" in page.inner_text("#attacking")
    assert page.locator("#verdict .fooled").count() >= 1

    page.fill("#eps", "50")
    page.click("#run")
    assert "no image is farther" in page.inner_text("#eps-problem")
    page.fill("#eps", "4")
    assert page.locator("#eps-problem").is_hidden()
    page.fill("#draws", "0")
    page.click("#again")
    assert "whole number from 1 to 1000" in page.inner_text("#draws-problem")
    page.fill("#draws", "8")

    page.screenshot(path=pictures / f"page-{width}-{scheme}.png", full_page=True)
    assert serious_faults(page) == []

    text = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}
    page.set_input_files("#file", files=[text])
    assert "notes.txt is no image" in page.inner_text("#problem")
    page.set_input_files("#file", files=[{"name": "x.png", "mimeType": "image/png", "buffer": b"no image"}])
    page.wait_for_selector("#problem:not([hidden])")
    assert "image" in page.inner_text("#problem")
    problems = [each for each in problems if "422" not in each]  # the browser's own note of that answer

    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert problems == []
    assert hosts <= {urlsplit(server.url).netloc, ""}
    page.close()
