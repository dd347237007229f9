"""What stands in front of the application: the key, the size of a body, and what is counted."""

import hmac
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import problem
from .service import Service
from .settings import Settings

OPEN = {"/health", "/ready", "/", "/page.css", "/page.js", "/icon.svg"}  # what needs no key
_PATHS = OPEN | {"/v1/predict", "/v1/predict/files", "/v1/model", "/v1/votes", "/v1/attack", "/metrics"}
_PATHS |= {"/openapi.json"}


class Gate:
    """Around the application."""

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
            await problem(401, "the header X-API-Key is missing or wrong")(scope, receive, send)
            return
        too_large = problem(413, f"the body is larger than {self.settings.max_body:,} bytes")
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
