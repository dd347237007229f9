"""Folders of images as people have them, against what reads one: no file is lost in silence.

    python -m tests.folder_fuzzing [--folders 2000] [--seed 0]

A folder is drawn by its number: images of every kind, hidden and system files, links, pipes, files and
folders that nobody may read, damaged ones, odd names. Each file has its fate: it is among the images
(upright, in its class), listed with a reason, counted among those that are no images by their names, or
hidden. A folder is refused where that is announced, and nowhere else; `predict` answers every good file and
lists the others.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from selfensemble.cli.arguments import image_files, inputs_of
from selfensemble.data.images import ImageData, Split
from selfensemble.data.sources import load_data

SIDE = 12
_NOBODY = 65534
Array = np.ndarray[Any, np.dtype[np.uint8]]
Fate = Literal["image", "bad", "no file", "other", "hidden"]


@dataclass
class Planted:
    """A folder of images: what lies in it, by names below the folder of the classes."""

    root: Path  # that is given to the commands
    top: Path  # of the classes
    cut: bool  # without splits
    fates: dict[str, Fate] = field(default_factory=dict)
    pixels: dict[str, Array] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)  # folders
    named: set[str] = field(default_factory=set)  # folders that are images by their names

    def names(self, *fates: Fate) -> list[str]:
        return [name for name, fate in self.fates.items() if fate in fates]

    def refused(self) -> bool:
        """Whether there is no answer to the question which images of which classes these are."""
        images, looked = self.names("image"), self.names("image", "bad")
        found = self.names("image", "bad", "no file")
        lost = {name.split("/")[0] for name in looked} - {name.split("/")[0] for name in images}
        stray = any("/" not in name for name in looked)
        closed_class = any("/" not in name for name in self.closed)
        few = len(images) == 0 or 2 * len(images) < len(looked)
        return not found or stray or closed_class or few or bool(lost)


def _save(mode: str | None, suffix: str, **options: Any) -> Callable[[Path, Image.Image], None]:
    def write(path: Path, image: Image.Image) -> None:
        # Its own palette: one of 216 colours for everybody is as far away as another image may be.
        own = Image.Palette.ADAPTIVE
        (image if mode is None else image.convert(mode, palette=own)).save(path, suffix, **options)

    return write


def _transparent(path: Path, image: Image.Image) -> None:
    """What is white is transparent, over black."""
    pixels = np.array(image.convert("RGBA"))
    white = (pixels[..., :3] == 255).all(axis=2)
    pixels[white] = 0
    Image.fromarray(pixels).save(path, "PNG")


def _turned(path: Path, image: Image.Image) -> None:
    """Lies on its side, and its metadata say so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees against the clock
    image.transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", quality=95, subsampling=0, exif=exif)


def _deep(path: Path, image: Image.Image) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path, "PNG")


def _float(path: Path, image: Image.Image) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255).save(path, "TIFF")


_EXACT = {"quality": 95, "subsampling": 0}
_GOOD: dict[str, tuple[str, bool, Callable[[Path, Image.Image], None]]] = {
    "png": (".png", False, _save(None, "PNG")),
    "jpeg": (".JPG", False, _save(None, "JPEG", **_EXACT)),
    "bmp": (".bmp", False, _save(None, "BMP")),
    "webp": (".webp", False, _save(None, "WEBP", lossless=True)),
    "gif": (".gif", False, _save("P", "GIF")),
    "tiff": (".tif", False, _save(None, "TIFF")),
    "palette": (".png", False, lambda path, image: image.quantize(8).save(path, "PNG")),
    "transparent": (".png", False, _transparent),
    "print": (".jpeg", False, _save("CMYK", "JPEG", **_EXACT)),
    "grey": (".png", True, _save("L", "PNG")),
    "grey with alpha": (".png", True, _save("LA", "PNG")),
    "16 bits": (".png", True, _deep),
    "floats": (".tiff", True, _float),
    "turned": (".jpg", False, _turned),
    "broken metadata": (".jpg", False, _save(None, "JPEG", exif=b"Exif\0\0broken", **_EXACT)),
    "named as another": (".png", False, _save(None, "JPEG", **_EXACT)),
}


