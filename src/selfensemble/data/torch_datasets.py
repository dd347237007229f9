"""Images of any torch `Dataset`."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from ..noise.streams import stream_seed
from ..runtime.random_state import seeded_generators
from .arrays import check_wanted, cut_off
from .decoding import is_grey, prepare_image, size_upright
from .images import ImageData, Split
from .labels import class_names, number_names
from .reading import KNOWN_SPLITS, Reading
from .streaming import ITEM_SEED, Streamed, each_of

_IMAGES = ("image", "img", "pixel_values", "images", "input", "inputs", "x")
_LABELS = ("label", "labels", "target", "targets", "y", "class")
_LOOKED_AT = 32  # items that say whether there are colours, and whether labels are those of the attribute


def dataset_named(name: str, found: Any, split: Split, reading: Reading) -> ImageData:
    """One split of what stands under a name.

    Args:
        name: for errors.
        found: a `Dataset`, a mapping from splits to them, or a callable that returns one: with a parameter
            `split`, or `train`, called for each split.
        split: which.
        reading: see there.

    Raises:
        FileNotFoundError: a mapping without that split.
        ValueError, TypeError: it is nothing of the kind, or its items are no images and labels.
    """
    if callable(found) and not _is_dataset(found):
        make = found
        found, whole = _called(name, make, split, reading)
        if not whole and not isinstance(found, Mapping):
            data = from_dataset(found, name, reading)
            if split == "train":
                return data
            if _names_in(found, reading.label_column) is None:
                return data
            try:
                training, _ = _called(name, make, "train", reading)
            except Exception:  # of somebody's code: a test split alone is enough
                return data
            return _numbered_as(data, found, training, reading.label_column)
    if isinstance(found, Mapping):
        by_name = {str(key).casefold(): value for key, value in found.items()}
        chosen = [by_name[each.casefold()] for each in reading.names(split) if each.casefold() in by_name]
        if not chosen:
            raise FileNotFoundError(
                f"no {split} split in {name}: it has {', '.join(map(str, found))}; data.{split}_split, "
                f"--{split}-split name another, and one name for both cuts them out of it"
            )
        data = from_dataset(chosen[0], name, reading)
        if reading.cuts or split == "train":
            return cut_off(data, split, reading) if reading.cuts else data
        trained = [by_name[each.casefold()] for each in reading.names("train") if each.casefold() in by_name]
        return _numbered_as(data, chosen[0], trained[0], reading.label_column) if trained else data
    return cut_off(from_dataset(found, name, reading), split, reading)


def _numbered_as(data: ImageData, dataset: Any, training: Any, key: str | None) -> ImageData:
    """A test split with its classes numbered as in the training split, where both name them.

    Raises:
        ValueError: the training split lacks a class.
    """
    own, theirs = _names_in(dataset, key), _names_in(training, key)
    if own is None or theirs is None or tuple(map(str, own)) != data.classes:
        return data
    names = tuple(map(str, theirs))
    class_names(data.classes, names, data.name)
    return data.with_classes(names)


def _is_dataset(found: Any) -> bool:
    return not inspect.isclass(found) and hasattr(found, "__getitem__") and hasattr(found, "__len__")


def _called(name: str, make: Any, split: Split, reading: Reading) -> tuple[Any, bool]:
    """What it returns, and whether that is of both splits together."""
    try:
        parameters = dict(inspect.signature(make).parameters)
    except (TypeError, ValueError):  # of what is written in C
        parameters = {}
    needed = [
        key for key, each in parameters.items()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]  # fmt: skip
    given: dict[str, Any] = {}
    if "split" in parameters:
        given["split"] = reading.names(split)[0]
    elif "train" in parameters:
        asked = reading.names(split)[0]
        kinds = [kind for kind, known in KNOWN_SPLITS.items() if asked.casefold() in known]
        if not kinds:
            raise ValueError(
                f"{name} takes train=True or False, and data.{split}_split (--{split}-split) {asked!r} says "
                "neither: use train or test"
            )
        given["train"] = kinds[0] == "train"
    if set(needed) - given.keys():
        missing = ", ".join(key for key in needed if key not in given)
        raise TypeError(
            f"{name} needs {missing}: name a callable without arguments, or with one, split, or what it "
            "returns"
        )
    return make(**given), not given or reading.cuts


def from_dataset(dataset: Any, name: str, reading: Reading | None = None) -> ImageData:
    """All items of a `Dataset`, read where they are needed.

    Args:
        dataset: its items are (image, label), or mappings with such keys: a PIL image, or an array uint8 (0
            to 255) or floating point (as the network takes it), (C, H, W). Random items repeat: each is read
            with torch's, numpy's and Python's global generators seeded for it.
        name: for people.
        reading: size and channels of PIL images; names of keys.

    Raises:
        ValueError, TypeError: its items are nothing of the kind.
    """
    reading = reading or Reading()
    if isinstance(dataset, IterableDataset) or not _is_dataset(dataset):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}: images are taken in any order, from a torch Dataset with "
            "__getitem__ and __len__"
        )
    if len(dataset) == 0:
        raise ValueError(f"no images in {name}")
    items = Items(dataset, name, reading.image_column, reading.label_column)
    labels = _labels(items)
    classes = _names_in(dataset, items.label_key)
    if classes is None or len(classes) <= int(labels.max()):
        classes = number_names(int(labels.max()), len(labels), name)
    first = items.image(0)
    if hasattr(first, "convert"):  # of PIL
        channels = reading.channels or _channels(items)
        width, height = size_upright(first)
        high, wide = reading.sides or (height, width)
        shape: tuple[int, ...] = (channels, high, wide)
        one, dtype = shape, torch.uint8
    else:
        example = _array(first, name, 0, reading.shape)
        one, dtype = tuple(example.shape), example.dtype
        check_wanted(one, reading, name)
    reader = DatasetReader(
        items, one, dtype, sized=reading.sides is not None, centre=reading.centre, shape=reading.shape
    )
    everything = torch.arange(len(dataset), device="cpu")
    return ImageData(name, Streamed(reader, everything, one, dtype), labels, tuple(map(str, classes)))


@dataclass(frozen=True)
class Items:
    """Images and labels of a data set, by its keys."""

    dataset: Any
    name: str
    image_key: str | None = None
    label_key: str | None = None

    def image(self, place: int) -> Any:
        return self._part(place, 0, _IMAGES, self.image_key)

    def label(self, place: int) -> int:
        label = self._part(place, 1, _LABELS, self.label_key)
        count = label.numel() if isinstance(label, Tensor) else np.size(label)
        value = label.item() if hasattr(label, "item") and count == 1 else label
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or value < 0:
            raise ValueError(
                f"item {place} of {self.name} has the label {label!r}: a class number >= 0 is needed, no "
                "scores of classes (one-hot)"
            )
        return int(value)

    def _part(self, place: int, number: int, known: tuple[str, ...], key: str | None) -> Any:
        with seeded_generators(stream_seed(ITEM_SEED.get(), place, 3)):
            item = self.dataset[place]
        if isinstance(item, Mapping):
            keys = [each for each in (known if key is None else (key,)) if each in item]
            if keys:
                return item[keys[0]]
        elif isinstance(item, tuple | list) and len(item) >= 2:
            return item[number]
        what = (
            f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
        )
        raise ValueError(
            f"item {place} of {self.name} has {what}: it must be (image, label), or name its keys "
            "(data.image_column, data.label_column)"
        )


@dataclass(frozen=True)
class DatasetReader:
    """Images of a data set, checked to be of one kind."""

    items: Items
    one: tuple[int, ...]
    dtype: torch.dtype
    sized: bool
    centre: float = 1.0
    shape: tuple[int, ...] | None = None

    def prepared(self, place: int) -> Tensor:
        image = self.items.image(place)
        if not hasattr(image, "convert"):
            found = _array(image, self.items.name, place, self.shape)
            if tuple(found.shape) != self.one or found.dtype != self.dtype:
                raise ValueError(
                    f"item {place} of {self.items.name} is {found.dtype} {tuple(found.shape)}, the first one "
                    f"{self.dtype} {self.one}: all must be of one kind"
                )
            return found
        height, width = self.one[1:]
        if not self.sized and (upright := size_upright(image)) != (width, height):
            raise ValueError(
                f"images of {self.items.name} differ in size ({upright[0]}x{upright[1]}, item {place}, "
                f"and {width}x{height}): set a size, e.g. --size {min(height, width)} (data.size in a recipe)"
            )
        return prepare_image(self._checked(image, place), self.one[0], (height, width), self.centre)

    def photo(self, place: int) -> Any:
        image = self.items.image(place)
        if not hasattr(image, "convert"):
            raise ValueError(f"{self.items.name} gives arrays, no PIL images: leave data.photos out")
        return self._checked(image, place)

    def _checked(self, image: Any, place: int) -> Any:
        if self.one[0] == 1 and not is_grey(image):
            raise ValueError(
                f"{self.items.name} mixes grey and colour images (item {place} is in colour): say which "
                "(data.channels, --channels: 1 or 3)"
            )
        return image


def _names_in(dataset: Any, key: str | None) -> Any:
    """Names of the classes of a data set, one of the library `datasets` too; None where it has none.

    Raises:
        TypeError: they are in no order.
        ValueError: a mapping does not say which number each has.
    """
    found = getattr(_root(dataset), "classes", None)
    if isinstance(found, set | frozenset):
        raise TypeError(
            f"{type(_root(dataset)).__name__}.classes is a set, whose order changes from run to run: make it "
            "a list, in the order of the class numbers"
        )
    if isinstance(found, Mapping) and len(found) > 0:
        return _numbered(found, type(_root(dataset)).__name__)
    found = found.tolist() if isinstance(found, np.ndarray | Tensor) else found
    if isinstance(found, Sequence) and not isinstance(found, str | bytes) and len(found) > 0:
        return list(found)
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None
    keys = [each for each in (_LABELS if key is None else (key,)) if each in features]
    return getattr(features[keys[0]], "names", None) if keys else None


def _numbered(classes: Mapping[Any, Any], name: str) -> list[Any]:
    """Names in the order of their numbers, of a mapping from one to the other."""
    found = []
    for names, numbers in ((list(classes), list(classes.values())), (list(classes.values()), list(classes))):
        if all(isinstance(each, Integral) and not isinstance(each, bool) for each in numbers):
            by_number = dict(zip(map(int, numbers), names, strict=True))
            if sorted(by_number) == list(range(len(classes))):
                found.append([by_number[number] for number in range(len(classes))])
    if len(found) == 1 or (found and found[0] == found[1]):
        return found[0]
    what = (
        "can be read both ways"
        if found
        else f"does not number its {len(classes)} classes from 0 on, each once"
    )
    raise ValueError(
        f"{name}.classes is a mapping that {what}: make it a list, in the order of the class numbers"
    )


def _root(dataset: Any) -> Any:
    return _root(dataset.dataset) if isinstance(dataset, Subset) else dataset


def _labels(items: Items) -> Tensor:
    """(N,), from the attribute that says them, if items bear it out, or item by item."""
    dataset = items.dataset
    known = next((getattr(dataset, key) for key in ("targets", "labels") if hasattr(dataset, key)), None)
    plain = getattr(dataset, "target_transform", None) is None and items.label_key is None
    if plain and known is not None and not callable(known) and len(known) == len(dataset):
        try:
            labels = torch.as_tensor(np.asarray(known), device="cpu")
        except (TypeError, ValueError):
            labels = torch.empty(0, device="cpu")
        whole = labels.dim() == 1 and not labels.is_floating_point() and int(labels.min()) >= 0
        if whole and all(items.label(place) == int(labels[place]) for place in _some(len(dataset))):
            return labels.long()
    return torch.tensor(each_of(items.label, len(dataset)), dtype=torch.int64, device="cpu")


def _channels(items: Items) -> int:
    return 1 if all(is_grey(items.image(place)) for place in _some(len(items.dataset))) else 3


def _some(length: int) -> list[int]:
    """Places over all of a data set, the first and the last among them."""
    count = min(_LOOKED_AT, length)
    return [round(step * (length - 1) / max(1, count - 1)) for step in range(count)]


def _array(image: Any, name: str, place: int, shape: tuple[int, ...] | None) -> Tensor:
    """uint8 or float32: a tensor as it is, as is an array of that shape; another array as (C, H, W)."""
    if not isinstance(image, Tensor | np.ndarray):
        raise TypeError(
            f"item {place} of {name} begins with a {type(image).__name__}: a PIL image, a tensor or an array "
            "is needed"
        )
    found = torch.as_tensor(image, device="cpu")
    is_image = isinstance(image, np.ndarray) and tuple(found.shape) != shape
    if is_image and found.dim() == 3 and found.shape[2] in (1, 3):
        if found.shape[0] in (1, 3):
            raise ValueError(
                f"item {place} of {name} is an array of shape {image.shape}, which leaves open where the "
                "channels are: give a tensor (C, H, W)"
            )
        found = found.permute(2, 0, 1)
    if is_image and found.dim() == 2:
        found = found.unsqueeze(0)
    if not (found.is_floating_point() or found.dtype == torch.uint8):
        raise ValueError(
            f"item {place} of {name} is {found.dtype}: uint8 (0 to 255) or floating point is needed"
        )
    return found.float() if found.is_floating_point() else found
