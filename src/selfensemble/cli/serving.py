"""The command that puts a saved ensemble behind HTTP."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from .arguments import checked_options, in_precision
from .base import Device, Model, app
from .opening import Opened, open_network
from .options import OPTIONS, NetworkOptions, takes_network

if TYPE_CHECKING:
    from ..ensemble.ensemble import SelfEnsemble

_Host = Annotated[str, typer.Option(help="Address to listen on; only this machine by default.")]
_Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one and prints it.")]
_Draws = Annotated[int | None, typer.Option(min=1, help="Noise draws, unless a request sets them.")]
_Stop = Annotated[str | None, typer.Option(help="exact or calibrated, unless a request sets it.")]
_Key = Annotated[
    str | None,
    typer.Option(
        envvar="SELFENSEMBLE_API_KEY", help="Key that requests must send, in X-API-Key or as Bearer."
    ),
]
_Secret = Annotated[
    str | None,
    typer.Option(
        envvar="SELFENSEMBLE_SECRET", help="Secret: noise becomes a function of it and of the image."
    ),
]
_Attacks = Annotated[
    bool | None,
    typer.Option(help="Offer attacks on the page; by default if only this machine can reach it."),
]
_Samples = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder of sample images for the page.")
]
_Timeout = Annotated[
    float, typer.Option(help="Time limit in seconds for receiving a request, and for answering it.")
]
_Cors = Annotated[
    list[str] | None,
    typer.Option(
        help="Origin of web pages that can send requests (https://example.org), or *; repeat for more."
    ),
]
_Precision = Annotated[
    str | None,
    typer.Option(help="float32 or bf16; by default that of calibrated rules, or the faster one."),
]


@app.command()
@takes_network
def serve(
    model: Model,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    draws: _Draws = None,
    stop: _Stop = None,
    api_key: _Key = None,
    secret: _Secret = None,
    page: Annotated[bool, typer.Option(help="A page at / that shows the vote of the draws.")] = True,
    attacks: _Attacks = None,
    samples: _Samples = None,
    max_body: Annotated[int, typer.Option(min=1, help="Maximum bytes of a request.")] = 16 * 2**20,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Maximum images in the queue; more are refused.")
    ] = 256,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum pixels of an image as it is sent.")
    ] = 25_000_000,
    max_certify: Annotated[int, typer.Option(min=1, help="Maximum noise draws for a certificate.")] = 10_000,
    timeout: _Timeout = 30.0,
    cors: _Cors = None,
    access_log: Annotated[bool, typer.Option(help="Log a line for each request, on stderr.")] = True,
    precision: _Precision = None,
    device: Device = "auto",
    network: NetworkOptions = OPTIONS,
) -> None:
    """Answer images over HTTP: POST /v1/predict; see /openapi.json."""
    from ..runtime.memory import keep_freed_memory
    from ..serving.run import run
    from ..serving.settings import Settings

    keep_freed_memory(_KEPT)
    is_local = host in ("127.0.0.1", "localhost", "::1")
    if not is_local and api_key is None:
        raise InputError(
            f"{host} may be reached from other machines: pass --api-key (or SELFENSEMBLE_API_KEY), or keep "
            "the default --host"
        )
    settings = checked_options(
        Settings,
        {"draws": draws, "stop": stop, "api_key": api_key, "secret": secret, "max_body": max_body,
         "max_waiting": max_waiting, "max_pixels": max_pixels, "max_certify": max_certify, "timeout": timeout,
         "cors": tuple(cors or ()), "access_log": access_log, "page": page, "samples": samples,
         "attacks": page and (is_local if attacks is None else attacks)},
    )  # fmt: skip
    opened = open_network(model, network)
    ensemble, classes, shape = _loaded(opened, device, precision)
    run(
        ensemble, classes, shape, settings, host, port, name=opened.name, metrics=opened.config.metrics,
        centre=opened.centre,
    )  # fmt: skip


_KEPT = 8 * 2**20  # bytes of the largest block of memory that is kept for the next request


def _loaded(
    opened: Opened, device: str, precision: str | None
) -> tuple["SelfEnsemble", tuple[str, ...], tuple[int, int, int]]:
    """The ensemble as it will answer, the names of its classes and the shape of its images."""
    import torch

    target = device_named(device)
    ensemble = opened.ensemble.to(target)
    shape = opened.image_shape
    example = torch.zeros(2, *shape, dtype=torch.float32, device="cpu")
    # Rules are about a precision; without --precision it is theirs, first of all that of the stops.
    rules = [rule.precision for rule in (ensemble.stopping, ensemble.sets) if rule is not None]
    ensemble = in_precision(ensemble, example, precision or next(iter(rules), None))
    count = ensemble.eval().predict(example).probabilities.shape[1]
    classes = opened.config.classes or tuple(map(str, range(count)))
    if len(classes) != count:
        raise InputError(
            f"{opened.name} has {count} outputs and the names of {len(classes)} classes: save it with as many"
        )
    return ensemble, classes, shape
