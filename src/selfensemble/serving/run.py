"""The server process."""

import signal
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from ..ensemble.ensemble import SelfEnsemble
from ..runtime.errors import InputError
from .app import create_app
from .connections import Server, configured
from .logs import begin
from .settings import Settings


def run(
    ensemble: SelfEnsemble,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    settings: Settings,
    host: str,
    port: int,
    *,
    name: str = "",
    metrics: Mapping[str, Any] | None = None,
    centre: float = 1.0,
) -> None:
    """Serve until SIGINT or SIGTERM; requests that were taken are answered first.

    Raises:
        OSError: the address cannot be listened at.
    """
    app = create_app(ensemble, classes, shape, settings, name=name, metrics=metrics, centre=centre)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # those who read the line below wait for the server, and are not refused
        except OSError as error:
            raise InputError(
                f"cannot listen at {host}:{port} ({error.strerror}): pass another --host or --port"
            ) from error
        where = f"[{host}]" if ":" in host else host
        writer = begin(settings.access_log)
        print(f"listening at http://{where}:{listener.getsockname()[1]}", flush=True)  # noqa: T201
        longest = max(settings.timeout, settings.attack_timeout if settings.attacks else 0.0)
        config = configured(app, settings.timeout + longest + 10.0, settings.header_timeout)
        # Once all is answered uvicorn raises the signal that stopped it again; that is no failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        Server(config).run(sockets=[listener])
        writer.drain(1.0)
