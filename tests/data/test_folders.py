"""Folders as people have them: hidden and linked files, odd and damaged ones, no splits, sorted by class."""

import errno
import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfensemble.data.decoding import size_upright
from selfensemble.data.images import ImageData
from selfensemble.data.order import is_shuffled, mixed_order
from selfensemble.data.sources import load_data

BLUE, RED = (0, 0, 200), (200, 0, 0)


def picture(place: Path, colour: Any = BLUE, mode: str = "RGB", size: tuple[int, int] = (12, 12)) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(place)
    return place


def two_classes(root: Path, each: int = 3) -> Path:
    for split in ("train", "test"):
        for name, colour in (("cat", BLUE), ("dog", RED)):
            for number in range(each):
                picture(root / split / name / f"{number}.png", colour)
    return root


def names(data: ImageData) -> list[str]:
    return [data.classes[label] for label in data.labels.tolist()]


def test_hidden_files_and_folders_are_no_classes(tmp_path: Path) -> None:
    two_classes(tmp_path)
    picture(tmp_path / "train" / ".ipynb_checkpoints" / "0.png")
    picture(tmp_path / "train" / "__MACOSX" / "0.png")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"of a Mac")
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"of Windows")
    data = load_data(tmp_path, "train")
    assert (data.classes, len(data), data.skipped) == (("cat", "dog"), 6, ())


def test_splits_of_other_names_are_no_classes(tmp_path: Path) -> None:
    two_classes(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split).rename(tmp_path / f"seg_{split}")
    with pytest.raises(ValueError, match="--train-split seg_train --test-split seg_test"):
        load_data(tmp_path, "train")
    data = load_data(tmp_path, "test", train_split="seg_train", test_split="seg_test")
    assert (data.classes, len(data), data.cut) == (("cat", "dog"), 6, None)
    # Classes whose names have such words are classes.
    for number in range(5):
        for name in ("bullet_train", "test_tube"):
            picture(tmp_path / "classes" / name / f"{number}.png")
    assert load_data(tmp_path / "classes", "train").classes == ("bullet_train", "test_tube")


def test_trouble_that_passes_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(tmp_path)
    left = [1]

    def busy(image: Any) -> tuple[int, int]:
        if left:
            left.pop()
            raise OSError(errno.EMFILE, "Too many open files")
        return size_upright(image)

    monkeypatch.setattr("selfensemble.data.survey.size_upright", busy)
    with pytest.warns(UserWarning, match="Too many open files"):
        assert len(load_data(tmp_path, "train")) == 5
    assert len(load_data(tmp_path, "train")) == 6


def test_links_are_followed_but_for_circles(tmp_path: Path) -> None:
    two_classes(tmp_path / "data")
    picture(tmp_path / "elsewhere" / "bird" / "1.png", (0, 200, 0))
    (tmp_path / "data" / "train" / "bird").symlink_to(tmp_path / "elsewhere" / "bird")
    (tmp_path / "data" / "train" / "cat" / "linked.png").symlink_to(tmp_path / "elsewhere" / "bird" / "1.png")
    (tmp_path / "data" / "train" / "cat" / "up").symlink_to(tmp_path / "data" / "train")
    assert names(load_data(tmp_path / "data", "train")).count("bird") == 1
    assert len(load_data(tmp_path / "data", "train")) == 8
    (tmp_path / "data" / "train" / "dog" / "broken.png").symlink_to(tmp_path / "nothing.png")
    with pytest.warns(UserWarning, match=r"1 images .* \(dog/broken.png: a link to nothing\)"):
        data = load_data(tmp_path / "data", "train")
    assert len(data) == 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16", "F", "RGBA", "YCbCr"])
def test_a_stray_image_of_another_mode_takes_part(mode: str, tmp_path: Path) -> None:
    """One middle grey, wherever it is among the colours."""
    two_classes(tmp_path)
    grey: Any = {"1": 1, "I;16": 128 * 257, "F": 128 / 255, "LA": (128, 255), "RGBA": (128, 128, 128, 255)}
    image = (
        Image.new(mode, (12, 12), grey[mode]) if mode in grey else Image.new("L", (12, 12), 128).convert(mode)
    )
    suffix = "tif" if mode in ("F", "CMYK") else "jpg" if mode == "YCbCr" else "png"
    image.save(tmp_path / "train" / "cat" / f"+.{suffix}")
    data = load_data(tmp_path, "train")
    assert data.images.shape == (7, 3, 12, 12)
    assert data.skipped == ()
    assert (data.images[0].float() - (255 if mode == "1" else 128)).abs().max() <= 1


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    two_classes(tmp_path)
    picture(tmp_path / "train" / "cat" / "+.png", (9, 9, 9, 0), "RGBA")
    assert int(load_data(tmp_path, "train").images[0].min()) == 255


