"""Networks of one's own in every command: by name, and in saved folders, which import nothing themselves."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import nn

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from tests.command import error, run

FILE = """
import pathlib

from torch import nn

pathlib.Path("imported").touch()


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.last = nn.Conv2d(width, width, 3)
        self.first = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(width, 10)

    def forward(self, inputs):
        features = self.last(self.first(inputs).relu()).relu()
        return self.head(features.amax(dim=(2, 3)))


def make(width=4):
    return Net(width)
"""
NAME = "mynets.py:make"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network in a file, its trained weights, an image, and a saved ensemble of it."""
    folder, path = tmp_path_factory.mktemp("made"), list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("mynets.py").write_text(FILE)
        data = rse.load_data("digits", "test")
        Image.fromarray(data.images[0, 0].numpy()).save("digit.png")
        torch.save(_fitted(data).state_dict(), "weights.pt")
        run("pack", NAME, "saved", *NAMED, "--data", "digits", "--precision", "float32")
        Path("imported").unlink()
    sys.modules.pop("mynets", None)
    sys.path[:] = path
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Such a folder for one test, which works in it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.modules.pop("mynets", None)
    sys.path[:] = path


def _fitted(data: rse.ImageData) -> nn.Module:
    """Not at chance, which is all that commands need."""
    torch.manual_seed(0)
    network = rse.network_from(NAME, {"width": 8})
    adam = torch.optim.Adam(network.parameters(), lr=0.02)
    inputs, labels = data.inputs(), data.labels
    for _ in range(100):
        logits = network((inputs + 0.1 * torch.randn_like(inputs) - 0.3) / 0.4)
        adam.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        adam.step()
    return network


NAMED = (
    "--network-args", '{"width": 8}', "--weights", "weights.pt", "--noise", "0.1:0.05", "--draws", 3,
    "--mean", "0.3", "--std", "0.4",
)  # fmt: skip
# Of each command: what comes behind it and MODEL, whether it wants to be told of data or of a shape, and what
# its JSON (or the file that it writes) says of an ensemble that works.
PASSED = {"randomness", "where noise enters"}
DATA, SHAPE = ("--data", "digits"), ("--shape", "1x8x8")
COMMANDS: dict[str, tuple[tuple[Any, ...], tuple[str, ...], Callable[[Any], bool]]] = {
    "evaluate": (
        ("--n", 10, "--c", 0.1, "--json"), DATA, lambda found: found["clean"]["accuracy"] > 0.5,
    ),
    "doctor": (
        ("--n", 5, "--steps", 2, "--eot", 2, "--json"), DATA,
        lambda found: {each["name"] for each in found["checks"] if each["passed"]}  >= PASSED,
    ),
    "certify": (
        ("--n-images", 5, "--n", 200, "--n0", 20, "--json"), DATA,
        lambda found: found["settings"]["n"] == 200 and found["std"] == pytest.approx(0.1),
    ),
    "tune": (
        ("--n-images", 20, "--levels", "0:0,0.1:0.05", "--json"), DATA,
        lambda found: found["levels"][0]["clean"]["value"] > 0.4,
    ),
    "predict": (
        ("digit.png", "--json", "--seed", 0), SHAPE,
        lambda found: len(found["images"][0]["predictions"]) == 3,
    ),
    "export": (("-o", "net.onnx"), SHAPE, lambda found: Path("net.onnx").stat().st_size > 1000),
    "info": (
        ("--json",), SHAPE,
        lambda found: found["network"] == {"name": NAME, "arguments": {"width": 8}} and found["draws"] == 3,
    ),
    "validate": (("--json",), SHAPE, lambda found: found == {"issues": []}),
    "pack": (("copy",), DATA, lambda found: read_config("copy").network is not None),
}  # fmt: skip


CALIBRATE = ("--n-images", 200, "--epsilon", 0.3, "--precision", "float32")


def command_of(name: str, model: str) -> tuple[Any, ...]:
    options = COMMANDS[name][0]
    return (name, *options, "--model", model) if name == "predict" else (name, model, *options)


