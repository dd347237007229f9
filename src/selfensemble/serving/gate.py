"""What stands before the application: keys, origins, sizes, time limits; what is counted and logged."""

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import suppress
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .logs import ACCESS, LOG
from .problems import problem
from .service import Service
from .settings import Settings

OPEN = {"/health", "/ready", "/", "/page.css", "/page.js", "/icon.svg"}  # what needs no key
_JSON = {"/v1/predict", "/v1/votes", "/v1/attack"}  # what takes a body of JSON
_FORM = "/v1/predict/files"
_POSTS = _JSON | {_FORM}
_PATHS = OPEN | _POSTS | {"/v1/model", "/metrics", "/openapi.json"}
_BODIES = 16  # times the largest body: bytes of all bodies that are held at a time
_FOREIGN = "pages of this origin may not ask: see --cors"
GONE = 499  # what is counted and logged where the client left before its answer


class _RefusedError(Exception):
    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.answer = problem(status, text, headers)


class _LeftError(Exception):
    """The client has closed the connection."""


class _Exchange:
    """What is sent as an answer to one request."""

    def __init__(self, scope: Scope, send: Send, added: list[tuple[bytes, bytes]]) -> None:
        self._send, self._added, self._bare = send, added, scope["method"] == "HEAD"
        self.status, self.started, self.ended = 500, False, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            message = {**message, "headers": [*message.get("headers", []), *self._added]}
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
            if self._bare:
                message = {**message, "body": b""}
        await self._send(message)


