"""Answers that say what is wrong."""

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse

from ..runtime.checking import explained
from .schemas import Problem

# What a route that takes images may say instead of an answer, for its description.
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 413, 422, 429, 503, 504)
}

# What FastAPI and Starlette refuse themselves.
_REFUSED = {
    400: "the body cannot be read: see /openapi.json for what this address takes",
    404: "there is no such address: see /openapi.json",
    405: "this address takes another method: see /openapi.json",
}


def problem(status: int, text: str, headers: Any = None) -> JSONResponse:
    """Of the form of `schemas.Problem`."""
    text = text.encode(errors="backslashreplace").decode()  # a body may hold what no answer can
    return JSONResponse({"error": text}, status_code=status, headers=headers)


def in_words(status: int, text: str) -> str:
    """`text`, but for what the libraries refuse by themselves, with a status that nothing here uses."""
    return _REFUSED.get(status, text)


def reasons(errors: Sequence[Any], body: Any) -> str:
    """What pydantic and FastAPI found in a body or a form, on a line."""
    if not errors:
        return "the request is not valid"
    if errors[0].get("type") == "json_invalid":
        return f"the body is not JSON (at byte {errors[0]['loc'][-1]})"
    placed = [each | {"loc": [part for part in each["loc"] if part != "body"]} for each in errors]
    if texts := [each["loc"][0] for each in placed if each["type"] == "value_error"]:  # FastAPI's own
        return f"{texts[0]} must be files, sent with their names"
    return explained(placed, body, whole="the body")
