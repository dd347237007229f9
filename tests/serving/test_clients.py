"""What clients really send: each of these failed with another server's clients, or was dropped in silence."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import selfensemble as rse
from selfensemble.serving.app import create_app
from selfensemble.serving.images import ImageError, decode_base64
from selfensemble.serving.settings import Settings

from .test_server import CLASSES, encoded, png

KEY = "long enough"
HERS, OTHERS = "https://hers.example", "https://others.example"


@pytest.fixture(scope="module")
def digit() -> bytes:
    return png(rse.load_data("digits", "test").inputs(slice(1))[0])


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    settings = Settings(api_key=KEY, cors=(HERS,), page=False)
    with TestClient(create_app(rse.load("digits-rse"), CLASSES, (1, 8, 8), settings)) as session:
        session.headers["X-API-Key"] = KEY
        yield session


ODD = bytes([251, 239, 190, 255, 1])  # in base64 with + and /, and padded


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(ODD).decode(),
        base64.urlsafe_b64encode(ODD).decode(),
        base64.b64encode(ODD).decode().rstrip("="),
        base64.encodebytes(ODD).decode().replace("+", "+\r\n"),
        "data:image/png;base64," + base64.b64encode(ODD).decode(),
        "DATA:image/png;charset=x;BASE64,\n" + base64.b64encode(ODD).decode(),
    ],
)
def test_base64_of_every_kind_is_read(text: str) -> None:
    assert decode_base64(text) == ODD


@pytest.mark.parametrize(
    "text", ["%%%", "A", "AAAAA", "AA=A", "data:image/png,AAAA", "data:AAAA", "AAA\u00e4"]
)
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="not base64"):
        decode_base64(text)


@pytest.mark.parametrize(
    "kind", [None, "application/x-www-form-urlencoded", "text/plain", "application/json"]
)
def test_json_is_taken_whatever_it_is_called(http: TestClient, digit: bytes, kind: str | None) -> None:
    """`curl -d` calls it a form. But not what a browser sends for another page without asking first."""
    content = json.dumps({"images": [encoded(digit)]})
    headers = {} if kind is None else {"Content-Type": kind}
    assert http.post("/v1/predict", content=content, headers=headers).status_code == 200
    foreign = http.post("/v1/predict", content=content, headers=headers | {"Origin": OTHERS})
    assert foreign.status_code == (200 if kind == "application/json" else 415)


def test_json_and_forms_at_the_wrong_address(http: TestClient, digit: bytes) -> None:
    form = http.post("/v1/predict", files={"images": digit})
    assert (form.status_code, "/v1/predict/files" in form.json()["error"]) == (415, True)
    sent = http.post("/v1/predict/files", json={"images": [encoded(digit)]})
    assert (sent.status_code, "/v1/predict:" in sent.json()["error"]) == (415, True)
    broken = http.post("/v1/predict", content="{")
    assert (broken.status_code, "not JSON" in broken.json()["error"]) == (422, True)


def test_options_may_be_fields_of_a_form(http: TestClient, digit: bytes) -> None:
    def answer(**fields: str) -> Any:
        return http.post("/v1/predict/files", files={"images": digit}, data=fields)

    for fields in (
        {"draws": "3", "top": "2"},
        {"draws": "3", "options": '{"top": 2}'},
        {"draws": "3", "top": "2", "stop": "", "options": ""},
    ):
        (found,) = answer(**fields).json()["images"]
        assert (found["draws"], len(found["classes"])) == (3, 2)
    assert answer(decide='{"max_draws": 30}').json()["images"][0]["decision"]["draws"] <= 30
    for wrong, about in (
        ({"colour": "1"}, "colour: there is no such field"),
        ({"draws": "3", "options": '{"draws": 4}'}, "draws: given twice"),
        ({"draws": "three"}, "draws"),
        ({"decide": "{"}, "decide: this is not JSON"),
        ({"options": "[]"}, "must be a JSON object"),
        ({"options": '{"colour": 1}'}, "colour"),
    ):
        refused = answer(**wrong)
        assert (refused.status_code, about in refused.json()["error"]) == (422, True), refused.text


def test_options_in_the_address_are_not_dropped(http: TestClient, digit: bytes) -> None:
    body = {"images": [encoded(digit)]}
    for path, sent in (("/v1/predict", {"json": body}), ("/v1/predict/files", {"files": {"images": digit}})):
        refused = http.post(f"{path}?draws=3", **sent)
        assert (refused.status_code, "behind '?'" in refused.json()["error"]) == (422, True)


def test_head_is_get_without_its_body(http: TestClient) -> None:
    for path in ("/health", "/ready", "/v1/model", "/metrics"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert http.head("/v1/predict").status_code == 405
    assert http.head("/nothing").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"bearer  {KEY}"}, 200),
        ({"Authorization": f"Bearer {KEY}", "X-API-Key": ""}, 200),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": KEY}, 401),
        ({}, 401),
    ],
)
def test_the_key_may_be_a_bearer_token(http: TestClient, headers: dict[str, str], status: int) -> None:
    """As Prometheus sends it for /metrics, too."""
    for path in ("/v1/model", "/metrics"):
        answer = http.get(path, headers={"X-API-Key": ""} | headers)
        assert answer.status_code == status
        if status == 401:
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_pages_of_named_origins_may_ask(http: TestClient, digit: bytes) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    preflight = http.options("/v1/predict", headers=asked | {"Origin": HERS, "X-API-Key": ""})
    assert (preflight.status_code, preflight.content) == (204, b"")
    assert preflight.headers["Access-Control-Allow-Origin"] == HERS
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    for name in ("content-type", "x-api-key", "authorization"):
        assert name in preflight.headers["Access-Control-Allow-Headers"]
    body = {"images": [encoded(digit)]}
    answer = http.post("/v1/predict", json=body, headers={"Origin": HERS})
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == HERS
    refused = http.post("/v1/predict", json={}, headers={"Origin": HERS})  # the page may read why
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (422, HERS)
    foreign = http.options("/v1/predict", headers=asked | {"Origin": OTHERS})
    assert foreign.status_code == 403
    for each in (foreign, http.post("/v1/predict", json=body, headers={"Origin": OTHERS})):
        assert "Access-Control-Allow-Origin" not in each.headers


def test_without_the_option_no_other_page_may_ask(digit: bytes) -> None:
    settings = Settings(page=False)
    with TestClient(create_app(rse.load("digits-rse"), CLASSES, (1, 8, 8), settings)) as session:
        asked = {"Access-Control-Request-Method": "POST", "Origin": HERS}
        for answer in (
            session.options("/v1/predict", headers=asked),
            session.get("/v1/model", headers=asked),
        ):
            assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "text"),
    [
        ("POST", "/v1/predict", {"content": b""}, 422, "the body is missing"),
        ("POST", "/v1/predict", {"content": b"[" * 200_000}, 400, "the body cannot be read"),
        ("POST", "/v1/predict", {"content": b'{"images": ['}, 422, "not JSON (at byte 12)"),
        ("POST", "/v1/predict", {"json": []}, 422, "the body must hold keys and values, got []"),
        ("POST", "/v1/predict", {"json": {"images": [3]}}, 422, "images.0 must be text, got 3"),
        ("POST", "/v1/predict", {"json": {"images": ["x"], "draws": "x"}}, 422, "draws must be a wh"),
        ("POST", "/v1/predict", {"json": {"images": ["x"], "certify": {"radius": 1e99}}}, 422, "1e+38 or"),
        ("POST", "/v1/predict/files", {"files": {"images": (None, "x")}}, 422, "images must be files"),
        ("POST", "/v1/predict/files", {"files": {"images": b"x", "draws": (None, "x")}}, 422, "draws must"),
        ("GET", "/v1/predict", {}, 405, "takes another method"),
        ("GET", "/nowhere", {}, 404, "no such address"),
    ],
)  # fmt: skip
def test_what_is_refused_is_said_in_our_words(
    http: TestClient, method: str, path: str, sent: dict[str, Any], status: int, text: str
) -> None:
    reply = http.request(method, path, **sent)
    assert reply.status_code == status
    assert text in reply.json()["error"]
    assert "Input" not in reply.text
    assert "Upload" not in reply.text


def test_origins_are_origins() -> None:
    """What no browser would ever send is refused when the server starts."""
    Settings(cors=("https://a.example:8443", "http://localhost", "*"))
    for wrong in ("a.example", "https://a.example/page", ""):
        with pytest.raises(ValueError, match="must be an origin"):
            Settings(cors=(wrong,))


@pytest.mark.parametrize("value", [True, "5", 5.0, "true", 1.5, [5]])
@pytest.mark.parametrize("key", ["draws", "top", "decide.max_draws", "certify.n"])
def test_numbers_in_json_are_numbers(http: TestClient, digit: bytes, key: str, value: Any) -> None:
    part, _, name = key.rpartition(".")
    options: dict[str, Any] = {part: {name: value}} if part else {name: value}
    answer = http.post("/v1/predict", json={"images": [encoded(digit)]} | options)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(f"{key} must be a whole number")
    files: Any = {"images": digit, "options": (None, json.dumps(options))}
    assert http.post("/v1/predict/files", files=files).status_code == 422


def test_what_else_json_has_a_type_for(http: TestClient, digit: bytes) -> None:
    wrong: list[dict[str, Any]] = [
        {"sets": 1}, {"sets": "true"}, {"decide": {"alpha": "0.1"}}, {"decide": {"alpha": True}},
    ]  # fmt: skip
    for each in wrong:
        assert http.post("/v1/predict", json={"images": [encoded(digit)]} | each).status_code == 422, each
    right = {"draws": 3, "top": 1, "stop": None, "decide": {"alpha": 0.1, "max_draws": 10}}
    assert http.post("/v1/predict", json={"images": [encoded(digit)]} | right).status_code == 200


@pytest.mark.parametrize("fields", [{"draws": "3", "top": "1"}, {"draws": "3", "sets": "false"}])
def test_numbers_in_forms_are_text(http: TestClient, digit: bytes, fields: dict[str, str]) -> None:
    answer = http.post("/v1/predict/files", files={"images": digit}, data=fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["images"][0]["draws"] == 3
    for wrong in ("3.0", "true", "three"):
        refused = http.post("/v1/predict/files", files={"images": digit}, data={"draws": wrong})
        assert refused.status_code == 422
        assert "draws must be a whole number" in refused.json()["error"]


@pytest.mark.parametrize(
    ("text", "key"),
    [('"draws": 1, "draws": 5', "draws"), ('"decide": {"alpha": 0.1, "alpha": 0.2}', "alpha")],
)
def test_a_key_that_comes_twice_is_refused(http: TestClient, digit: bytes, text: str, key: str) -> None:
    body = f'{{"images": ["{encoded(digit)}"], {text}}}'
    answer = http.post("/v1/predict", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (422, {"error": f"{key}: given twice"})
    files: Any = {"images": digit, "options": (None, f"{{{text}}}")}
    answer = http.post("/v1/predict/files", files=files)
    assert (answer.status_code, answer.json()) == (422, {"error": f"{key}: given twice"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": OTHERS}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://testserver", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": HERS}, 200),
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "https://proxied.example", "Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_forms_of_other_pages_make_no_work(
    http: TestClient, digit: bytes, headers: dict[str, str], status: int
) -> None:
    """A browser sends them without a preflight."""
    answer = http.post("/v1/predict/files", files={"images": digit}, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json() == {"error": "pages of this origin may not ask: see --cors"}


def test_half_an_image_is_refused_in_our_words(http: TestClient) -> None:
    whole = png(torch.rand(3, 64, 64))
    answer = http.post("/v1/predict", json={"images": [encoded(whole[: len(whole) // 2])]})
    assert answer.status_code == 422
    assert answer.json() == {"error": "image 0: the image is damaged, or a part of it is missing"}


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_image_of_several_frames_leaves_open_which(http: TestClient, kind: str) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    answer = http.post("/v1/predict", json={"images": [encoded(buffer.getvalue())]})
    assert answer.status_code == 422
    assert "it has several frames" in answer.json()["error"]