def _image(number: int, chance: random.Random) -> Image.Image:
    """Of a colour of its own, and white in the corner at the top left."""
    size = chance.choice(((SIDE, SIDE), (2 * SIDE, SIDE), (SIDE, 2 * SIDE), (30, 40)))
    colour = tuple((number * step) % 160 for step in (53, 89, 127))
    image = Image.new("RGB", size, colour)
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
    return image


def _damaged(path: Path, kind: str, chance: random.Random) -> None:
    noise = Image.fromarray(
        np.random.default_rng(chance.randrange(99)).integers(0, 256, (40, 40, 3), np.uint8)
    )
    if kind in ("PNG", "JPEG"):
        noise.save(path, kind)
        path.write_bytes(path.read_bytes()[: chance.choice((20, 600, 1000))])
    elif kind in ("empty", "text"):
        path.write_bytes(b"" if kind == "empty" else b"<html>404</html>")
    elif kind == "pages":
        noise.save(path, "TIFF", save_all=True, append_images=[noise.rotate(90)])
    elif kind == "range":
        Image.fromarray(np.full((9, 9), 300.0, np.float32)).save(path, "TIFF")
    else:
        Image.fromarray(np.full((9, 9), 70000, np.int32)).save(path, "TIFF")


def plant(root: Path, chance: random.Random) -> Planted:
    """A folder drawn at random."""
    cut = chance.random() < 0.3
    found = Planted(root, root if cut else root / "train", cut)
    places = chance.sample(
        ["cat", "Cat", "dog", "c d", "[b]", "ü", os.fsdecode(b"\xff")], chance.randint(1, 3)
    )
    found.top.mkdir(parents=True)
    for number in range(chance.randint(3, 14)):
        place = chance.choice(places)
        if chance.random() < 0.15:
            place += "/" + chance.choice(("inner", ".hidden", "__MACOSX", "x.png"))
        if chance.random() < 0.01:
            place = ""
        stem = chance.choice(("", "IMG ", "[red]", ":x:", "名", "a\nb", "%20", os.fsdecode(b"\xfe")))
        _plant_one(found, place, f"{stem}{number}", number, chance)
    if chance.random() < 0.1:
        (found.top / places[0]).mkdir(exist_ok=True)
        (found.top / places[0] / "up").symlink_to(found.top.resolve())
    if chance.random() < 0.1:
        (found.top / "nothing in it").mkdir()
    if chance.random() < 0.1:
        _plant_linked_class(found, chance)
    if chance.random() < 0.08:
        _close(found, chance.choice(("", places[0])))
    return found


def _plant_one(found: Planted, place: str, stem: str, number: int, chance: random.Random) -> None:
    folder = found.top / place
    folder.mkdir(parents=True, exist_ok=True)
    if folder.suffix == ".png":
        found.named.add(place)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in place.split("/"))
    draw = chance.random()
    if draw < 0.7:
        kind = chance.choice(list(_GOOD))
        suffix, grey, write = _GOOD[kind]
        path, image = folder / (stem + suffix), _image(number, chance)
        write(path, image)
        fate: Fate = "image"
        _link_or_close(found, path, chance)
        fate = "image" if os.access(path, os.R_OK) else "bad"
        shown = image.convert("L").convert("RGB") if grey else image
        found.pixels[_name(found, path)] = np.asarray(ImageOps.fit(shown, (SIDE, SIDE)))
    elif draw < 0.82:
        kind = chance.choice(("PNG", "JPEG", "empty", "text", "range", "deep", "pages"))
        path, fate = folder / (stem + (".tif" if kind in ("range", "deep", "pages") else ".png")), "bad"
        _damaged(path, kind, chance)
    elif draw < 0.86:
        path, fate = folder / (stem + ".png"), "no file"
        kind = chance.choice(("pipe", "dangling", "loop"))
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(path.name if kind == "loop" else "nowhere.png")
    elif draw < 0.94:
        path, fate = folder / (stem + chance.choice(("", ".txt", ".png.bak", ".XML"))), "other"
        _image(number, chance).save(path, "PNG")
    else:
        path, fate = (
            folder / chance.choice((f".{number}.png", "Thumbs.db", ".DS_Store", f"._{number}.jpg")),
            "hidden",
        )
        path.write_bytes(b"of a system")
    found.fates[_name(found, path)] = "hidden" if hidden else fate


