"""How a source is to be read: which of its splits and columns, at which size, at once or as it is needed."""

from dataclasses import dataclass
from typing import TypedDict

from .images import Split

Size = int | tuple[int, int]
KNOWN_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "validation", "valid", "val"),
}


class Options(TypedDict, total=False):
    """How a source is to be read.

    Attributes:
        channels: 1 for grey, 3 for colour; by default what the images are.
        train_split, test_split: what the splits are called there, if not as usual. The same name for both,
            or a source without splits, cuts both out of the same images.
        image_column, label_column: names of columns, arrays or keys, if not as usual.
        test_share: of each class, where the test split is cut off; 0.2.
        split_seed: of that cut, and of the order; 0.
        stream: whether images are decoded as they are needed; by default those of more than 128 pixels.
        centre: side of the central part of images that is kept, as a share; 1.
        revision: of a data set of the Hub.
        shape: of one input, where arrays are no images: (C, T) or (T,) of waveforms, ...; arrays of that
            shape are taken as they are, and all else is refused.
    """

    channels: int | None
    train_split: str | None
    test_split: str | None
    image_column: str | None
    label_column: str | None
    test_share: float
    split_seed: int
    stream: bool | None
    centre: float
    revision: str | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The same with a size, filled in and checked."""

    size: Size | None = None
    channels: int | None = None
    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    test_share: float = 0.2
    split_seed: int = 0
    stream: bool | None = None
    centre: float = 1.0
    revision: str | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sides = (self.size,) if isinstance(self.size, int) else self.size or ()
        if any(side < 1 for side in sides):
            raise ValueError(f"size must be a number of pixels of 1 or more, got {self.size}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {self.channels}")
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share must lie between 0 and 1, got {self.test_share}")
        if not 0 < self.centre <= 1:
            raise ValueError(f"centre must be above 0 and at most 1, got {self.centre}")

    def check_read(self, kind: str, unread: tuple[str, ...]) -> None:
        """Raise unless what was asked for can be read from data of a kind, rather than drop it."""
        if asked := [name for name in unread if getattr(self, name) is not None]:
            raise ValueError(f"{kind} no {', '.join(asked)}: leave that out")

    def check_cut(self, split: Split, source: str) -> None:
        """Raise where both splits would be cut out of images that have none, though a split was named."""
        if (named := self.given(split)) is not None and not self.cuts:
            raise FileNotFoundError(
                f"no {split} split {named!r} in {source}, which has no splits: leave data.{split}_split, "
                f"--{split}-split out to cut both splits out of it"
            )

    @property
    def sides(self) -> tuple[int, int] | None:
        """(H, W) that images are to have, if one was asked for."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def cuts(self) -> bool:
        """Whether both splits are to be cut out of the same images."""
        return self.train_split is not None and self.train_split == self.test_split

    def given(self, split: Split) -> str | None:
        """What a split was said to be called."""
        return self.train_split if split == "train" else self.test_split

    def names(self, split: Split) -> tuple[str, ...]:
        """What a split may be called in the data."""
        given = self.given(split)
        return KNOWN_SPLITS[split] if given is None else (given,)

    def splits_of(self, name: str) -> list[Split]:
        """The splits that go by that name."""
        return [split for split in KNOWN_SPLITS if name.casefold() in map(str.casefold, self.names(split))]
