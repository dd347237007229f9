"""What users write wrongly is said in words of this package, with its place."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import Field, ValidationError
from pydantic_core.core_schema import ErrorType

from selfensemble.noise.randomness import AnyRandomness
from selfensemble.runtime.checking import checked, explained
from selfensemble.runtime.schema import Bounds, Count, Positive, Section, Seed
from selfensemble.runtime.texts import parsed_json, parsed_yaml, read_json


class Part(Section):
    kind: Literal["a", "b"] = "a"
    std: Positive | tuple[Positive, ...] = 1.0


class Whole(Section):
    name: Annotated[str, Field(min_length=2, max_length=5, pattern="^[a-z]+$")]
    count: Count = 1
    seed: Seed = 0
    flag: bool = False
    bounds: Bounds = (0.0, 1.0)
    parts: tuple[Part, ...] = ()
    table: dict[str, float] | None = None
    path: Path | None = None
    randomness: AnyRandomness | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (3, "^here must hold keys and values, got 3$"),
        ({}, "^here: name is missing$"),
        ({"nmae": "x"}, "^here: unknown key nmae; known here: name, count.*; name is missing$"),
        ({"name": "abc", "count": 0}, "^here: count must be 1 or more, got 0$"),
        ({"name": "abc", "count": "many"}, "count must be a whole number, got 'many'"),
        ({"name": "abc", "count": 1.5}, "count must be a whole number, got 1.5"),
        ({"name": "abc", "count": "9" * 5000}, r"be a whole number of fewer digits, got '99.*\.\.\.$"),
        ({"name": "abc", "count": None, "flag": "x"}, "whole number.*; flag must be true or false"),
        ({"name": "abc", "seed": 2**63}, "seed must be below"),
        ({"name": 3}, "name must be text, got 3"),
        ({"name": "a"}, "name must have 2 characters or more, got 'a'"),
        ({"name": "abcdefg"}, "name must have 5 characters or fewer"),
        ({"name": "ABC"}, "name must be of the form"),
        ({"name": "abc", "bounds": [1, 0]}, "^here: bounds must be the lowest and the highest value"),
        ({"name": "abc", "bounds": [0]}, "bounds.1 is missing"),
        ({"name": "abc", "bounds": [0, float("nan")]}, "bounds.1 must be a finite number, got nan"),
        ({"name": "abc", "bounds": [0, 1, 2]}, "bounds must have 2 entries or fewer"),
        ({"name": "abc", "parts": {"std": 1}}, "parts must be a list"),
        ({"name": "abc", "parts": [{"std": 0}]}, "parts.0.std must be above 0 or be a list, got 0"),
        ({"name": "abc", "parts": [{"std": [1, -1]}]}, "^here: parts.0.std.1 must be above 0, got -1$"),
        ({"name": "abc", "parts": [{"kind": "c"}]}, "parts.0.kind must be 'a' or 'b', got 'c'"),
        ({"name": "abc", "parts": [{}, {"knid": 1}]}, "unknown key parts.1.knid; known here: kind, std"),
        ({"name": "abc", "table": {"x": "y"}}, "table.x must be a number, got 'y'"),
        ({"name": "abc", "path": 3}, "path must be a path, got 3"),
        ({"name": "abc", 3: 4}, "unknown key 3"),
        ({"name": "abc", "randomness": {}}, "randomness.name must be one of parametric-noise, .*dropout"),
        ({"name": "abc", "randomness": {"name": "magic"}}, "randomness.name must be one of"),
        ({"name": "abc", "randomness": {"name": "dropout", "p": 7}}, "randomness.p must be below 1, got 7"),
        ({"name": "abc", "randomness": {"name": "dropout", "q": 1}}, "key randomness.q; known here: .*p"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_our_words(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        checked(Whole, values, "here")
    assert isinstance(caught.value.__cause__, ValidationError)
    for theirs in ("\n", "Input should", "tuple[", "constrained"):
        assert theirs not in str(caught.value)


def test_no_text_of_pydantic_is_passed_on() -> None:
    """Whatever kind of error it may find, those that no schema here can raise among them."""
    context = dict.fromkeys(
        ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern", "expected", "error"), 7
    )
    for kind in get_args(ErrorType):
        found = [{"type": kind, "loc": ("key",), "msg": "theirs", "input": 1, "ctx": context}]
        text = explained(found, {"key": 1})
        assert text.startswith(("key ", "unknown key key", "key: ", "key.name ", "key.key is missing")), (
            kind,
            text,
        )
        assert "theirs" not in text


def test_secrets_are_not_shown() -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate({"name": "A secret"})
    assert "secret" not in explained(caught.value.errors(), {"name": "A secret"}, Whole, show=False)


def test_texts_say_where_they_are_wrong(tmp_path: Path) -> None:
    for text in ("a: [\nb", "a\tb: [\x00]", "? [1]\n: 2"):
        with pytest.raises(ValueError, match=r"^mine is not valid YAML(: see line \d+, column \d+)?$"):
            parsed_yaml(text, "mine")
    for text in ("{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        with pytest.raises(ValueError, match=r"^mine is no JSON( \(line 1, column \d+\))?$"):
            parsed_json(text, "mine")
    (tmp_path / "damaged.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"damaged\.json is no JSON.* the file is damaged: restore it"):
        read_json(tmp_path / "damaged.json", "restore it")
