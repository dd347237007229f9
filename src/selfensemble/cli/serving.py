"""The command that puts a saved ensemble behind HTTP."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from .arguments import in_precision
from .base import Device, Model, app
from .opening import Opened, open_network
from .options import OPTIONS, NetworkOptions, takes_network

if TYPE_CHECKING:
    from ..ensemble.ensemble import SelfEnsemble


@app.command()
@takes_network
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen at; only this machine by default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8000,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Noise draws where a request does not say.")
    ] = None,
    stop: Annotated[
        str | None, typer.Option(help="exact or calibrated, where a request does not say.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SELFENSEMBLE_API_KEY", help="Requests must bring it in X-API-Key.")
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(envvar="SELFENSEMBLE_SECRET", help="Noise is a function of it and of the image."),
    ] = None,
    page: Annotated[bool, typer.Option(help="A page at / that shows the vote of the draws.")] = True,
    attacks: Annotated[
        bool | None,
        typer.Option(
            help="Attacks at the push of a button; by default where only this machine can reach it."
        ),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of images that the page offers.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 16 * 2**20,
    max_waiting: Annotated[int, typer.Option(min=1, help="Images in the queue; more are refused.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds for a request.")] = 30.0,
    precision: Annotated[
        str | None,
        typer.Option(help="float32 or bf16; by default that of calibrated rules, or the faster one."),
    ] = None,
    device: Device = "auto",
    network: NetworkOptions = OPTIONS,
) -> None:
    """Answer images over HTTP: POST /v1/predict; see /openapi.json."""
    try:
        from ..serving.run import run
        from ..serving.settings import Settings
    except ImportError as error:
        raise InputError(
            f"serving needs more packages ({error.name} is missing): pip install 'selfensemble[serve]'"
        ) from error
    is_local = host in ("127.0.0.1", "localhost", "::1")
    if not is_local and api_key is None:
        raise InputError(
            f"{host} may be reached from other machines: pass --api-key (or SELFENSEMBLE_API_KEY), or keep "
            "the default --host"
        )
    settings = Settings.model_validate(
        {"draws": draws, "stop": stop, "api_key": api_key, "secret": secret, "max_body": max_body,
         "max_waiting": max_waiting, "timeout": timeout, "page": page, "samples": samples,
         "attacks": page and (is_local if attacks is None else attacks)}
    )  # fmt: skip
    ensemble, classes, shape = _loaded(open_network(model, network), device, precision)
    run(ensemble, classes, shape, settings, host, port)


def _loaded(
    opened: Opened, device: str, precision: str | None
) -> tuple["SelfEnsemble", tuple[str, ...], tuple[int, int, int]]:
    """The ensemble as it will answer, the names of its classes and the shape of its images."""
    import torch

    from ..fast.optimize import faster_precision

    target = device_named(device)
    ensemble = opened.ensemble.to(target)
    example = torch.zeros(2, *opened.shape, dtype=torch.float32, device="cpu")
    # Rules are about a precision; without --precision it is theirs, first of all that of the stops.
    rules = [rule.precision for rule in (ensemble.stopping, ensemble.sets) if rule is not None]
    ensemble = in_precision(ensemble, example, precision or [*rules, faster_precision(target)][0])
    classes = opened.config.classes or tuple(
        map(str, range(ensemble.eval().predict(example).probabilities.shape[1]))
    )
    return ensemble, classes, opened.shape
