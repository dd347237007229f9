"""The HTTP interface: routes for JSON and files, health, metrics; see `docs/serving.md`."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.formparsers import MultiPartParser

from ..ensemble.ensemble import SelfEnsemble
from . import schemas
from .forms import JsonRoute, options_of
from .gate import Gate
from .page import add_page, samples
from .problems import REFUSALS, in_words, problem, reasons
from .service import Service
from .settings import Settings


def create_app(
    ensemble: SelfEnsemble,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    settings: Settings,
    *,
    name: str = "",
    metrics: Mapping[str, Any] | None = None,
    centre: float = 1.0,
) -> FastAPI:
    """An application that answers with `ensemble`.

    Args:
        ensemble: in the form that predicts.
        classes: names, in the order of the outputs.
        shape: (channels, height, width) of its images.
        settings: limits.
        name, metrics: of the network, see `ArtefactConfig`, for those who ask what answers.
        centre: side of the central part of an image that is looked at, as a share; as in training.
    """
    # The gate holds a body in memory; a form in it is not to be written to a disk, which may be full.
    MultiPartParser.spool_max_size = max(MultiPartParser.spool_max_size, settings.max_body)
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, settings.max_pixels)
    service = Service(ensemble, tuple(classes), shape, settings, name, metrics, centre)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="selfensemble", version=version("selfensemble"), lifespan=lifespan, docs_url=None,
        redoc_url=None, description="A random self-ensemble: labels, certainty, certified radii.",
    )  # fmt: skip
    app.router.route_class = JsonRoute
    app.add_middleware(Gate, settings=settings, service=service)
    _add_problems(app)
    _add_answers(app, service)
    _add_health(app, service)
    if settings.page:
        service.samples = samples(settings.samples, shape)
        add_page(app, service)
    return app


def _add_problems(app: FastAPI) -> None:
    """Errors as JSON."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, reasons(error.errors(), error.body))

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        return problem(error.status_code, in_words(error.status_code, error.detail), error.headers)


def _add_answers(app: FastAPI, service: Service) -> None:
    """What answers images, and what tells of the network."""

    @app.post("/v1/predict", responses=REFUSALS)
    async def predict(request: schemas.Request) -> schemas.Response:
        """Answer images that are sent as base64 in JSON."""
        service.check_count(len(request.images))
        return await service.answer(request.images, request)

    @app.post("/v1/predict/files", responses=REFUSALS)
    async def predict_files(
        request: Request,
        images: Annotated[list[UploadFile], File(description="image files")],
        options: Annotated[
            str, Form(description="JSON with the options of /v1/predict, which may be fields as well")
        ] = "{}",
    ) -> schemas.Response:
        """Answer images that are sent as files of a form."""
        service.check_count(len(images))
        wanted = options_of((await request.form()).multi_items())
        return await service.answer([await each.read() for each in images], wanted)

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What answers: classes, shape of images, draws, what it can certify."""
        return service.about()


def _add_health(app: FastAPI, service: Service) -> None:
    """For those who watch over the server."""

    @app.get("/health", responses={503: {"model": schemas.Problem}})
    async def health() -> dict[str, str]:
        """Liveness: whether the process can compute. If not, restart it."""
        if not service.is_alive:
            raise HTTPException(503, "the thread that computes has ended: start the server again")
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"model": schemas.Problem}})
    async def ready() -> dict[str, str]:
        """Requests are taken, and answered: not while starting or stopping, nor when the network fails."""
        if (why := await service.why_not_ready()) is not None:
            raise HTTPException(503, f"not taking requests now: {why}")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(generate_latest(service.registry), media_type="text/plain; version=0.0.4")
