"""Arrays of images and labels in a file."""

from pathlib import Path

import numpy as np

import selfensemble as rse


def test_labels_belong_to_images_of_the_same_split(tmp_path: Path) -> None:
    """x_test has come without labels: x_val is the test split."""
    generator = np.random.default_rng(0)
    names = ("train", "val", "test")
    pixels = {f"x_{name}": generator.integers(0, 256, (8, 1, 4, 4), np.uint8) for name in names}
    labels = {f"y_{name}": np.arange(8) % 2 for name in names[:2]}
    np.savez(tmp_path / "mix.npz", **(pixels | labels))  # type: ignore[arg-type]
    found = rse.load_data(str(tmp_path / "mix.npz"), "test")
    assert np.array_equal(np.asarray(found.images), pixels["x_val"])
