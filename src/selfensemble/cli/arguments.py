"""What command-line arguments stand for: precisions, test data, images."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..runtime.errors import InputError
from ..runtime.packages import needs

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel

    from ..ensemble.ensemble import SelfEnsemble

Options = TypeVar("Options", bound="BaseModel")


def in_precision(ensemble: "SelfEnsemble", example: "torch.Tensor", precision: str | None) -> "SelfEnsemble":
    """The ensemble for "float32", an optimised copy for "bf16"; by default what is faster on its device."""
    import torch

    from ..ensemble.checks import floating_dtype
    from ..fast.optimize import faster_precision, optimize
    from ..noise.injection import device_of_parameters

    if precision is None:
        wide = floating_dtype(ensemble) == torch.float64
        precision = "float32" if wide else faster_precision(device_of_parameters(ensemble))
    if precision not in ("float32", "bf16"):
        raise InputError(f"--precision must be float32 or bf16, got {precision!r}")
    return optimize(ensemble, example, "bf16") if precision == "bf16" else ensemble


def image_files(paths: list[Path], bad: list[tuple[Path, str]]) -> tuple[list[Path], list[str]]:
    """Files as they are named, and all images within folders that are not hidden.

    Args:
        paths: of files and folders.
        bad: gets what cannot be read, and why.

    Returns:
        The files, and what to say of others in the folders, which are no images by their names.
    """
    from ..data.decoding import IMAGE_SUFFIXES
    from ..data.folders import files_below

    files, others = list[Path](), list[str]()
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        closed, named = list[Path](), list[Path]()
        inside = sorted(files_below(path, closed=closed, named=named))
        images = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES]
        bad += [(folder, "a folder without permission to read") for folder in closed]
        if not images and not closed:
            bad.append((path, "a folder without images"))
        kinds = Counter(file.suffix.lower() or "without suffix" for file in inside) - Counter(
            file.suffix.lower() for file in images
        )
        if kinds:
            shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            others.append(f"files of {path} that are no images by their names were left out: {shown}")
        if named:
            others.append(f"folders of {path} that are images by their names, and searched: {len(named)}")
        files += images
    return files, others


def inputs_of(
    files: list[Path],
    shape: tuple[int, int, int],
    centre: float,
    bad: list[tuple[Path, str]],
    bounds: tuple[float, float] | None,
    assumed: list[str] | None = None,
) -> Iterator[tuple[list[Path], "torch.Tensor"]]:
    """Inputs (B, C, H, W) within the bounds, some files at a time; those that cannot be read go to `bad`.

    `assumed` gets what is taken for granted of each of the others, see `data.decoding.assumed`.
    """
    import torch

    from ..data.images import as_inputs, batch_size

    size = batch_size(256, shape)
    for start in range(0, len(files), size):
        good, images = [], []
        for path in files[start : start + size]:
            try:
                images.append(read_image(path, shape, centre, assumed))
            except InputError as error:
                bad.append((path, str(error).removeprefix(f"{_unreadable(path)}: ")))
            else:
                good.append(path)
        if good:
            yield good, as_inputs(torch.stack(images), bounds)


def read_image(
    path: Path, shape: tuple[int, int, int], centre: float = 1.0, assumed: list[str] | None = None
) -> "torch.Tensor":
    """An image of that shape (channels, height, width), uint8."""
    with needs("selfensemble[cli]"):
        from PIL import Image

    from ..data import decoding
    from ..data.folders import why_no_file

    if (why := why_no_file(path)) is not None:  # a pipe would be waited for, forever
        raise InputError(f"{_unreadable(path)}: {why}")
    try:
        with Image.open(path) as image:
            decoding.check_one_page(image)
            found = decoding.prepare_image(image, shape[0], (shape[1], shape[2]), centre)
            if assumed is not None:
                assumed.append(decoding.assumed(image))
            return found
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise InputError(f"{_unreadable(path)}: {decoding.reason(error)}") from error


def _unreadable(path: Path) -> str:
    return f"cannot read {path} as an image"


def checked_options(schema: "type[Options]", values: dict[str, Any]) -> "Options":
    """Settings that options of their names give; an error names the option, never what it holds.

    What an option holds may be a secret, and is in the command anyway.
    """
    from pydantic import ValidationError

    from ..runtime.checking import explained

    try:
        return schema.model_validate(values)
    except ValidationError as error:
        named = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
        found = [
            each | {"loc": (f"--{str(each['loc'][0]).replace('_', '-')}", *each["loc"][1:])}
            for each in error.errors(include_url=False)
        ]  # fmt: skip
        raise InputError(explained(found, named, show=False)) from None