def _name(found: Planted, path: Path) -> str:
    return path.relative_to(found.top).as_posix()


def _link_or_close(found: Planted, path: Path, chance: random.Random) -> None:
    """Some files are links to where the image is, some may be read by nobody."""
    draw = chance.random()
    if draw < 0.08:
        aside = found.root.with_name(f"{found.root.name}-aside")
        aside.mkdir(exist_ok=True)
        target = aside / f"{len(list(aside.iterdir()))}{path.suffix}"
        path.rename(target)
        path.symlink_to(target)
    elif draw < 0.12:
        path.chmod(chance.choice((0, 0o200, 0o444, 0o777)))


def _plant_linked_class(found: Planted, chance: random.Random) -> None:
    aside = found.root.with_name(f"{found.root.name}-linked")
    aside.mkdir()
    for number in (90, 91):
        image = _image(number, chance)
        image.save(aside / f"{number}.png")
        found.fates[f"linked/{number}.png"] = "image"
        found.pixels[f"linked/{number}.png"] = np.asarray(ImageOps.fit(image, (SIDE, SIDE)))
    (found.top / "linked").symlink_to(aside)


def _close(found: Planted, place: str) -> None:
    """A folder that nobody may look into, with a file in it that so nobody can know of."""
    folder = found.top / place / "closed"
    folder.mkdir(parents=True)
    _image(95, random.Random(0)).save(folder / "95.png")
    folder.chmod(0)
    name = _name(found, folder)
    if os.access(folder, os.R_OK):  # whoever may read everything
        found.fates[f"{name}/95.png"] = "image"
        found.pixels[f"{name}/95.png"] = np.asarray(ImageOps.fit(_image(95, random.Random(0)), (SIDE, SIDE)))
    else:
        found.closed.append(name)


def check_loading(found: Planted) -> None:
    """What `load_data` makes of it; an AssertionError where that is another thing than announced."""
    splits: list[Split] = ["train", "test"] if found.cut else ["train"]
    parts: list[ImageData] = []
    refusal = None
    try:
        parts += [load_data(found.root, split, size=SIDE, channels=3) for split in splits]
    except (ValueError, FileNotFoundError) as error:
        refusal = error
    if refusal is not None:
        assert not isinstance(refusal, UnicodeError), refusal
        single = max(Counter(name.split("/")[0] for name in found.names("image")).values(), default=0) < 2
        too_few = found.cut and single and "too few images" in str(refusal)
        assert found.refused() or too_few, f"refused: {refusal}"
        assert str(found.root) in str(refusal), refusal
        return
    assert not found.refused(), "should have been refused"
    _check_listed(found, parts[0].skipped)
    expected = {name: found.pixels[name] for name in found.names("image")}
    for data in parts:
        assert len(data.images) == len(data.labels)
        for image, label in zip(data.images, data.labels.tolist(), strict=True):
            got = image.permute(1, 2, 0).numpy()
            name = _nearest(
                got, {n: p for n, p in expected.items() if n.split("/")[0] == data.classes[label]}
            )
            del expected[name]
    assert not expected, f"lost: {list(expected)}"


