"""Options of every command that takes images to work on, as they are written, and what they say."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from .option_groups import takes


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
    size: Annotated[int | None, typer.Option(min=1, help="Side that images are cropped and resized to.")] = (
        None
    )
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for colour.")] = None
    test_split: Annotated[
        str | None, typer.Option("--test-split", "--split", help="Name of the test split.")
    ] = None
    train_split: Annotated[
        str | None,
        typer.Option(help="Name of the training split; the same name for both divides that split."),
    ] = None
    image_column: Annotated[str | None, typer.Option(help="Name of the image column.")] = None
    label_column: Annotated[str | None, typer.Option(help="Name of the label column.")] = None
    revision: Annotated[str | None, typer.Option(help="Revision of a data set of the Hub.")] = None

    def given(self) -> dict[str, Any]:
        """What was said of how images are to be read."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "data"}
        return {name: value for name, value in values.items() if value is not None}


NO_DATA = DataOptions()


takes_data = takes(DataOptions, "data")