def allowed(name: str) -> tuple[int, ...]:
    return (0, 3) if name == "doctor" else (0,)


def works(name: str, *command: Any) -> None:
    from tests.command import call

    finished = call(*command)
    assert finished.returncode in allowed(name), finished.stdout + finished.stderr
    found = json.loads(finished.stdout) if "--json" in command else None
    assert COMMANDS[name][2](found), found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_named_network(here: Path, name: str) -> None:
    works(name, *command_of(name, NAME), *NAMED, *COMMANDS[name][1])


@pytest.mark.parametrize("name", [*COMMANDS, "card", "calibrate"])
def test_a_saved_folder_of_ones_own_class(here: Path, name: str) -> None:
    """Nothing is imported until the command says so, and the error says how to."""
    command = {
        "card": ("card", "saved"),
        "calibrate": ("calibrate", "saved", *DATA, *CALIBRATE),
    }.get(name) or (*command_of(name, "saved"), *(DATA if COMMANDS[name][1] is DATA else ()))  # fmt: skip
    if name == "info":  # says what is written, and looks at no network
        assert json.loads(run(*command).stdout)["network"]["name"] == NAME
        assert not Path("imported").exists()
        return
    said = error(*command)
    assert not Path("imported").exists()
    offered = shlex.split(said.partition("If you trust it: selfensemble ")[2])
    assert offered == [*map(str, command), "--network", NAME, "--network-args", '{"width": 8}']
    for more in (offered[len(command) :], ["--trust-network"]):
        Path("imported").unlink(missing_ok=True)
        sys.modules.pop("mynets", None)
        for made in ("copy", "runs"):
            rename(made)
        if name in COMMANDS:
            works(name, *command, *more)
        else:
            run(*command, *more)
        assert Path("imported").exists()


def rename(made: str) -> None:
    if Path(made).exists():
        Path(made).rename(f"{made}-before")


def test_a_folder_that_names_a_program_runs_nothing(here: Path) -> None:
    """Neither by itself nor by an offer that hides what would run."""
    (here / "evil.py").write_text("import pathlib\npathlib.Path('it-ran').touch()\n")
    (here / "evil_package").mkdir()
    (here / "evil_package" / "__init__.py").write_text((here / "evil.py").read_text())
    (here / "evil_package" / "inner.py").touch()
    config = json.loads(Path("saved/config.json").read_text())
    for name, arguments in (
        ("evil:make", {}), ("evil.py:make", {}), ("evil_package.inner:make", {}),
        ("os:mkdir", {"path": "it-ran"}),
        ("torch:load", {"f": "weights.pt", "weights_only": False}),
    ):  # fmt: skip
        config["network"] = {"name": name, "arguments": arguments}
        Path("saved/config.json").write_text(json.dumps(config))
        for command in (
            ("predict", "digit.png", "--model", "saved"),
            ("certify", "saved", *DATA),
            ("card", "saved"),
        ):
            said = error(*command)
            assert name in said
            assert ("--network os:mkdir" in said) is False
            assert all(f'"{key}"' in said for key in arguments) or name == "os:mkdir"
        with pytest.raises(ValueError, match="was not imported"):
            rse.load("saved")
        assert not Path("it-ran").exists()
        assert not {"evil", "evil_package"} & set(sys.modules)
    config["network"] = {"name": "os:mkdir", "arguments": {"path": "it-ran"}}
    Path("saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of Python itself"):
        rse.load("saved", trust_network=True)
    config["network"] = {"name": "evil:make; rm -r .", "arguments": {}}
    Path("saved/config.json").write_text(json.dumps(config))
    assert "config.json" in error("info", "saved")
    assert not Path("it-ran").exists()


