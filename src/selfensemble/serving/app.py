"""The HTTP interface: JSON and files, limits, health, metrics; see `docs/serving.md`."""

import asyncio
import hashlib
import hmac
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Annotated, Any

import torch
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from ..certification import certify
from ..decision import decide
from ..ensemble import SelfEnsemble
from ..stopping import rule_for
from . import schemas
from .batching import Answer, Batcher, BusyError, ClosedError
from .images import ImageError, TooLargeError, decode_base64, open_image, scaled
from .settings import Settings

OPEN = {"/health", "/ready"}  # what needs no key


def create_app(
    ensemble: SelfEnsemble, classes: Sequence[str], shape: tuple[int, int, int], settings: Settings
) -> FastAPI:
    """An application that answers with `ensemble`.

    Args:
        ensemble: in the form that predicts.
        classes: names, in the order of the outputs.
        shape: (channels, height, width) of its images.
        settings: limits.
    """
    service = Service(ensemble, tuple(classes), shape, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="selfensemble", version=_version(), lifespan=lifespan, docs_url=None, redoc_url=None,
        description="A random self-ensemble: labels, their certainty, and certified radii.",
    )  # fmt: skip
    app.add_middleware(_Gate, settings=settings, service=service)
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.Problem} for status in (401, 413, 422, 429, 503, 504)
    }

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _problem(422, _first(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return _problem(500, f"the server failed ({type(error).__name__}): see its log")

    @app.post("/v1/predict", responses=problems)
    async def predict(request: schemas.Request) -> schemas.Response:
        """Answer images that are sent as base64 in JSON."""
        service.check_count(len(request.images))
        files = [service.decoded(text, place) for place, text in enumerate(request.images)]
        return await service.answer(files, request)

    @app.post("/v1/predict/files", responses=problems)
    async def predict_files(
        images: Annotated[list[UploadFile], File(description="image files")],
        options: Annotated[str, Form(description="JSON with the options of /v1/predict")] = "{}",
    ) -> schemas.Response:
        """Answer images that are sent as files of a form."""
        service.check_count(len(images))
        try:
            wanted = schemas.Options.model_validate_json(options)
        except ValidationError as error:
            raise HTTPException(422, "options: " + _first(error.errors())) from None
        return await service.answer([await each.read() for each in images], wanted)

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What answers: classes, shape of images, draws, what it can certify."""
        return service.about()

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"model": schemas.Problem}})
    async def ready() -> dict[str, str]:
        """Requests are taken: not while starting or stopping, nor with a full queue."""
        if not service.is_ready:
            raise HTTPException(503, "not taking requests now")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(generate_latest(service.registry), media_type="text/plain; version=0.0.4")

    return app


class Service:
    """What stands behind the routes."""

    def __init__(
        self,
        ensemble: SelfEnsemble,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        settings: Settings,
    ) -> None:
        self.ensemble, self.classes, self.shape, self.settings = ensemble, classes, shape, settings
        rule_for(
            settings.stop, settings.draws or ensemble.draws, False, ensemble.stopping
        )  # says what is wrong
        self.batcher: Batcher | None = None
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "selfensemble_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "selfensemble_request_seconds", "Time of a request", ["path"], registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )  # fmt: skip
        self.draws = Histogram(
            "selfensemble_draws", "Noise draws of an image", registry=self.registry,
            buckets=(1, 2, 3, 4, 6, 8, 10, 20, 50, 100, 1000),
        )  # fmt: skip
        for name, about in (("waiting", "Images in the queue"), ("passes", "Passes of the network so far")):
            gauge = Gauge(f"selfensemble_{name}", about, registry=self.registry)
            gauge.set_function(lambda name=name: getattr(self.batcher, name, 0))  # type: ignore[misc]

    def start(self) -> None:
        """Begin to take requests."""
        self.batcher = Batcher(self.ensemble, torch.zeros(1, *self.shape), self.settings.max_waiting)

    def stop(self) -> None:
        """End what was taken."""
        if self.batcher is not None:
            self.batcher.close()

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken."""
        return self.batcher is not None and self.batcher.waiting < self.settings.max_waiting

    def about(self) -> dict[str, Any]:
        """Of `/v1/model`."""
        return {
            "classes": self.classes, "shape": self.shape, "draws": self.settings.draws or self.ensemble.draws,
            "stop": self.settings.stop, "calibrated": self.ensemble.stopping is not None,
            "keyed": self.settings.secret is not None,
            "limits": self.settings.model_dump(exclude={"api_key", "secret"}),
        }  # fmt: skip

    def check_count(self, images: int) -> None:
        """Raise unless a request may have as many images."""
        if images > self.settings.max_images:
            raise HTTPException(
                413, f"{images} images, at most {self.settings.max_images} a request are taken"
            )

    @staticmethod
    def decoded(text: str, place: int) -> bytes:
        """The bytes of an image in JSON."""
        try:
            return decode_base64(text)
        except ImageError as error:
            raise HTTPException(422, f"image {place}: {error}") from None

    async def answer(self, files: list[bytes], options: schemas.Options) -> schemas.Response:
        """Open, compute, and name the classes."""
        self._check(options)
        opened = await asyncio.to_thread(self._open, files)
        inputs = scaled(opened)
        try:
            async with asyncio.timeout(self.settings.timeout):
                answers = await self._predict(inputs, opened, options)
                decided = await self._job(self._decide, inputs, options.decide)
                certified = await self._job(self._certify, inputs, options.certify)
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.settings.timeout:g} s") from None
        except BusyError as error:
            headers = {"Retry-After": str(self.settings.retry_after)}
            raise HTTPException(429, f"{error}: come back later", headers) from None
        except ClosedError as error:
            raise HTTPException(503, str(error)) from None
        except ValueError as error:  # what this network cannot do
            raise HTTPException(422, str(error)) from None
        for each in answers:
            self.draws.observe(each.draws)
        return schemas.Response(
            images=[
                self._named(answer, options.top, decided[place], certified[place])
                for place, answer in enumerate(answers)
            ]
        )

    def _check(self, options: schemas.Options) -> None:
        limits = self.settings
        asked: list[tuple[str, int | None, int]] = [("draws", options.draws, limits.max_draws)]
        if options.decide is not None:
            asked.append(("decide.max_draws", options.decide.max_draws, limits.max_draws))
        if options.certify is not None:
            asked.append(("certify.n", options.certify.n, limits.max_certify))
            asked.append(("certify.n0", options.certify.n0, limits.max_certify))
        for name, value, most in asked:
            if value is not None and value > most:
                raise HTTPException(422, f"{name} may be at most {most} here, got {value}")

    def _open(self, files: list[bytes]) -> list[Tensor]:
        opened = []
        for place, data in enumerate(files):
            try:
                opened.append(open_image(data, self.shape, self.settings.max_pixels))
            except TooLargeError as error:
                raise HTTPException(413, f"image {place}: {error}") from None
            except ImageError as error:
                raise HTTPException(422, f"image {place}: {error}") from None
        return opened

    @property
    def _batcher(self) -> Batcher:
        if self.batcher is None:
            raise ClosedError("the server has not started")
        return self.batcher

    async def _predict(
        self, inputs: Tensor, opened: list[Tensor], options: schemas.Options
    ) -> Sequence[Answer]:
        # A number of draws in the request alone takes them all.
        stop = options.stop if options.stop or options.draws else self.settings.stop
        draws = options.draws or self.settings.draws
        if self.settings.secret is not None:
            seeds = [keyed_seed(self.settings.secret, image) for image in opened]
            job = self._batcher.run(lambda: self._keyed(inputs, seeds, draws, stop))
            keyed: list[Answer] = await self._wait(job)
            return keyed
        rule = rule_for(stop, draws or self.ensemble.draws, draws is not None, self.ensemble.stopping)
        futures = self._batcher.submit(inputs, rule)
        found: list[Answer] = await asyncio.gather(*(self._wait(future) for future in futures))
        return found

    def _keyed(self, inputs: Tensor, seeds: list[int], draws: int | None, stop: Any) -> list[Answer]:
        """Each image on its own, with noise of its own seed."""
        found = []
        for image, seed in zip(inputs, seeds, strict=True):
            answer = self.ensemble.predict(image[None], draws=draws, stop=stop, seed=seed)
            found.append(Answer(answer.probabilities[0], answer.spread[0], int(answer.draws[0])))
        return found

    async def _job(self, work: Callable[[Tensor, Any], list[Any]], inputs: Tensor, asked: Any) -> list[Any]:
        if asked is None:
            return [None] * len(inputs)
        found: list[Any] = await self._wait(self._batcher.run(lambda: work(inputs, asked)))
        return found

    @staticmethod
    async def _wait(future: "Future[Any]") -> Any:
        return await asyncio.wrap_future(future)

    def _decide(self, inputs: Tensor, asked: schemas.Decide) -> list[schemas.DecisionAnswer]:
        found = decide(self.ensemble, inputs, alpha=asked.alpha, max_draws=asked.max_draws)
        columns = (found.label, found.leader, found.low, found.high, found.draws)
        return [
            schemas.DecisionAnswer(
                label=self._name(label), leader=self.classes[leader], low=low, high=high, draws=draws,
                alpha=asked.alpha,
            )
            for label, leader, low, high, draws in zip(*(each.tolist() for each in columns), strict=True)
        ]  # fmt: skip

    def _certify(self, inputs: Tensor, asked: schemas.Certify) -> list[schemas.CertificateAnswer]:
        found = certify(self.ensemble, inputs, **asked.model_dump())
        columns = (found.label, found.radius, found.draws)
        return [
            schemas.CertificateAnswer(label=self._name(label), radius=radius, draws=draws, alpha=asked.alpha)
            for label, radius, draws in zip(*(each.tolist() for each in columns), strict=True)
        ]

    def _name(self, label: int) -> str | None:
        return self.classes[label] if label >= 0 else None

    def _named(self, answer: Answer, top: int, decided: Any, certified: Any) -> schemas.ImageAnswer:
        best = answer.probabilities.topk(min(top, len(self.classes))).indices.tolist()
        spread = [float(each) for each in answer.spread]
        shown = [
            schemas.ClassAnswer(
                label=self.classes[k], probability=float(answer.probabilities[k]),
                spread=spread[k] if math.isfinite(spread[k]) else None,
            )
            for k in best
        ]  # fmt: skip
        return schemas.ImageAnswer(
            label=shown[0].label, probability=shown[0].probability, draws=answer.draws, classes=shown,
            decision=decided, certificate=certified,
        )  # fmt: skip


def keyed_seed(secret: str, image: Tensor) -> int:
    """A seed that only who knows the secret can tell from the image."""
    code = hmac.new(secret.encode(), image.contiguous().numpy().tobytes(), hashlib.sha256)
    return int.from_bytes(code.digest()[:8], "big") >> 2


class _Gate:
    """Around the application: the key, the size of the body, and what is counted."""

    def __init__(self, app: ASGIApp, settings: Settings, service: Service) -> None:
        self.app, self.settings, self.service = app, settings, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, began = scope["path"], perf_counter()
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._let_in(scope, receive, counted)
        finally:
            known = path if path in _PATHS else "other"
            self.service.requests.labels(known, str(status)).inc()
            self.service.seconds.labels(known).observe(perf_counter() - began)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN and not self._has_key(headers.get(b"x-api-key", b"")):
            await _problem(401, "the header X-API-Key is missing or wrong")(scope, receive, send)
            return
        too_large = _problem(413, f"the body is larger than {self.settings.max_body:,} bytes")
        try:
            announced = int(headers.get(b"content-length", b"0"))
        except ValueError:
            announced = 0
        if announced > self.settings.max_body:
            await too_large(scope, receive, send)
            return
        # A body without a length, or a longer one than it says, is counted as it comes.
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.settings.max_body:
                await too_large(scope, receive, send)
                return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, replay, send)

    def _has_key(self, given: bytes) -> bool:
        wanted = self.settings.api_key
        return wanted is None or hmac.compare_digest(given, wanted.encode())


_PATHS = {"/v1/predict", "/v1/predict/files", "/v1/model", "/health", "/ready", "/metrics", "/openapi.json"}
Respond = Callable[[Scope, Receive, Send], Awaitable[None]]


def _problem(status: int, text: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status, headers=headers)


def _first(errors: Sequence[Any]) -> str:
    """The first of pydantic's complaints, on a line."""
    if not errors:
        return "the request is not valid"
    place = ".".join(str(part) for part in errors[0].get("loc", ()) if part != "body")
    return f"{place}: {errors[0].get('msg', 'not valid')}".lstrip(": ")


def _version() -> str:
    from importlib.metadata import version

    return version("selfensemble")
