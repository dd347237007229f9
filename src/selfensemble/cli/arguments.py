"""What command-line arguments stand for: precisions, test data, images."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import InputError

if TYPE_CHECKING:
    import torch

    from ..ensemble.ensemble import SelfEnsemble


def in_precision(ensemble: "SelfEnsemble", example: "torch.Tensor", precision: str) -> "SelfEnsemble":
    """The ensemble for "float32", an optimised copy for "bf16"."""
    from ..fast.optimize import optimize

    if precision not in ("float32", "bf16"):
        raise InputError(f"--precision must be float32 or bf16, got {precision!r}")
    return optimize(ensemble, example, "bf16") if precision == "bf16" else ensemble


def image_files(paths: list[Path]) -> list[Path]:
    """Files as they are named, and all images within folders."""
    from ..data.decoding import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise InputError(f"no images in {path}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"no file {path}")
    return files


def read_image(path: Path, shape: tuple[int, int, int]) -> "torch.Tensor":
    """An image of that shape (channels, height, width), uint8."""
    from PIL import Image

    from ..data.decoding import prepare_image

    try:
        with Image.open(path) as image:
            return prepare_image(image, shape[0], (shape[1], shape[2]))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise InputError(f"cannot read {path} as an image: {error}") from error
