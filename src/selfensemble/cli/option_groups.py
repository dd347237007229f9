"""Options that many commands share: written once, as the fields of a dataclass."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, get_type_hints

Command = Callable[..., None]


def takes(group: type[Any], parameter: str) -> Callable[[Command], Command]:
    """Give a command the options of a dataclass instead of one of its parameters.

    Args:
        group: a dataclass whose fields are annotated as options of typer, with defaults.
        parameter: of the command, which gets the dataclass. Options that the command has itself stay its own.
    """

    def give(command: Command) -> Command:
        signature = inspect.signature(command)
        hints = get_type_hints(group, include_extras=True)
        own = signature.parameters.keys() - {parameter}
        added = [
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[each.name], default=each.default
            )
            for each in fields(group)
            if each.name not in own
        ]

        @wraps(command)
        def run(**values: Any) -> None:
            chosen = {each.name: values.pop(each.name) for each in added}
            command(**values, **{parameter: group(**chosen)})

        kept: list[inspect.Parameter] = []
        for name, each in signature.parameters.items():
            kept += added if name == parameter else [each.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in kept} | {"return": None}
        del run.__wrapped__  # typer would look there
        return run

    return give