def test_loading_in_python(here: Path) -> None:
    images = rse.load_data("digits", "test").inputs(slice(4))
    with pytest.raises(ValueError, match=r"rse.load\(folder, trust_network=True\)"):
        rse.load("saved")
    assert not Path("imported").exists()
    network = rse.network_from(NAME, {"width": 8})
    loaded = [
        rse.load("saved", trust_network=True), rse.load("saved", NAME), rse.load("saved", network),
        rse.load("saved", model="mynets:make"), rse.SelfEnsemble.from_pretrained("saved", trust_network=True),
    ]  # fmt: skip
    answers = [each.predict_proba(images, seed=1) for each in loaded]
    assert all(torch.equal(answers[0], each) for each in answers[1:])
    with pytest.raises(ValueError, match="does not fit the network"):
        rse.load("saved", NAME, arguments={"width": 4})
    named = rse.load(NAME, arguments={"width": 8}, weights="weights.pt")
    assert [layer.std for layer in rse.noise_layers(named.model).values()] == [0.2, 0.1]
    with pytest.raises(ValueError, match="leave weights= out"):
        rse.load("saved", NAME, weights="weights.pt")


def test_the_server_takes_named_networks_and_folders(here: Path) -> None:
    with mock.patch("selfensemble.serving.run.run") as start:
        run("serve", NAME, *NAMED, *SHAPE, "--precision", "float32")
        run("serve", "saved", "--network", NAME, "--precision", "float32")
    answers = []
    for call in start.call_args_list:
        ensemble, classes, shape = call.args[:3]
        assert classes == tuple(map(str, range(10)))
        assert shape == (1, 8, 8)
        answers.append(
            ensemble.predict_proba(rse.load_data("digits", "test").inputs(slice(4)), draws=3, seed=0)
        )
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--network-args", "{width: 8}"), "--network-args is not JSON"),
        (("--network-args", "8"), "keywords and values"),
        (("--noise", "0.2"), "--noise is INIT:INNER"),
        (("--noise", "0.2:0.1,0:0"), "--noise is INIT:INNER"),
        (("--filter", "pool"), "conv, linear, conv+linear"),
        (("--mean", "0.5"), "std is missing"),
        (("--mean", "124,116,104", "--std", "58,57,57"), "divide them by 255"),
        (("--mean", "grey", "--std", "1"), "--mean is a number for each channel"),
        (("--mean", "0.1,0.2", "--std", "1"), "2 channels"),
        (("--shape", "8x8x"), "--shape is that of one input, 1 to 4 numbers"),
        (("--shape", "3x8x8"), r"cannot take inputs of shape (2, 3, 8, 8)"),
        (("--weights", "nowhere.pt"), "no file nowhere.pt"),
        (("--network-args", '{"depth": 8}'), "unexpected keyword argument 'depth'"),
    ],
)
def test_wrong_options(here: Path, more: tuple[str, ...], says: str) -> None:
    assert says in error("info", NAME, *SHAPE, *more)


def test_options_that_go_elsewhere(here: Path) -> None:
    assert "pass --shape" in error("info", NAME)
    assert "pass --data" in error("evaluate", NAME)
    assert "leave --noise out" in error("evaluate", "saved", "--network", NAME, "--noise", "0.2:0.1")
    assert "selfensemble pack mynets.py:make FOLDER" in error("calibrate", NAME, "--data", "digits")
    assert "selfensemble pack mynets.py:make FOLDER" in error("card", NAME)
    (here / "linear.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(8, 10)\n")
    assert "pass --filter linear" in error("info", "linear.py:make", *SHAPE)
    (here / "wide.py").write_text(FILE.replace("10)", "7)"))
    assert "answers with 7 classes, digits has 10" in error("evaluate", "wide.py:make", *DATA)


BROKEN = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 1)

    def forward(self, inputs):
        return self.head(self.conv(inputs).mean(dim=(2, 3)))


class Keywords(Net):
    def forward(self, *, pixel_values):
        return super().forward(pixel_values)


