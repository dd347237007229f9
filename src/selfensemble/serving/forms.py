"""JSON in bodies, every key once; and options as fields of a form: alone, or as JSON in one of them."""

import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError

from ..runtime.checking import explained
from .schemas import Options

_DIGITS = 20  # of numbers that are read
_SHOWN = 80  # letters of a key
_PARTS = {"decide", "certify"}  # options that are JSON


def options_of(fields: Iterable[tuple[str, Any]]) -> Options:
    """The options in the fields of a form, beside its images.

    An empty field says nothing, as browsers send those that were not filled in.

    Raises:
        HTTPException: 422 for fields that are not known, come twice, or hold something else.
    """
    found: dict[str, Any] = {}
    for name, value in fields:
        if name == "images" or value == "":
            continue
        if name != "options" and name not in Options.model_fields:
            known = ", ".join(["images", "options", *Options.model_fields])
            raise HTTPException(422, f"{name}: there is no such field; those of a form are {known}")
        if not isinstance(value, str):
            raise HTTPException(422, f"{name}: this is a file; send it as a plain field")
        if name == "options":
            given = _json(name, value)
            if not isinstance(given, dict):
                raise HTTPException(422, "options: must be a JSON object")
        else:
            given = {name: _json(name, value) if name in _PARTS else _typed(value)}
        if twice := sorted(found.keys() & given.keys()):
            raise HTTPException(422, f"{twice[0]}: given twice")
        found |= given
    try:
        return Options.model_validate(found)
    except ValidationError as error:
        raise HTTPException(422, f"options: {explained(error.errors(), found, Options)}") from None


def _typed(text: str) -> Any:
    """A whole number or a truth value that is written in a field; other text as it is."""
    if text.isascii() and text.removeprefix("-").isdecimal() and len(text) < _DIGITS:
        return int(text)
    return {"true": True, "on": True, "false": False, "off": False}.get(text.lower(), text)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`.

    Raises:
        HTTPException: 422 for a key that comes twice, of which `json` would take the last.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise HTTPException(422, f"{key[:_SHOWN]}: given twice")
        found[key] = value
    return found


class JsonRequest(Request):
    """A request whose JSON has every key once."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = json.loads(await self.body(), object_pairs_hook=once)
        return self._json


class JsonRoute(APIRoute):
    """A route that takes such requests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise HTTPException(422, f"{name}: this is not JSON") from None
