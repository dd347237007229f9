"""How a source is to be read: which of its splits and columns, at which size, at once or as it is needed."""

from dataclasses import dataclass

from .images import Split

Size = int | tuple[int, int]
KNOWN_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "validation", "valid", "val"),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything that `load_data` takes beside a source and a split; see there."""

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

    @property
    def sides(self) -> tuple[int, int] | None:
        """(H, W) that images are to have, if one was asked for."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def cuts(self) -> bool:
        """Whether both splits are to be cut out of the same images."""
        return self.train_split is not None and self.train_split == self.test_split

    def names(self, split: Split) -> tuple[str, ...]:
        """What a split may be called in the data."""
        given = self.train_split if split == "train" else self.test_split
        return KNOWN_SPLITS[split] if given is None else (given,)

    def splits_of(self, name: str) -> list[Split]:
        """The splits that go by that name."""
        return [split for split in KNOWN_SPLITS if name.casefold() in map(str.casefold, self.names(split))]