class Batch(Net):
    def forward(self, batch):
        return super().forward(batch["pixel_values"])
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Net", "torch.stack([torch.zeros_like(z), z], dim=1)"),
        ("Keywords", "an ensemble calls model(inputs), and this model's forward(*, pixel_values) cannot"),
        ("Batch", "the forward pass fails: IndexError: too many indices"),
    ],
)
def test_forwards_of_other_forms_are_refused_in_the_words_of_validate(
    here: Path, name: str, says: str
) -> None:
    (here / "broken.py").write_text(BROKEN)
    assert says in error("info", f"broken.py:{name}", *SHAPE)
    issues = json.loads(run("validate", f"broken.py:{name}", *SHAPE, "--json", expect=3).stdout)["issues"]
    assert any(says in each["message"] + each["cure"] for each in issues)
    shown = run("validate", f"broken.py:{name}", *SHAPE, expect=3).stdout
    assert "\\[" not in shown  # brackets as they are


def test_images_that_a_network_cannot_take_are_read_otherwise(here: Path) -> None:
    (here / "colour.py").write_text(FILE.replace("Conv2d(1,", "Conv2d(3,"))
    told = error("evaluate", "colour.py:make", *DATA)
    assert "cannot take inputs of shape (2, 1, 8, 8)" in told
    assert "--channels" in told


def test_levels_are_tuned_with_training_by_a_recipe(here: Path) -> None:
    """Which a network that was not trained here does not know; other weights are trained again."""
    asked = ("tune", NAME, *NAMED, *DATA, "--n", 20, "--levels", "0.1:0.05", "--epochs", 1)
    assert "says no recipe to train it by: pass --recipe" in error(*asked)
    assert "add --epochs" in error("tune", NAME, *NAMED, *DATA, "--n", 20, "--recipe", "digits-rse")
    finished = run(*asked, "--recipe", "digits-rse", "--out", "tuned", "--json")
    (level,) = json.loads(finished.stdout)["levels"]
    assert level["clean"]["value"] > 0.4
    (trained,) = (each for each in Path("tuned").iterdir() if each.is_dir())
    config = read_config(trained)
    assert config.network is not None
    assert (config.network.name, config.network.arguments) == (NAME, {"width": 8})
    assert config.normalize is not None
    assert config.noise[""] == 0.1  # in front of mean and std
    torch.save(rse.network_from(NAME, {"width": 8}).state_dict(), "weights.pt")
    run(*asked, "--recipe", "digits-rse", "--out", "tuned")
    assert len([each for each in Path("tuned").iterdir() if each.is_dir()]) == 2


def test_noise_behind_mean_and_std_is_in_pixels(here: Path) -> None:
    """In front of them, and of every convolution but the one that runs first behind them."""
    described = json.loads(run("info", NAME, *NAMED, *SHAPE, "--json").stdout)
    assert described["normalize"] == {"mean": [pytest.approx(0.3)], "std": [pytest.approx(0.4)]}
    assert described["noise"] == {"": 0.1, "model.last": 0.05}


@pytest.mark.filterwarnings("default")
def test_a_network_of_transformers_from_its_folder(here: Path) -> None:
    """With the mean and std that it was trained with, the shape of its images and the names of classes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8,
        patch_size=2, num_channels=1, id2label=dict(enumerate("9876543210")),
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    Path("vit/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.25]}))
    finished = run("info", "transformers:vit", "--filter", "conv+linear", "--noise", "0.2:0.1", "--json")
    assert "wants standardised images: --mean 0.5 --std 0.25" in finished.stderr
    described = json.loads(finished.stdout)
    assert described["input_shape"] == [1, 8, 8]
    assert described["classes"] == list("9876543210")
    assert described["normalize"] == {"mean": [0.5], "std": [0.25]}
    assert described["noise"][""] == 0.2
    assert len(described["noise"]) == 8  # the image, six linear layers of the block, the head
    run("pack", "transformers:vit", "packed", *DATA, "--filter", "conv+linear", "--precision", "float32")
    assert "of transformers" in Path("packed/README.md").read_text()
    assert len(json.loads(run("predict", "--model", "packed", "digit.png", "--json").stdout)["images"]) == 1
    finished = run("info", "transformers:vit", "--mean", 0, "--std", 1, "--json")
    assert "wants standardised" not in finished.stderr
    found = json.loads(run("validate", "transformers:vit", "--json").stdout)["issues"]
    assert [issue["rule"] for issue in found] == ["one-layer"]
