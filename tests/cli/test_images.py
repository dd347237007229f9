"""Folders as people have them, in commands: sorted by class, with damaged files, of other sizes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.config import ArtefactConfig
from selfensemble.cli.data_options import DataOptions
from selfensemble.cli.loading import test_data_of as images_of
from selfensemble.runtime.errors import InputError

from ..command import call, error, run

NETS = """
import torch
from torch import nn

class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([-8., 8.]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
            self.conv.bias.copy_(torch.tensor([12., -12.]))

    def forward(self, images):
        return self.conv(images).mean(dim=(2, 3))
"""
QUICK = "attacks: [{attack: fgsm, eps: [0.01]}]\njudge: {queries: 1, seeds: 1}\nchecks: false\nimages: 20\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of several sizes, a network that tells dark from bright, and an ensemble of it for 12x12."""
    root = tmp_path_factory.mktemp("cli")
    (root / "nets.py").write_text(NETS)
    (root / "quick.yaml").write_text(QUICK)
    chance = np.random.default_rng(0)
    for name, level in (("bright", 180), ("dark", 0)):
        for number in range(150):
            file = root / "photos" / "test" / name / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = chance.integers(0, 70, (*chance.integers(12, 16, 2), 3), dtype=np.uint8) + level
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    scope: dict[str, type[nn.Module]] = {}
    exec(NETS, scope)
    ensemble = rse.SelfEnsemble(scope["Brightness"](), rse.NoiseConfig(0.1, 0), draws=2)
    rse.save(ensemble, root / "saved", classes=("dark", "bright"), input_shape=(3, 12, 12))
    return root


def with_network(place: Path, *arguments: str | Path) -> list[str | Path]:
    return [*arguments, "--network", f"{place}/nets.py:Brightness"]


def test_every_command_measures_both_classes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a folder that is sorted by class, whose first 150 images are all bright."""
    monkeypatch.chdir(tmp_path)
    data = ("--data", place / "photos")
    evaluated = run(
        *with_network(place, "evaluate", place / "saved", *data, "--protocol", place / "quick.yaml", "--json")
    )
    found = json.loads(evaluated.stdout)
    assert found["data"]["drawn"] == 0
    table = (tmp_path / "runs" / "saved-quick" / "images.csv").read_text().splitlines()
    labels = [line.split(",")[1] for line in table if ",clean," in line]
    assert sorted(labels) == ["0"] * 10 + ["1"] * 10
    run(
        *with_network(place, "certify", place / "saved", *data, "--n-images", "10", "--n", "50", "--n0", "10")
    )
    rows = (tmp_path / "runs" / "saved-certified-mean" / "certificates.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[1] for row in rows) == ["0"] * 5 + ["1"] * 5
    shown = run("report", "runs/saved-quick").stdout
    assert shown
    images = images_of(
        ArtefactConfig(noise={}, draws=1, input_shape=(3, 12, 12), classes=("dark", "bright")),
        DataOptions(data=str(place / "photos")),
    )
    assert images.labels[:10].bincount().tolist() == [5, 5]  # doctor
    assert images.labels[-10:].bincount().tolist() == [5, 5]  # tune, calibrate


def config_of(**values: object) -> ArtefactConfig:
    return ArtefactConfig.model_validate({"noise": {}, "draws": 1} | values)


def test_the_size_is_that_of_the_network_where_photos_leave_it_open(place: Path) -> None:
    photos = DataOptions(data=str(place / "photos"))
    assert images_of(config_of(input_shape=(3, 12, 12)), photos).shape == (3, 12, 12)
    assert images_of(config_of(input_shape=(1, 9, 7)), photos).shape == (1, 9, 7)
    with pytest.raises(ValueError, match="--size"):
        images_of(config_of(), photos)
    with pytest.raises(InputError, match=r"shape \(3, 10, 10\), the model takes \(3, 12, 12\).*--size 12"):
        images_of(config_of(input_shape=(3, 12, 12)), DataOptions(data=str(place / "photos"), size=10))
    with pytest.raises(InputError, match="--size 12 --channels 3"):
        images_of(config_of(input_shape=(3, 12, 12)), DataOptions(data="digits"))
    assert images_of(config_of(), DataOptions(data=str(place / "photos"), size=10, channels=1)).shape == (
        1,
        10,
        10,
    )


def test_how_images_were_read_in_training_holds_for_their_source_alone(place: Path) -> None:
    recorded = {"data": {"source": str(place / "photos"), "size": 11, "test_split": "test"}}
    assert images_of(config_of(recipe=recorded), DataOptions()).shape == (3, 11, 11)
    assert images_of(config_of(recipe=recorded), DataOptions(size=12)).shape == (3, 12, 12)
    recorded["data"]["test_split"] = "nowhere"
    with pytest.raises(FileNotFoundError, match="--test-split"):
        images_of(config_of(recipe=recorded), DataOptions())
    assert len(images_of(config_of(recipe=recorded), DataOptions(test_split="test"))) == 300


def test_data_that_are_code_are_imported_when_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "sets.py").write_text(
        "from pathlib import Path\nimport torch\nfrom torch.utils.data import TensorDataset\n"
        f"Path({str(tmp_path)!r}, 'ran').touch()\n"
        "def make(split): return TensorDataset(torch.zeros(4, 1, 2, 2), torch.arange(4))\n"
    )
    recorded = config_of(recipe={"data": {"source": f"{tmp_path}/sets.py:make"}})
    with pytest.raises(InputError, match=r"is code.*--data .*sets\.py:make"):
        images_of(recorded, DataOptions())
    assert not (tmp_path / "ran").exists()
    assert len(images_of(recorded, DataOptions(data=f"{tmp_path}/sets.py:make"))) == 4
    with pytest.raises(InputError, match="pass --data"):
        images_of(config_of(recipe={"data": {"source": "X (given in Python, train)"}}), DataOptions())


def test_predict_answers_the_good_files_and_lists_the_others(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / ".hidden").mkdir(parents=True)
    Image.new("RGB", (20, 12), "white").save(folder / "good.png")
    Image.new("CMYK", (20, 12), (0, 0, 0, 255)).save(folder / "print.jpg")
    Image.new("L", (20, 12), 0).save(folder / ".hidden" / "0.png")
    (folder / "bad.png").write_bytes(b"nothing")
    Image.fromarray(np.full((12, 12), 300.0, dtype=np.float32)).save(folder / "float.tif")
    finished = call(*with_network(place, "predict", folder, "--model", place / "saved", "--json"))
    assert finished.returncode == 2
    found = json.loads(finished.stdout)
    labels = {Path(each["file"]).name: each["predictions"][0]["label"] for each in found["images"]}
    assert labels == {"good.png": "bright", "print.jpg": "dark"}
    assert {Path(each["file"]).name: each["reason"] for each in found["unreadable"]} == {
        "bad.png": "not an image, or damaged",
        "float.tif": next(each["reason"] for each in found["unreadable"] if "float" in each["file"]),
    }
    assert "bad.png as an image" in finished.stderr
    (folder / "bad.png").unlink()
    (folder / "float.tif").unlink()
    assert (
        run(*with_network(place, "predict", folder, "--model", place / "saved")).stderr.count("cannot") == 0
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "0.png").write_bytes(b"nothing")
    assert "as an image" in error(
        *with_network(place, "predict", tmp_path / "none", "--model", place / "saved")
    )


def test_what_files_leave_open_is_said(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cat" / "mine"
    folder.mkdir(parents=True)
    image = Image.new("RGB", (12, 12), "white")
    image.save(folder / "plain.png")
    image.save(folder / "pages.tif", save_all=True, append_images=[image])
    Image.new("RGBA", (12, 12)).save(folder / "clear.png")
    Image.fromarray(np.full((12, 12), 4000, dtype=np.uint16)).save(folder / "deep.png")
    finished = run(*with_network(place, "predict", folder, "--model", place / "saved", "--json"), expect=2)
    assert len(json.loads(finished.stdout)["images"]) == 3
    assert "pages.tif as an image: it has several pages" in finished.stderr
    assert "images: 1 with transparent parts: put on white" in finished.stderr
    assert "images: 1 of 16 bits: white is 65,535; 1 have no value above 4,095" in finished.stderr
    (folder / "pages.tif").unlink()
    network = ("--network", f"{place}/nets.py:Brightness")
    told = call("validate", place / "saved", "--data", tmp_path / "cat", "--split", "mine", *network).stderr
    assert "in no class" in told  # a folder of images alone is no set of classes


@pytest.mark.skipif(os.name == "nt", reason="there are no pipes there")
def test_predict_waits_for_no_pipe_and_loses_nothing_in_silence(place: Path, tmp_path: Path) -> None:
    """Named files that are missing take no answers from others; others of a folder are counted."""
    folder = tmp_path / "mine"
    (folder / "inner").mkdir(parents=True)
    for name in ("good.png", "photo", "inner/photo.bak", "inner/other.BAK"):
        Image.new("RGB", (20, 12), "white").save(folder / name, "PNG")
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    asked = (folder, tmp_path / "missing.png", tmp_path / "empty")
    finished = call(*with_network(place, "predict", *asked, "--model", place / "saved", "--json"))
    assert finished.returncode == 2
    found = json.loads(finished.stdout)
    assert [Path(each["file"]).name for each in found["images"]] == ["good.png"]
    assert {Path(each["file"]).name: each["reason"] for each in found["unreadable"]} == {
        "empty": "a folder without images", "gone.png": "a link to nothing", "missing.png": "no such file",
        "pipe.png": "no file, but a pipe or a device",
    }  # fmt: skip
    assert f"files of {folder} that are no images by their names were left out: 2 .bak, 1 without suffix" in (
        finished.stderr
    )
    none = error(*with_network(place, "predict", tmp_path / "empty", "--model", place / "saved"))
    assert "a folder without images" in none


def test_answers_do_not_depend_on_how_many_are_asked_at_a_time(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfensemble.data import images

    command = with_network(
        place, "predict", place / "photos", "--model", place / "saved", "--seed", "3", "--json"
    )
    whole = json.loads(run(*command).stdout)
    monkeypatch.setattr(images, "BATCH_NUMBERS", 3 * 12 * 12 * 7)
    parts = json.loads(run(*command).stdout)
    assert len(whole["images"]) == len(parts["images"]) == 300
    for one, other in zip(whole["images"], parts["images"], strict=True):
        assert one["file"] == other["file"]
        for guess, same in zip(one["predictions"], other["predictions"], strict=True):
            assert guess["probability"] == pytest.approx(same["probability"], abs=1e-6)  # rounded otherwise


def test_floating_point_inputs_are_taken_as_they_are() -> None:
    images: Tensor = torch.rand(4, 1, 2, 2) * 2 - 1
    data = rse.ImageData("sound", images, torch.arange(4), ("a", "b", "c", "d"))
    assert torch.equal(data.inputs(), images)
    assert torch.equal(rse.ImageData("half", images.double(), torch.arange(4), data.classes).inputs(), images)
    with pytest.raises(ValueError, match="uint8"):
        rse.ImageData("numbers", torch.zeros(4, 1, 2, 2, dtype=torch.int64), torch.arange(4), data.classes)


@pytest.mark.parametrize(("train_split", "test_split"), [("val", "val"), ("val", "train")])
def test_no_image_of_the_training_set_is_tested_where_the_folder_lies_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train_split: str, test_split: str
) -> None:
    """Where splits were named otherwise than usual: cut out of one, or the other way round."""
    chance = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(40):
            file = tmp_path / "here" / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.copytree(tmp_path / "here" / "val", tmp_path / "others" / "test")
    splits = {"train_split": train_split, "test_split": test_split}
    config = config_of(recipe={"data": {"source": str(tmp_path / "here")} | splits}, input_shape=(3, 8, 8))
    training = rse.load_data(tmp_path / "here", "train", train_split=train_split, test_split=test_split)
    trained_on = {image.numpy().tobytes() for image in training.images}
    for source in (None, str(tmp_path / "there")):
        tested = images_of(config, DataOptions(data=source))
        assert len(tested) == (8 if train_split == test_split else 40)
        assert not trained_on & {image.numpy().tobytes() for image in tested.images}
    assert "as usual" not in capsys.readouterr().err
    assert len(images_of(config, DataOptions(data=str(tmp_path / "others")))) == 40
    assert f"test_split {test_split}), which it has not" in " ".join(capsys.readouterr().err.split())