def _check_listed(found: Planted, skipped: tuple[str, ...]) -> None:
    for name in [*found.names("bad", "no file"), *found.closed]:
        assert sum(each.startswith(f"{name}: ") for each in skipped) == 1, f"not listed: {name!r}"
    kinds = Counter(
        f"{Path(name).parent.as_posix()}|{Path(name).suffix.lower() or 'without suffix'}"
        for name in found.names("other")
    )
    for key, count in kinds.items():
        place, suffix = key.split("|")
        text = f"{place}: {count} file{'s' * (count > 1)} {suffix}: no image, by the name"
        assert text in skipped, f"not listed: {text!r}"
    for name in found.named:
        assert f"{name}: a folder, though an image by its name" in skipped, f"not listed: {name!r}"
    empty = sum("a folder without images" in each for each in skipped)
    said = [each for each in skipped if "differ in upper and lower case alone" in each]
    twins = {"cat", "Cat"} <= {name.split("/")[0] for name in found.names("image", "bad")}
    assert said == ["Cat and cat: 2 classes whose names differ in upper and lower case alone"] * twins
    listed = len(found.names("bad", "no file")) + len(found.closed) + len(kinds) + len(found.named)
    listed += empty + twins
    assert len(skipped) == listed, skipped


def _nearest(got: Array, among: dict[str, Array]) -> str:
    """The name of the image that this is."""
    apart = {name: np.abs(got.astype(int) - pixels.astype(int)).mean() for name, pixels in among.items()}
    assert apart, "more images than there are"
    name = min(apart, key=lambda each: apart[each])
    assert apart[name] < 12, f"another image than {name!r}: {apart[name]:.0f} levels apart"
    return name


def check_predicting(found: Planted) -> None:
    """What `predict FOLDER` makes of it."""
    bad: list[tuple[Path, str]] = []
    files, others = image_files([found.top], bad)
    answered: list[Path] = []
    for group, inputs in inputs_of(files, (3, SIDE, SIDE), 1.0, bad, None):
        answered += group
        for path, image in zip(group, inputs, strict=True):
            got = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            _nearest(got, {"it": found.pixels[_name(found, path)]})
    assert sorted(_name(found, path) for path in answered) == sorted(found.names("image"))
    listed = sorted(_name(found, path) for path, _ in bad if path != found.top)
    assert listed == sorted([*found.names("bad", "no file"), *found.closed])
    assert all(why for _, why in bad)
    told = sum(int(word) for text in others for word in text.rpartition(": ")[2].split() if word.isdecimal())
    assert told == len(found.names("other")) + len(found.named), others


def fuzz_folders(place: Path, folders: int, seed: int) -> tuple[int, list[str]]:
    """How many folders were refused, as they should be, and the faults."""
    refused, faults = 0, []
    for number in range(folders):
        root = place / f"{number}"
        found = plant(root, random.Random(f"{seed} {number}"))
        refused += found.refused()
        for check in (check_loading, check_predicting):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    check(found)
            except Exception:
                faults.append(f"folder {number}, {check.__name__}:\n{traceback.format_exc(limit=-3)}")
        _remove(place)
    return refused, faults


def _remove(place: Path) -> None:
    for folder in place.rglob("closed"):
        folder.chmod(0o700)
    for each in place.iterdir():
        shutil.rmtree(each)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folders", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        if os.geteuid() == 0:  # to whom nothing is closed
            os.chown(place, _NOBODY, _NOBODY)
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
        os.environ["SELFENSEMBLE_CACHE"] = str(Path(place) / "fuzzed" / "cache")
        began = time.perf_counter()
        (Path(place) / "fuzzed").mkdir()
        refused, faults = fuzz_folders(Path(place) / "fuzzed", options.folders, options.seed)
    for fault in faults[:20]:
        print(fault.encode("utf-8", "backslashreplace").decode())
    seconds = time.perf_counter() - began
    print(f"{options.folders} folders, {refused} refused, {len(faults)} faults, {seconds:.0f} s")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
