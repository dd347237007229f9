"""Names of the classes of networks of other libraries, and images whose labels are numbered by them."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..runtime.errors import InputError
from . import terminal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.images import ImageData
    from ..ensemble.ensemble import SelfEnsemble


def classes_of(
    network: "nn.Module", ensemble: "SelfEnsemble", images: "ImageData | None", example: "Tensor", name: str
) -> tuple[tuple[str, ...] | None, "ImageData | None"]:
    """Names of the classes, where they are known, and the images with their labels numbered so."""
    count = ensemble.predict(example, draws=1, seed=0).probabilities.shape[1]
    theirs = _names_of(network, count)
    if images is None:
        return theirs, None
    images = images if theirs is None else _spelled_as(images, theirs)
    if theirs is not None and set(images.classes) & set(theirs):
        return theirs, images.with_classes(theirs)
    if len(images.classes) != count:
        raise InputError(
            f"{name} answers with {count} classes, {images.name} has {len(images.classes)}: pass the data "
            "that it was trained on, or its number of classes in --network-args"
        )
    if theirs is not None and not all(each.isdecimal() for each in images.classes):
        terminal.note(
            f"{name} and {images.name} have no name of a class in common ({', '.join(theirs[:2])}, ... and "
            f"{', '.join(images.classes[:2])}, ...): classes are taken by their numbers"
        )
    return images.classes, images


def _names_of(network: "nn.Module", count: int) -> tuple[str, ...] | None:
    """Of the classes of a network of transformers, by number; None where it has none of its own."""
    known = getattr(getattr(network, "config", None), "id2label", None)
    if not isinstance(known, dict):
        return None
    names = {int(number): str(name) for number, name in known.items() if str(number).isdecimal()}
    if len(known) != count or set(names) != set(range(count)):  # in a file, "10" stands before "2"
        return None
    ordered = tuple(names[number] for number in range(count))
    return None if ordered == tuple(f"LABEL_{number}" for number in range(count)) else ordered


def _spelled_as(images: "ImageData", theirs: tuple[str, ...]) -> "ImageData":
    """The images, their classes named as the network spells them where names differ in capitals alone."""
    known = {name.casefold(): name for name in theirs}
    folded = [name.casefold() for name in images.classes]
    if len(known) < len(theirs) or len(set(folded)) < len(folded):
        return images
    return replace(images, classes=tuple(known.get(each.casefold(), each) for each in images.classes))
