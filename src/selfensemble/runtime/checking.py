"""Values that users write, checked against pydantic models; what is wrong is said in our own words."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

Checked = TypeVar("Checked")
_Place = tuple[int | str, ...]
_SHOWN = 80  # characters of a value that is wrong
_UNKNOWN = ("extra_forbidden", "invalid_key")  # the second is no text
_LISTED = 5  # complaints at a time

# What a value must be, by pydantic's name of the error; in braces what the error holds.
_MUST = {
    "bool_type": "be true or false",
    "bool_parsing": "be true or false",
    "int_type": "be a whole number",
    "int_parsing": "be a whole number",
    "int_parsing_size": "be a whole number of fewer digits",
    "int_from_float": "be a whole number",
    "float_type": "be a number",
    "float_parsing": "be a number",
    "finite_number": "be a finite number",
    "greater_than": "be above {gt}",
    "greater_than_equal": "be {ge} or more",
    "less_than": "be below {lt}",
    "less_than_equal": "be {le} or less",
    "string_type": "be text",
    "string_unicode": "be text",
    "string_too_short": "have {min_length} characters or more",
    "string_too_long": "have {max_length} characters or fewer",
    "string_pattern_mismatch": "be of the form {pattern}",
    "literal_error": "be {expected}",
    "path_type": "be a path",
    "too_short": "have {min_length} entries or more",
    "too_long": "have {max_length} entries or fewer",
    "list_type": "be a list",
    "tuple_type": "be a list",
    "dict_type": "hold keys and values",
    "mapping_type": "hold keys and values",
    "model_type": "hold keys and values",
    "model_attributes_type": "hold keys and values",
    "recursion_loop": "not hold itself",
    "none_required": "be left out",
}


def checked(schema: type[Checked], values: Any, what: str) -> Checked:
    """`values` as `schema` has them: a pydantic model, or another type that pydantic knows.

    Raises:
        ValueError: they do not fit; the message begins with `what` and names every key.
    """
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        reasons = explained(error.errors(include_url=False), values, schema, whole="")
        raise ValueError(what + (reasons if reasons.startswith(" ") else f": {reasons}")) from error


def explained(
    errors: Sequence[Any], values: Any, schema: Any = None, *, whole: str = "it", show: bool = True
) -> str:
    """What pydantic found, in a line: a part for each place; unknown keys first, which explain missing ones.

    Args:
        errors: of a `ValidationError`.
        values: what was checked, as far as it is known.
        schema: what they were checked against, to name the keys that are known.
        whole: what to call all of `values`.
        show: whether to print what stands at a place; False for secrets.
    """
    placed: dict[_Place, list[Any]] = {}
    for error in errors:
        placed.setdefault(_place(error, values), []).append(error)
    # Of the kinds of a union, that which fits further is what was meant.
    deepest = [
        place
        for place in placed
        if not any(other[: len(place)] == place and other != place for other in placed)
    ]
    deepest.sort(key=lambda place: placed[place][0]["type"] not in _UNKNOWN)
    parts = [_part(place, placed[place], values, schema, whole, show) for place in deepest]
    more = [f"and {len(parts) - _LISTED} more"] if len(parts) > _LISTED else []
    return "; ".join(parts[:_LISTED] + more)


def _place(error: Any, values: Any) -> _Place:
    """Keys and numbers that lead to what is wrong; pydantic also names the kinds of a union on the way."""
    place: list[int | str] = []
    for part in error["loc"]:
        if _holds(values, part):
            place.append(part)
            values = values[part]
    return (*place, *error["loc"][-1:]) if error["type"] == "missing" else tuple(place)


def _holds(values: Any, part: Any) -> bool:
    if isinstance(values, Mapping):
        return part in values
    return isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)


def _at(values: Any, place: _Place) -> Any:
    for part in place:
        values = values[part]
    return values


def _part(place: _Place, errors: list[Any], values: Any, schema: Any, whole: str, show: bool) -> str:
    """What is wrong at one place."""
    name = ".".join(str(part) for part in place) or whole
    kind = errors[0]["type"]
    if kind in _UNKNOWN:
        known = _known_keys(schema, place[:-1], values)
        return f"unknown key {name}" + (f"; known here: {', '.join(known)}" if known else "")
    if kind == "missing":
        return f"{name} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = ", ".join(_tags(schema, place, values))
        return ".".join(map(str, (*place, "name"))) + f" must be one of {tags}"
    own = [str(each["ctx"]["error"]) for each in errors if each["type"] == "value_error" and each.get("ctx")]
    if own:
        return f"{name}{' ' if own[0].startswith('must ') else ': '}{own[0]}" if place else own[0]
    must = dict.fromkeys(_must(each) for each in errors if each["type"] in _MUST)
    wrong = f"{name} must {' or '.join(must)}" if must else f"{name} is not valid"
    return f"{wrong}, got {_shortened(errors[0]['input'])}" if show else wrong


def _must(error: Any) -> str:
    bounds = error.get("ctx") or {}
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in bounds.items()}
    return _MUST[error["type"]].format(**shown)


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a huge number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _tags(schema: Any, place: _Place, values: Any) -> list[str]:
    return [str(kind.model_fields["name"].default) for kind in _kinds(schema, place, values)]


def _known_keys(schema: Any, place: _Place, values: Any) -> list[str]:
    """Keys of the section at a place; where it has several kinds, of the one that its `name` says."""
    kinds = _kinds(schema, place, values)
    named = [kind for kind in kinds if len(kinds) > 1 and _is_named(kind, _at(values, place))]
    return list((named or kinds)[0].model_fields) if kinds else []


def _kinds(schema: Any, place: _Place, values: Any) -> list[type[BaseModel]]:
    """The models that a place may hold."""
    kinds = list(_models(schema))
    for part in place:
        if not isinstance(part, int):  # in a list each entry has the kind of all
            fields = [kind.model_fields for kind in kinds if _is_named(kind, values) or len(kinds) == 1]
            found = fields[0].get(part) if fields else None
            kinds = [] if found is None else list(_models(found.annotation))
        values = values[part]
    return kinds


def _is_named(kind: type[BaseModel], values: Any) -> bool:
    field = kind.model_fields.get("name")
    return isinstance(values, Mapping) and field is not None and field.default == values.get("name")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type: one, or several in a union, which may be annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _models(part)