class Gate:
    """Around the application."""

    def __init__(self, app: ASGIApp, settings: Settings, service: Service) -> None:
        self.app, self.settings, self.service = app, settings, service
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, began = scope["path"], perf_counter()
        headers = {name.lower(): value for name, value in scope["headers"]}
        exchange = _Exchange(scope, send, self._origin_headers(headers))
        try:
            await self._answered(scope, headers, receive, exchange)
        except _LeftError:
            exchange.status = GONE
        except Exception as error:
            if not exchange.started:
                text = f"the server failed ({type(error).__name__}): see its log"
                await problem(500, text)(scope, receive, exchange.send)
            LOG.exception("%s %s failed", scope["method"], _shown(scope))
        finally:
            known, taken = path if path in _PATHS else "other", perf_counter() - began
            self.service.requests.labels(known, str(exchange.status)).inc()
            self.service.seconds.labels(known).observe(taken)
            client = (scope.get("client") or ("-",))[0]
            request = f"{client} {scope['method']} {_shown(scope)}"
            ACCESS.info("%s %d %.1f ms", request, exchange.status, 1000 * taken)

    async def _answered(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, exchange: _Exchange
    ) -> None:
        size = 0
        try:
            if await self._is_preflight(scope, headers, receive, exchange):
                return
            scope = self._admitted(scope, headers)
            async with asyncio.timeout(self.settings.timeout):
                body = bytearray()
                async for part in _parts(receive):
                    body += part
                    size += len(part)
                    self._take(len(body), len(part))
            await self._within(scope, bytes(body), receive, exchange)
        except TimeoutError:
            text = f"the request did not come within {self.settings.timeout:g} s"
            await _RefusedError(408, text, {"Connection": "close"}).answer(scope, receive, exchange.send)
        except _RefusedError as error:
            await error.answer(scope, receive, exchange.send)
        except asyncio.CancelledError:  # the server stops, and this took too long
            if not exchange.started:
                await problem(503, "the server is stopping")(scope, receive, exchange.send)
        finally:
            self._held -= size

    def _take(self, so_far: int, more: int) -> None:
        """Count what has come of a body."""
        self._held += more
        if so_far > self.settings.max_body:
            raise _RefusedError(413, f"the body is larger than {self.settings.max_body:,} bytes")
        if self._held > _BODIES * self.settings.max_body:
            headers = {"Retry-After": str(self.settings.retry_after)}
            raise _RefusedError(503, "too many large requests at a time: come back later", headers)

    async def _within(self, scope: Scope, body: bytes, receive: Receive, exchange: _Exchange) -> None:
        """Run the application, but not for a client that has gone."""
        left = asyncio.Event()
        bodies = [body]

        async def replay() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answering = asyncio.ensure_future(self.app(scope, replay, exchange.send))
        leaving = asyncio.ensure_future(leave())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not exchange.ended:
                raise _LeftError
            left.set()
            await answering
        finally:
            for task in (answering, leaving):
                task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await answering

    def _admitted(self, scope: Scope, headers: dict[bytes, bytes]) -> Scope:
        """The request as the application takes it, or an error that refuses it."""
        path, method = scope["path"], scope["method"]
        if path not in OPEN and not self._has_key(headers):
            raise _RefusedError(
                401, "the key is missing or wrong: send it as X-API-Key, or as Authorization: Bearer",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        try:
            announced = int(headers.get(b"content-length", b"0"))
        except ValueError:
            announced = 0
        if announced > self.settings.max_body:
            raise _RefusedError(413, f"the body is larger than {self.settings.max_body:,} bytes")
        if method == "HEAD":
            return {**scope, "method": "GET"}
        if method == "POST" and path in _POSTS and scope.get("query_string"):
            raise _RefusedError(422, "nothing is read from the address behind '?': send options in the body")
        if path == _FORM and headers.get(b"content-type", b"").lower().startswith(b"application/json"):
            raise _RefusedError(415, "JSON goes to /v1/predict: this address takes a form with files")
        if method == "POST" and path == _FORM and self._is_foreign(headers):
            raise _RefusedError(403, _FOREIGN)
        if method == "POST" and path in _JSON:
            return {**scope, "headers": _as_json(scope["headers"], headers)}
        return scope

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        wanted = self.settings.api_key
        if wanted is None:
            return True
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [headers.get(b"x-api-key", b"")] + [token.strip()] * (kind.lower() == b"bearer")
        return any(hmac.compare_digest(each, wanted.encode()) for each in given)

    def _is_foreign(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a browser sends this for a page of another origin, which is not allowed.

        Browsers send forms without asking first, whatever page they are on; other clients name no origin.
        """
        origin, allowed = headers.get(b"origin"), self.settings.cors
        if origin is None or "*" in allowed or origin.decode("latin-1") in allowed:
            return False
        if (site := headers.get(b"sec-fetch-site")) is not None:
            return site not in (b"same-origin", b"none")
        return origin.partition(b"://")[2] != headers.get(b"host", b"")

    def _origin_headers(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What lets a page from elsewhere read the answer, where it may."""
        origin, allowed = headers.get(b"origin"), self.settings.cors
        if not allowed or origin is None:
            return []
        if "*" not in allowed and origin.decode("latin-1") not in allowed:
            return [(b"vary", b"Origin")]
        return [
            (b"access-control-allow-origin", origin), (b"vary", b"Origin"),
            (b"access-control-expose-headers", b"Retry-After"),
        ]  # fmt: skip

    async def _is_preflight(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, exchange: _Exchange
    ) -> bool:
        """Answer a browser that asks what a page from elsewhere may do; it cannot send a key with that."""
        asks = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if not (asks and self.settings.cors):
            return False
        allowed = any(name == b"access-control-allow-origin" for name, _ in self._origin_headers(headers))
        answer = problem(403, _FOREIGN)
        if allowed:
            answer.body, answer.status_code = b"", 204
            answer.raw_headers = [
                (b"access-control-allow-methods", b"GET, HEAD, POST"), (b"access-control-max-age", b"600"),
                (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
            ]  # fmt: skip
        await answer(scope, receive, exchange.send)
        return True


def _as_json(sent: list[tuple[bytes, bytes]], headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Headers that say that the body is JSON, which is all that it can be.

    But what a browser sends for a page of another origin without asking first (forms, plain text) is refused:
    such a page must not make the server work.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind == b"multipart/form-data":
        raise _RefusedError(415, "a form goes to /v1/predict/files: this address takes JSON")
    if b"origin" in headers and kind != b"application/json":
        raise _RefusedError(415, "send Content-Type: application/json")
    return [*((name, value) for name, value in sent if name.lower() != b"content-type"),
            (b"content-type", b"application/json")]  # fmt: skip


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    """Of a body, as they come."""
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise _LeftError
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _shown(scope: Scope) -> str:
    """The path as it was sent, without what cannot stand in a line, and without what stands behind '?'."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return path.partition(b"?")[0].decode("ascii", "backslashreplace")[:200]
