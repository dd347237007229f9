"""Connections have their own time limits, and none of them keeps the server from stopping.

uvicorn waits forever for headers, for a body and for a client that does not read its answer.
"""

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_IDLE = 15.0  # seconds that a connection may stay after it was to be closed, or its answer was sent
_GRACE = 8  # seconds in which what was taken is answered when the server stops


class Connection(H11Protocol):
    """HTTP/1.1 that ends when its client takes longer than it may.

    Attributes:
        headers_within, request_within: seconds for the headers of a request; for all of it, its answer read.
    """

    headers_within = 10.0
    request_within = 60.0
    _phase: tuple[str, int] = ("", 0)
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def is_receiving(self) -> bool:
        """Whether the client has begun with a request that has not come as a whole."""
        return self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body

    def _watch(self) -> None:
        """Begin another time limit where the connection is in another state."""
        phase, seconds = self._now()
        if phase != self._phase:
            self._phase = phase
            if self._timer is not None:
                self._timer.cancel()
            # abort() throws away what the client does not read; close() would wait for it.
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _now(self) -> tuple[tuple[str, int], float]:
        request = id(self.cycle)
        if self.cycle is not None and not self.cycle.response_complete:
            return ("request", request), self.request_within
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            return ("headers", request), self.headers_within
        return ("idle", request), _IDLE  # uvicorn closes it before, unless the client still sends or reads


class Server(uvicorn.Server):
    """Stops within a few seconds whatever its clients do."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.is_receiving:
                connection.transport.abort()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):  # of clients that do not read their answers
            connection.transport.abort()


def configured(app: Any, request_within: float, headers_within: float) -> uvicorn.Config:
    """Of a server with these time limits, in seconds."""
    limits = {"headers_within": headers_within, "request_within": request_within}
    protocol = type("LimitedConnection", (Connection,), limits)
    return uvicorn.Config(
        app, http=protocol, ws="none", log_config=None, log_level=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=_GRACE, limit_concurrency=None,
        h11_max_incomplete_event_size=64 * 1024,
    )  # fmt: skip
