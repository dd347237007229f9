"""Answers that say what is wrong."""

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse

from .schemas import Problem

# What a route that takes images may say instead of an answer, for its description.
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 413, 422, 429, 503, 504)
}


def problem(status: int, text: str, headers: Any = None) -> JSONResponse:
    """Of the form of `schemas.Problem`."""
    return JSONResponse({"error": text}, status_code=status, headers=headers)


def first(errors: Sequence[Any]) -> str:
    """The first of pydantic's complaints, on a line."""
    if not errors:
        return "the request is not valid"
    if errors[0].get("type") == "json_invalid":
        return f"the body is no JSON: {errors[0].get('ctx', {}).get('error', 'it cannot be read')}"
    place = ".".join(str(part) for part in errors[0].get("loc", ()) if part != "body")
    return f"{place}: {errors[0].get('msg', 'not valid')}".lstrip(": ")
