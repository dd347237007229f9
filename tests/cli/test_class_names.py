"""Names of classes of networks of transformers, and of the images that they are asked about."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from selfensemble.cli.class_names import _names_of, _spelled_as
from selfensemble.data.images import ImageData


def network(names: dict[Any, str]) -> nn.Module:
    found = nn.Identity()
    found.config = SimpleNamespace(id2label=names)  # type: ignore[assignment]
    return found


def test_classes_are_in_the_order_of_their_numbers() -> None:
    """A file has them in the order of text: 0, 1, 10, 11, 2, ..."""
    ordered = tuple(f"c{number}" for number in range(12))
    for key in (int, str):
        names = {key(number): f"c{number}" for number in sorted(range(12), key=str)}
        assert _names_of(network(names), 12) == ordered
    assert _names_of(network(dict(enumerate(ordered))), 11) is None
    assert _names_of(network({1: "a", 2: "b"}), 2) is None
    assert _names_of(network({0: "LABEL_0", 1: "LABEL_1"}), 2) is None


def images(*classes: str) -> ImageData:
    pixels = torch.zeros(len(classes), 1, 2, 2, dtype=torch.uint8)
    return ImageData("some", pixels, torch.arange(len(classes)), classes)


def test_capitals_do_not_tell_classes_apart() -> None:
    assert _spelled_as(images("Cat", "DOG"), ("dog", "cat")).classes == ("cat", "dog")
    assert _spelled_as(images("Cat", "dog"), ("dog", "cat")).classes == ("cat", "dog")
    assert _spelled_as(images("cat", "CAT"), ("Cat", "dog")).classes == ("cat", "CAT")


def test_classes_of_one_name_are_not_matched_by_it() -> None:
    for own, theirs in ((("crane", "bird"), ("crane", "bird", "crane")), (("a", "a"), ("a", "b"))):
        with pytest.raises(ValueError, match="several are called"):
            images(*own).with_classes(theirs)
    same = ("crane", "bird", "crane")
    assert images(*same).with_classes(same).labels.tolist() == [0, 1, 2]
