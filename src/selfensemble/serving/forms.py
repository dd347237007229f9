"""Options that come as fields of a form: alone, or as JSON in one of them."""

import json
from collections.abc import Iterable
from typing import Any

from fastapi import HTTPException
from pydantic import ValidationError

from ..runtime.checking import explained
from .schemas import Options

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
            given = {name: _json(name, value) if name in _PARTS else value}
        if twice := sorted(found.keys() & given.keys()):
            raise HTTPException(422, f"{twice[0]}: given twice")
        found |= given
    try:
        return Options.model_validate(found)
    except ValidationError as error:
        raise HTTPException(422, f"options: {explained(error.errors(), found, Options)}") from None


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise HTTPException(422, f"{name}: this is no JSON") from None
