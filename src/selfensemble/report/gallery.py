"""Pictures of attacked images, checked before any is shown."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..evaluation.results import Entry, Results
from ..runtime.packages import needs
from .shown import row_title, threat_model

with needs("selfensemble[report]"):
    from PIL import Image

GALLERY = "gallery.safetensors"
_ATTACKS_SHOWN = 6
_IMAGES_SHOWN = 8
_PIXELS_SHOWN = 200_000  # a row of a gallery; fewer images are shown of large ones
_MAGNIFICATIONS = (1, 2, 5, 10, 20, 50, 100)


def gallery(folder: Path, results: Results) -> dict[str, Any]:
    """Pictures of the strongest attack of every threat model, then of the others."""
    file = folder / GALLERY
    context: dict[str, Any] = {"missing": None, "attacks": [], "left_out": 0, "images": 0}
    if not file.is_file():
        return context | {"missing": f"There are no pictures: the run has no {GALLERY}."}
    tensors = _read_gallery(file, results)
    original = tensors["original"]
    if len(original) == 0 or not results.attacks:
        return context | {"missing": "There are no pictures: the gallery is empty."}
    if original.ndim != 4:
        shape = tuple(original.shape[1:])
        return context | {"missing": f"There are no pictures: inputs of shape {shape} are no images."}
    if original.shape[1] not in (1, 3):
        channels = f"{original.shape[1]} channels"
        return context | {"missing": f"There are no pictures: images of {channels} can not be shown."}
    entries = _strongest_first(results.attacks)
    pixels = original.shape[2] * original.shape[3]
    images = min(len(original), _IMAGES_SHOWN, max(1, _PIXELS_SHOWN // pixels))
    return context | {
        "attacks": [_pictures(entry, tensors, images, results) for entry in entries[:_ATTACKS_SHOWN]],
        "left_out": max(0, len(entries) - _ATTACKS_SHOWN),
        "images": images,
    }


def _strongest_first(attacks: Sequence[Entry]) -> list[Entry]:
    ranked: list[tuple[int, int, Entry]] = []
    threats = list(dict.fromkeys(threat_model(entry) for entry in attacks))
    for place, threat in enumerate(threats):
        group = sorted(
            (entry for entry in attacks if threat_model(entry) == threat), key=lambda each: each.accuracy
        )
        ranked += [(rank, place, entry) for rank, entry in enumerate(group)]
    return [entry for _, _, entry in sorted(ranked, key=lambda item: item[:2])]


def _read_gallery(file: Path, results: Results) -> dict[str, NDArray[Any]]:
    """The checked tensors of a gallery."""
    cure = f"run the evaluation again, or remove {GALLERY} for a report without pictures"
    try:
        tensors: dict[str, NDArray[Any]] = load_file(file)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): {cure}") from error
    images = ["original", *(entry.key for entry in results.attacks)]
    answers = ["label", "answer.clean", *(f"answer.{entry.key}" for entry in results.attacks)]
    if absent := [name for name in (*images, *answers) if name not in tensors]:
        raise ValueError(f"{file} is damaged: it holds no {absent[0]!r}: {cure}")
    shape = tensors["original"].shape
    for name in images:
        tensor = tensors[name]
        if len(shape) < 2 or tensor.shape != shape or tensor.dtype != np.float32:
            raise ValueError(f"{file} is damaged: {name!r} is {tensor.dtype} {tensor.shape}: {cure}")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{file} is damaged: {name!r} holds values that are not finite: {cure}")
    for name in answers:
        tensor = tensors[name]
        if tensor.shape != shape[:1] or tensor.dtype != np.int64:
            raise ValueError(f"{file} is damaged: {name!r} is {tensor.dtype} {tensor.shape}: {cure}")
    return tensors


def _pictures(
    entry: Entry, tensors: Mapping[str, NDArray[Any]], images: int, results: Results
) -> dict[str, Any]:
    classes = results.data.classes

    def name(label: int) -> str:
        return classes[label] if 0 <= label < len(classes) else f"class {label}"

    original, adversarial = tensors["original"][:images], tensors[entry.key][:images]
    change = adversarial - original
    largest = float(np.abs(change).max())
    fitting = [factor for factor in _MAGNIFICATIONS if factor * largest <= 0.5] if largest else [1]
    factor = max(fitting, default=1)
    samples = []
    for i in range(images):
        label, clean, answer = (
            int(tensors[which][i]) for which in ("label", "answer.clean", f"answer.{entry.key}")
        )
        samples.append(
            {
                "original": _data_uri(original[i]),
                "adversarial": _data_uri(adversarial[i]),
                "difference": _data_uri(0.5 + factor * change[i]),
                "label": name(label),
                "clean": name(clean),
                "clean_right": clean == label,
                "answer": name(answer),
                "right": answer == label,
                "l2": f"{float(np.sqrt(np.square(change[i]).sum())):.3f}",
                "linf": _linf(float(np.abs(change[i]).max())),
            }
        )
    return {
        "entry": entry,
        "title": row_title(entry),
        "threat": threat_model(entry, results.bounds),
        "magnification": factor,
        "samples": samples,
    }


def _data_uri(image: NDArray[Any]) -> str:
    """A PNG of (C, H, W) in [0, 1]; what lies outside is clipped."""
    pixels = np.rint(255 * np.clip(image, 0.0, 1.0)).astype(np.uint8)
    picture = Image.fromarray(
        pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _linf(distance: float) -> str:
    return f"{distance:.4f} ({255 * distance:.1f}/255)"