def test_a_few_colours_among_greys_are_refused_until_it_is_said(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(4):
            picture(tmp_path / split / "a" / f"{number}.png", 50 * number, "L")
    picture(tmp_path / "train" / "a" / "zzz.png", RED)
    with pytest.raises(ValueError, match=r"1 of 5 are in colour, a/zzz\.png first.*--channels"):
        load_data(tmp_path, "train")
    assert load_data(tmp_path, "train", channels=1).shape == (1, 12, 12)
    assert load_data(tmp_path, "train", channels=3).shape == (3, 12, 12)


def damaged(root: Path) -> dict[str, str]:
    """Files that cannot be used, and words of the reasons."""
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(good, "png")
    (root / "cut.png").write_bytes(good.getvalue()[:2000])
    photo = io.BytesIO()
    Image.open(good).save(photo, "jpeg")
    (root / "cut.jpg").write_bytes(photo.getvalue()[: len(photo.getvalue()) // 2])
    (root / "text.jpg").write_text("<html>404</html>")
    (root / "empty.png").write_bytes(b"")
    Image.fromarray(np.full((12, 12), 300.0, dtype=np.float32)).save(root / "float.tif")
    Image.fromarray(np.full((12, 12), 70000, dtype=np.int32)).save(root / "deep.tif")
    return {
        "cut.png": "", "cut.jpg": "truncated", "text.jpg": "not an image", "empty.png": "not an image",
        "float.tif": "300", "deep.tif": "32-bit",
    }  # fmt: skip


def test_bad_files_are_listed_and_the_others_used(tmp_path: Path) -> None:
    two_classes(tmp_path, each=10)
    expected = damaged(tmp_path / "train" / "cat")
    for again in range(2):
        with pytest.warns(UserWarning, match="6 images"):
            data = load_data(tmp_path, "train")
        assert len(data) == 20, again
        found = dict(each.split(": ", 1) for each in data.skipped)
        assert found.keys() == {f"cat/{name}" for name in expected}
        for name, word in expected.items():
            assert word in found[f"cat/{name}"], found
    assert data.labels.bincount().tolist() == [10, 10]


def test_a_class_or_a_set_of_bad_files_is_refused(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "train" / "bird").mkdir()
    (tmp_path / "train" / "bird" / "1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no image of class bird .*bird/1\.png"):
        load_data(tmp_path, "train")
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no images in .*and 4 more"):
        load_data(tmp_path, "train")


def test_what_is_no_image_is_listed(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "train" / "cat" / "0.txt").write_text("boxes")
    (tmp_path / "train" / "empty").mkdir()
    data = load_data(tmp_path, "train")
    assert data.classes == ("cat", "dog")
    assert [each.partition(":")[0] for each in data.skipped] == ["cat", "empty"]


PAGES = ("a.tif", "a.gif", "a.png", "a.webp")


def pages(root: Path) -> None:
    """Files of several pages or frames."""
    first, second = Image.new("RGB", (12, 12), BLUE), Image.new("RGB", (12, 12), RED)
    for name in PAGES:
        first.save(root / name, save_all=True, append_images=[second])


def test_files_of_several_pages_are_listed(tmp_path: Path) -> None:
    two_classes(tmp_path, each=6)
    pages(tmp_path / "train" / "cat")
    first = picture(
        tmp_path / "train" / "cat" / "photo.jpg"
    )  # with a smaller copy of itself, as phones write
    Image.open(first).save(first, "MPO", save_all=True, append_images=[Image.new("RGB", (6, 6), BLUE)])
    with pytest.warns(UserWarning, match="4 images"):
        data = load_data(tmp_path, "train")
    assert len(data) == 13
    for name, kind in zip(PAGES, ("pages", "frames", "frames", "frames"), strict=True):
        assert (
            f"cat/{name}: it has several {kind}, which leave open which is meant: save one of them"
            in data.skipped
        )


def test_what_is_taken_for_granted_is_counted(tmp_path: Path) -> None:
    two_classes(tmp_path, each=6)
    place = tmp_path / "train" / "cat"
    picture(place / "+.png", (9, 9, 9, 100), "RGBA")
    picture(place / "opaque.png", (9, 9, 9, 255), "RGBA")
    for number, most in enumerate((4095, 4096, 65535)):
        Image.fromarray(np.full((12, 12), most, dtype=np.uint16)).save(place / f"deep {number}.png")
    for _ in range(2):  # the second time from what is known of the files
        data = load_data(tmp_path, "train")
        assert data.skipped == ()
        assert data.notes == (
            "1 with transparent parts: put on white",
            "3 of 16 bits: white is 65,535; 1 have no value above 4,095, and are dark: if they have 12 bits, "
            "scale them",
        )
    assert load_data(tmp_path, "test").notes == ()


def turned(place: Path, exif: bytes) -> None:
    """A photo of 24x12, red on the left, whose flag says that it stands."""
    image = Image.new("RGB", (24, 12), RED)
    image.paste(BLUE, (12, 0, 24, 12))
    place.parent.mkdir(parents=True, exist_ok=True)
    image.save(place, quality=100, exif=exif)


def test_photos_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ("train", "test"):
        turned(tmp_path / split / "a" / "0.jpg", exif.tobytes())
    data = load_data(tmp_path, "train")
    assert data.shape == (3, 24, 12)
    assert data.images[0][0, :8].float().mean() > 150  # red above
    assert data.images[0][2, -8:].float().mean() > 150


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")  # of Pillow
def test_metadata_that_cannot_be_read_lose_no_pixels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        turned(tmp_path / split / "a" / "0.jpg", b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    data = load_data(tmp_path, "train")
    assert (data.shape, data.skipped) == ((3, 12, 24), ())


def test_sizes_that_differ_name_the_files_and_the_option(tmp_path: Path) -> None:
    two_classes(tmp_path)
    picture(tmp_path / "train" / "dog" / "9.png", RED, size=(20, 30))
    with pytest.raises(ValueError, match=r"20x30, dog/9.png.*--size 12 \(data\.size=12"):
        load_data(tmp_path, "train")
    assert load_data(tmp_path, "train", size=(8, 6)).shape == (3, 8, 6)


def test_a_folder_without_splits_is_cut_by_class(tmp_path: Path) -> None:
    for name, count, colour in (("cat", 20, BLUE), ("dog", 40, RED)):
        for number in range(count):
            picture(tmp_path / name / f"{number:02}.png", (number, *colour[1:]))
    train, test = (load_data(tmp_path, split) for split in ("train", "test"))
    assert [each.labels.bincount().tolist() for each in (train, test)] == [[16, 32], [4, 8]]
    assert train.cut == test.cut == (0.2, 0)
    images = {image.numpy().tobytes() for data in (train, test) for image in data.images}
    assert len(images) == 60  # none in both
    again = load_data(tmp_path, "test")
    assert torch.equal(again.images[:], test.images[:])
    other = load_data(tmp_path, "test", split_seed=1)
    assert not torch.equal(other.images[:].sum(0), test.images[:].sum(0))
    assert len(load_data(tmp_path, "test", test_share=0.5)) == 30
    picture(tmp_path / "cat" / "new.png", BLUE)  # moves few others
    kept = {image.numpy().tobytes() for image in load_data(tmp_path, "test").images}
    assert len(kept & {image.numpy().tobytes() for image in test.images}) >= 10


def test_both_splits_out_of_one(tmp_path: Path) -> None:
    two_classes(tmp_path, each=10)
    parts = [
        load_data(tmp_path, split, train_split="train", test_split="train") for split in ("train", "test")
    ]
    assert [len(part) for part in parts] == [16, 4]
    (tmp_path / "test").rename(tmp_path / "held-out")
    with pytest.raises(FileNotFoundError, match="--test-split"):
        load_data(tmp_path, "test")
    assert len(load_data(tmp_path, "test", test_split="held-out")) == 20


def test_the_first_images_of_a_sorted_folder_stand_for_all(tmp_path: Path) -> None:
    """Of 40 cats and 40 dogs the first 20 are 10 of each, and so are the last."""
    for split in ("train", "test"):
        for name, colour in (("cat", BLUE), ("dog", RED)):
            for number in range(40):
                picture(tmp_path / split / name / f"{number}.png", colour)
    test = load_data(tmp_path, "test")
    assert test.drawn == 0
    for part in (test.labels[:20], test.labels[-20:], test.labels[:4]):
        assert part.bincount().tolist() == [len(part) // 2] * 2
    for label, image in zip(test.labels, test.images, strict=True):
        assert int(image[0, 0, 0]) == (BLUE, RED)[label][0]
    assert load_data(tmp_path, "train").drawn is None  # in the order that earlier checkpoints know


def test_an_order_has_its_share_of_each_class_at_every_place() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    order = mixed_order(labels, 0)
    assert order.sort().values.tolist() == list(range(100))
    for count in range(1, 101):
        share = labels[order[:count]].bincount(minlength=3)
        assert (share - count * torch.tensor([0.7, 0.2, 0.1])).abs().max() <= 2
    assert not torch.equal(mixed_order(labels, 1), order)


def test_published_sets_keep_their_order_and_sorted_ones_do_not() -> None:
    """A random order is found sorted once in some hundred, any sorted one always."""
    assert load_data("digits", "test").drawn is None
    generator = torch.Generator().manual_seed(0)
    found = [is_shuffled(torch.randint(10, (1000,), generator=generator)) for _ in range(200)]
    assert sum(found) >= 196
    for labels in ([0] * 50 + [1] * 50, sorted(random.Random(0).choices(range(10), k=500))):
        assert not is_shuffled(torch.tensor(labels))
    drifting = torch.cat([torch.randint(5, (500,), generator=generator), 5 + torch.randint(5, (500,))])
    assert not is_shuffled(drifting)


def test_what_lies_beside_the_splits_is_listed(tmp_path: Path) -> None:
    two_classes(tmp_path)
    picture(tmp_path / "unsorted" / "0.png")
    picture(tmp_path / "stray.png")
    (tmp_path / "validation").mkdir()
    (tmp_path / "README.md").write_text("about")
    data = load_data(tmp_path, "train")
    assert len(data) == 6
    assert data.skipped == tuple(
        f"{each}: beside the splits, and of none" for each in ("stray.png", "unsorted")
    )


def test_two_folders_that_may_be_one_split_are_refused(tmp_path: Path) -> None:
    two_classes(tmp_path)
    picture(tmp_path / "Train" / "bird" / "0.png")
    if len(list(tmp_path.iterdir())) == 2:
        return  # where letters of both cases are one
    with pytest.raises(ValueError, match="holds Train and train, which may be one split: rename one"):
        load_data(tmp_path, "train")


def test_folders_that_nobody_may_look_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a class they are listed; where one would be a class, the folder is refused."""
    two_classes(tmp_path)
    listing = Path.iterdir

    def refuse(path: Path) -> Any:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    picture(tmp_path / "train" / "cat" / "closed" / "9.png")
    with pytest.warns(UserWarning, match="cat/closed: a folder without permission to read"):
        assert len(load_data(tmp_path, "train")) == 6
    picture(tmp_path / "test" / "closed" / "9.png")
    with pytest.raises(ValueError, match=r"no permission to read .*closed, which would be a class"):
        load_data(tmp_path, "test")


def test_an_image_that_may_be_read_again_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights leave a file's size and time as they are, by which it was known."""
    two_classes(tmp_path)
    closed, reading, access = tmp_path / "train" / "cat" / "1.png", Path.read_bytes, os.access

    def refuse(path: Path) -> bytes:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return reading(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        patch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
        with pytest.warns(UserWarning, match=r"cat/1\.png: .*Permission denied"):
            assert len(load_data(tmp_path, "train")) == 5
    assert len(load_data(tmp_path, "train")) == 6


@pytest.mark.skipif(os.name == "nt", reason="names are no bytes there")
def test_names_that_are_no_text_are_cut_as_others_are(tmp_path: Path) -> None:
    for number in range(10):
        picture(tmp_path / "cat" / os.fsdecode(b"\xff%d.png" % number), (number, 0, 0))
    assert [len(load_data(tmp_path, split)) for split in ("train", "test")] == [8, 2]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_folders_of_every_kind_lose_no_file_in_silence(tmp_path: Path) -> None:
    """Of 30 folders drawn at random, each file is an image, listed, hidden, or the folder is refused."""
    refused = []
    for seed in range(30):
        chance, root = random.Random(seed), tmp_path / str(seed)
        visible = 0
        for number in range(chance.randint(4, 12)):
            name = chance.choice(["a", "b", ".hidden", "c d"])
            kind = chance.choice(["good", "good", "good", "grey", "cut", "text", "note", "hidden"])
            place = (
                root
                / "train"
                / name
                / {"note": f"{number}.xml", "hidden": f".{number}.png"}.get(kind, f"{number}.png")
            )
            if kind in ("good", "grey", "hidden"):
                picture(place, BLUE if kind == "good" else 40, "RGB" if kind == "good" else "L")
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(b"\x89PNG\r\n\x1a\n" if kind == "cut" else b"words")
            visible += name != ".hidden" and kind != "hidden"
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *arguments, **settings: None)
                data = load_data(root, "train")
        except (ValueError, FileNotFoundError) as error:
            refused.append(str(root) in str(error))
            continue
        notes = sum(int(each.split(": ")[1].split()[0]) for each in data.skipped if "file" in each)
        bad = sum("file" not in each and "folder" not in each for each in data.skipped)
        assert len(data) + notes + bad == visible, data.skipped
    assert all(refused)
    assert len(refused) < 25
