"""Options of every command that takes images to work on, as they are written, and what they say."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are to be read; see `load_data`."""

    data: Annotated[
        str | None,
        typer.Option(
            help="digits, cifar10, ..., a hub id, a folder, a csv or npz file, or package.module:attribute "
            "of a torch Dataset; overrides the recipe's."
        ),
    ] = None
    size: Annotated[int | None, typer.Option(min=1, help="Side that images are cut and resized to.")] = None
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for colour.")] = None
    test_split: Annotated[
        str | None, typer.Option("--test-split", "--split", help="What the test split is called there.")
    ] = None
    train_split: Annotated[
        str | None,
        typer.Option(help="The same of the training split; one name for both: it is cut."),
    ] = None
    image_column: Annotated[str | None, typer.Option(help="Name of the column of images.")] = None
    label_column: Annotated[str | None, typer.Option(help="Name of the column of labels.")] = None
    revision: Annotated[str | None, typer.Option(help="Of a data set of the Hub.")] = None

    def given(self) -> dict[str, Any]:
        """What was said of how images are to be read."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "data"}
        return {name: value for name, value in values.items() if value is not None}


NO_DATA = DataOptions()


def takes_data(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `DataOptions` in place of its parameter `data`."""
    signature = inspect.signature(command)
    hints = get_type_hints(DataOptions, include_extras=True)
    added = [
        inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[each.name], default=each.default
        )
        for each in fields(DataOptions)
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        chosen = {parameter.name: values.pop(parameter.name) for parameter in added}
        command(**values, data=DataOptions(**chosen))

    kept: list[inspect.Parameter] = []
    for name, each in signature.parameters.items():
        kept += added if name == "data" else [each.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in kept} | {"return": None}
    del run.__wrapped__  # typer would look there
    return run
