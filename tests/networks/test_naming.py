"""Networks by name: what is imported, what is not, and what is said when it cannot be."""

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import selfensemble as rse
from selfensemble.artefacts.opening import with_mean_and_std
from selfensemble.networks import naming
from selfensemble.networks.expected import expected_images
from selfensemble.networks.importing import is_importable
from selfensemble.networks.names import is_network_name
from selfensemble.networks.naming import name_of, network_from
from selfensemble.networks.normalized import Normalized
from selfensemble.runtime.errors import MissingPackage

FILE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs):
        return self.head(self.conv(inputs).mean(dim=(2, 3)))


def make(width=4):
    return Net(5, width)


def broken():
    raise RuntimeError("no weights here")


def nothing():
    return {"width": 4}


ready = Net(3)
number = 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with networks in a file and in a package."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    (tmp_path / "mynets.py").write_text(FILE)
    package = tmp_path / "own_package" / "parts"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "nets.py").write_text(FILE)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("mynets", "own_package")):
            del sys.modules[name]
    sys.path[:] = path


@pytest.mark.parametrize(
    "name", ["mynets.py:make", "./mynets.py:make", "mynets:make", "own_package.parts.nets:make"]
)
def test_a_network_of_ones_own(here: Path, name: str) -> None:
    path = list(sys.path)
    network = network_from(name, {"width": 6})
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    assert network.conv.out_channels == 6  # type: ignore[union-attr]
    assert name_of(network) == (name, {"width": 6})
    assert sys.path[: len(path)] == path  # what is imported later is not looked for here first


def test_classes_and_networks_that_are_there(here: Path) -> None:
    assert network_from("mynets.py:Net", {"classes": 9})(torch.rand(1, 3, 8, 8)).shape == (1, 9)
    one, other = (network_from("mynets.py:ready") for _ in range(2))
    assert type(one) is type(other)
    with torch.no_grad():
        one.head.weight.zero_()  # type: ignore[union-attr, operator]
    assert not same(one, other)


def test_copies_of_graphs_keep_their_name(here: Path) -> None:
    """Which onnx2torch and torch.fx make: a copy of one has nothing but what its graph needs."""
    code = "import mynets\nfrom torch import fx\n\n\n{}:\n    return fx.symbolic_trace(mynets.make(width))\n"
    Path("graphs.py").write_text(code.format("def make(width)"))
    network = network_from("graphs.py:make", {"width": 2})
    assert name_of(copy.deepcopy(copy.deepcopy(network))) == ("graphs.py:make", {"width": 2})


def test_a_file_may_import_its_neighbours_and_is_read_anew(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "mynets_blocks.py").write_text(FILE)
    (here / "sub" / "mynets_whole.py").write_text("from mynets_blocks import make\n")
    assert isinstance(network_from("sub/mynets_whole.py:make"), nn.Module)
    (here / "mynets_edited.py").write_text("make = int\n")
    with pytest.raises(TypeError, match="returned a int"):
        network_from("mynets_edited.py:make")
    (here / "mynets_edited.py").write_text(FILE)
    assert isinstance(network_from("mynets_edited.py:make"), nn.Module)


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "says"),
    [
        ("nets.py:make", {}, FileNotFoundError, "no file nets.py"),
        ("nonets:make", {}, FileNotFoundError, "no module nonets in"),
        ("own_package.nonets:make", {}, FileNotFoundError, "no module own_package.nonets"),
        ("mynets.py:mak", {}, ValueError, r"no attribute 'mak'; it has Net, make"),
        ("mynets.py:number", {}, TypeError, "is a int, neither a network"),
        ("mynets.py:nothing", {}, TypeError, "returned a dict, no network"),
        ("mynets.py:broken", {}, ValueError, r"RuntimeError: no weights here \(mynets.py:\d+\)"),
        ("mynets.py:Net", {}, ValueError, "missing a required argument: 'classes'.*--network-args"),
        ("mynets.py:make", {"depth": 3}, ValueError, "unexpected keyword argument 'depth'"),
        ("mynets.py:ready", {"width": 3}, ValueError, "takes no arguments"),
        ("mynets.py:", {}, ValueError, "package.module:attribute"),
        ("mynets", {}, ValueError, "names no network: write package.module:attribute"),
        ("timm:no-such-network-at-all", {}, (MissingPackage, ValueError), "timm"),
    ],
)
def test_what_is_wrong_is_said(
    here: Path, name: str, arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as raised:
        network_from(name, arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import no_such_package_anywhere", "needs no_such_package_anywhere, which is not installed"),
        ("def make(:", "SyntaxError"),
        ("raise SystemExit('usage')", "SystemExit: usage"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(mynets_wrong.py:1\)"),
    ],
)
@pytest.mark.parametrize("name", ["mynets_wrong.py:make", "mynets_wrong:make"])
def test_modules_that_cannot_be_imported(here: Path, text: str, says: str, name: str) -> None:
    (here / "mynets_wrong.py").write_text(text + "\n")
    with pytest.raises((ValueError, MissingPackage), match=says):
        network_from(name)


def test_libraries_that_are_missing_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("timm", "torchvision", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingPackage, match=rf"needs {library}: pip install {library}"):
            network_from(f"{library}:resnet18")


def test_what_is_a_name(here: Path) -> None:
    for name in ("a.b:c", "a.py:c", "timm:resnet18", "transformers:some/folder", "torchvision:vgg16"):
        assert is_network_name(name)
    for folder in ("digits-rse", "runs/rse", "hf-hub:me/rse", r"C:\runs\rse", "C:/runs/rse"):
        assert not is_network_name(folder)
    (here / "odd:name").mkdir()
    assert not is_network_name("odd:name")


def test_asking_whether_a_module_is_there_runs_nothing(here: Path) -> None:
    (here / "own_package" / "__init__.py").write_text("raise SystemExit('it ran')\n")
    assert is_importable("own_package.parts.nets:make")
    assert not is_importable("own_package.parts.other:make")
    assert not is_importable("own_package.parts.nets.deeper:make")
    assert is_importable("mynets.py:make")
    assert not is_importable("nets.py:make")
    assert not any(name.startswith("own_package") for name in sys.modules)


# --- weights -----------------------------------------------------------------------------------------------


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("form", ["safetensors", "plain", "checkpoint", "parallel", "compiled"])
def test_weights(here: Path, form: str) -> None:
    trained = network_from("mynets.py:make")
    state = trained.state_dict()
    prefix = {"parallel": "module.", "compiled": "_orig_mod."}.get(form, "")
    saved: Any = {prefix + key: tensor for key, tensor in state.items()}
    if form == "safetensors":
        save_file(saved, "weights.bin")  # by what is in it, whatever its name
    else:
        torch.save({"epoch": 3, "state_dict": saved} if form == "checkpoint" else saved, "weights.bin")
    assert not same(network_from("mynets.py:make"), trained)
    assert same(network_from("mynets.py:make", weights="weights.bin"), trained)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


def test_weights_that_do_not_fit_or_run_code(here: Path) -> None:
    state = network_from("mynets.py:make").state_dict()
    for what, says in (
        (state | {"extra": torch.zeros(1)}, "it also has extra"),
        ({key: state[key] for key in state if key != "head.bias"}, "it lacks head.bias"),
        (state | {"head.bias": torch.zeros(9)}, r"head.bias is \(9,\), the network's \(5,\)"),
        ({"one": state, "ema": state}, "several state dicts"),
        ([1, 2], "holds no state dict"),
        ({"state_dict": state, "evil": Evil()}, "could run code"),
    ):
        torch.save(what, "weights.pt")
        with pytest.raises(ValueError, match=says):
            network_from("mynets.py:make", weights="weights.pt")
    assert not Path("it-ran").exists()
    Path("weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        network_from("mynets.py:make", weights="weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no file nowhere.pt"):
        network_from("mynets.py:make", weights="nowhere.pt")


def test_tied_weights_are_saved_once(here: Path) -> None:
    (here / "mynets_tied.py").write_text(
        "from torch import nn\n\n\ndef make():\n    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))\n"
        "    net[1].weight = net[0].weight\n    return net\n"
    )
    trained = network_from("mynets_tied.py:make")
    state = {key: tensor for key, tensor in trained.state_dict().items() if key != "1.weight"}
    save_file(state, "tied.safetensors")
    assert same(network_from("mynets_tied.py:make", weights="tied.safetensors"), trained)
    del state["0.weight"]
    save_file(state, "less.safetensors")
    with pytest.raises(ValueError, match=r"it lacks 0.weight, 1.weight"):
        network_from("mynets_tied.py:make", weights="less.safetensors")


# --- libraries ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_transformers_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3
    )
    trained = transformers.ResNetForImageClassification(config).eval()
    trained.save_pretrained(tmp_path / "whole")
    name = f"transformers:{tmp_path / 'whole'}"
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(network_from(name)(images).logits, trained(images).logits)
    fresh = network_from(name, {"pretrained": False})
    assert not torch.equal(fresh(images).logits, trained(images).logits)
    assert network_from(name, {"num_labels": 7})(images).logits.shape == (2, 7)  # a classifier to be trained
    with pytest.raises(ValueError, match="no no_such_key in its configuration"):
        network_from(name, {"no_such_key": 1})
    with pytest.raises(ValueError, match="or of another shape, for resnet"):  # the body, not the head
        network_from(name, {"num_labels": 7, "hidden_sizes": [6]})
    for added in ({"depths": [2]}, {"num_labels": 7, "depths": [2]}, {"num_labels": 6, "hidden_sizes": [6]}):
        with pytest.raises(ValueError, match="leave out the arguments that change its body"):
            network_from(name, added)
    trained.resnet.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match=r"no weights for classifier.*num_labels"):
        network_from(f"transformers:{tmp_path / 'body'}")
    with pytest.raises(FileNotFoundError, match="cannot be had"):
        network_from(f"transformers:{tmp_path / 'nowhere'}")


def test_libraries_are_asked_for_weights_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stand-ins that have the functions of timm and torchvision that are used."""
    timm, torchvision, models = (ModuleType(name) for name in ("timm", "torchvision", "models"))
    asked: list[Any] = []

    def make(name: str, **arguments: Any) -> nn.Module:
        asked.append((name, arguments))
        if arguments.get("pretrained") or arguments.get("weights"):
            raise OSError("no way to the hub")
        return nn.Sequential(nn.Conv2d(3, 2, 1))

    timm.__dict__.update(
        create_model=make, is_model=lambda name: name == "net", list_models=lambda: ["net"],
        is_model_pretrained=lambda name: True,
    )  # fmt: skip
    models.__dict__.update(get_model=make, list_models=lambda module: ["net"])
    torchvision.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    for library in ("timm", "torchvision"):
        with pytest.raises(FileNotFoundError, match=r"cannot be had \(OSError\).*--weights FILE"):
            network_from(f"{library}:net")
        network = network_from(f"{library}:net", {"pretrained": False, "classes": 3})
        assert name_of(network) == (f"{library}:net", {"classes": 3})
        assert isinstance(network_from(f"{library}:net", pretrained=False), nn.Sequential)
        with pytest.raises(ValueError, match="perhaps net"):
            network_from(f"{library}:nett")
    assert [name for name, _ in asked] == ["net"] * 6
    with pytest.raises(ValueError, match=r"no network '\.\./net'"):
        network_from("timm:../net")


def test_colours_in_another_order_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_flip_channel_order": true}')
    with pytest.raises(ValueError, match="blue, green, red"):
        rse.load(f"transformers:{tmp_path}")


def test_a_mean_that_a_processor_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    file, name = tmp_path / "preprocessor_config.json", f"transformers:{tmp_path}"
    file.write_text('{"do_normalize": true, "image_processor_type": "SomebodysProcessor"}')
    with pytest.raises(ValueError, match="does not say by which mean and std"):
        expected_images(network_from(name), name)
    file.write_text('{"do_normalize": true, "image_processor_type": "ViTImageProcessorFast"}')
    assert expected_images(network_from(name), name).mean_and_std == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("told", "shape", "mean_and_std"),
    [
        (
            {"image_mean": [0.5], "image_std": [0.25], "size": {"height": 8, "width": 9}},
            (1, 8, 9),
            ((0.5,), (0.25,)),
        ),
        ({"image_mean": [0.5], "image_std": [0.25], "do_normalize": False, "size": 8}, (1, 8, 8), None),
        ({"image_mean": [0.5], "image_std": [0.25], "size": [8, 9]}, (1, 8, 9), ((0.5,), (0.25,))),
        (  # which needs torchvision where it leaves something out
            {
                "image_processor_type": "ViTImageProcessorFast",
                "image_mean": [0.5],
                "image_std": [0.25],
                "size": 8,
            },
            (1, 8, 8),
            ((0.5,), (0.25,)),
        ),
        ({"image_mean": [51.0], "image_std": [102.0], "do_rescale": False}, None, ((0.2,), (0.4,))),
        ({"rescale_factor": 0.5 / 255, "rescale_offset": True}, None, ((2.0,), (2.0,))),
        ({"image_mean": [0.5], "image_std": [0.25], "include_top": True}, None, ((0.5,), (0.0625,))),
        (
            {
                "image_processor_type": "MobileViTImageProcessor",
                "image_mean": [0.5],
                "image_std": [0.5],
                "do_flip_channel_order": False,
            },
            None,
            None,
        ),
        (None, None, None),
    ],
)
def test_images_that_a_network_of_transformers_wants(
    tmp_path: Path, told: Any, shape: Any, mean_and_std: Any
) -> None:
    """Mean and std belong to the weights: a fresh network wants none."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    if told is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    name = f"transformers:{tmp_path}"
    network = network_from(name)
    assert expected_images(network, name) == (shape, mean_and_std)
    assert expected_images(network_from(name, pretrained=False), name) == (shape, None)
    ensemble = rse.load(name)
    found = ensemble.model
    assert isinstance(found, Normalized) is (mean_and_std is not None)
    if isinstance(found, Normalized):
        assert found.mean.tolist() == pytest.approx(list(mean_and_std[0]))
        assert found.std.tolist() == pytest.approx(list(mean_and_std[1]))
    images = torch.rand(2, 1, 8, 8)
    inside = images if mean_and_std is None else (images - mean_and_std[0][0]) / mean_and_std[1][0]
    with rse.noise_disabled(ensemble):
        answer = ensemble.predict_proba(images)
    assert torch.allclose(answer, network.eval()(inside).logits.softmax(dim=1), atol=1e-6)


def test_images_that_a_network_of_torchvision_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the weights that were asked for; by a stand-in that has what is used."""

    def weights(side: int, mean: float) -> Any:
        told = SimpleNamespace(crop_size=[side], mean=[mean] * 3, std=[0.5] * 3)
        return SimpleNamespace(transforms=lambda: told)

    known = {"DEFAULT": weights(299, 0.5), "FIRST": weights(224, 0.4)}
    torchvision, models = ModuleType("torchvision"), ModuleType("models")
    models.__dict__.update(
        get_model=lambda name, **arguments: nn.Conv2d(3, 2, 1), list_models=lambda module: ["net"],
        get_model_weights=lambda name: known,
    )  # fmt: skip
    torchvision.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    for arguments, side, mean in (
        ({}, 299, 0.5),
        ({"weights": "Net_Weights.FIRST"}, 224, 0.4),
        ({"weights": "FIRST", "image_size": 96}, 96, 0.4),
        ({"weights": None}, 299, None),
        ({"pretrained": False}, 299, None),
        ({"pretrained": False, "weights": "OTHERS"}, 299, None),
    ):
        network = network_from("torchvision:net", arguments)
        told = None if mean is None else ((mean,) * 3, (0.5,) * 3)
        assert expected_images(network, "torchvision:net") == ((3, side, side), told)
    network.image_size = 200  # type: ignore[assignment]  # of one size, whatever its weights are of
    assert expected_images(network, "torchvision:net").shape == (3, 200, 200)


@pytest.mark.parametrize(
    ("arguments", "shape", "mean"),
    [
        ({}, (3, 20, 20), (0.1, 0.2, 0.3)),
        ({"in_chans": 1}, (1, 20, 20), (pytest.approx(0.2),)),
        ({"img_size": 12}, (3, 12, 12), (0.1, 0.2, 0.3)),
    ],
)
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_images_that_a_network_of_timm_wants(library: str, arguments: Any, shape: Any, mean: Any) -> None:
    """By itself, and within one of transformers."""
    told = {"input_size": (3, 20, 20), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    network = nn.Identity()
    if library == "timm":
        network.pretrained_cfg = told  # type: ignore[assignment]
    else:
        network.config = SimpleNamespace(pretrained_cfg=told)  # type: ignore[assignment]
    name = f"{library}:net"
    naming._remember(network, {"name": name, "arguments": arguments, "pretrained": True})
    found = expected_images(network, name)
    assert found.shape == shape
    assert found.mean_and_std is not None
    assert found.mean_and_std[0] == mean
    assert found.mean_and_std[1] == pytest.approx((0.5,) * len(mean))


def test_a_mean_of_other_channels_is_asked_for() -> None:
    network = nn.Identity()
    network.pretrained_cfg = {"input_size": (3, 20, 20), "mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3}  # type: ignore[assignment]
    for pretrained in (True, False):
        about = {"name": "timm:net", "arguments": {"in_chans": 4}, "pretrained": pretrained}
        naming._remember(network, about)
        if pretrained:
            with pytest.raises(ValueError, match=r"network takes 4: say the mean and std.*--mean, --std"):
                expected_images(network, "timm:net")
        else:
            assert expected_images(network, "timm:net") == ((4, 20, 20), None)


def test_a_processor_is_followed_where_it_can_be(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8,
        patch_size=4,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    name, file = f"transformers:{tmp_path}", tmp_path / "preprocessor_config.json"
    for told, side in (
        ({"size": {"shortest_edge": 16}, "crop_size": {"height": 12, "width": 12}}, 12),
        ({"size": {"shortest_edge": 16}}, 16),
        ({"size": {"shortest_edge": 16}, "crop_size": 12, "do_center_crop": False}, 16),
        ({}, 8),
    ):
        file.write_text(json.dumps(told))
        assert expected_images(network_from(name), name).shape == (3, side, side)
    file.write_text('{"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": true}')
    with pytest.raises(ValueError, match="standardised as Wav2Vec2FeatureExtractor does it"):
        expected_images(network_from(name), name)
    assert expected_images(network_from(name, pretrained=False), name).shape == (3, 8, 8)


# --- mean and std ------------------------------------------------------------------------------------------


def test_normalized() -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
    network = Normalized(nn.Identity(), mean, std)
    images = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(images[:, k] - mean[k]) / std[k] for k in range(3)], dim=1)
    assert torch.equal(network(images), expected)
    assert torch.equal(Normalized(nn.Identity(), 0.5, 0.25)(images), (images - 0.5) / 0.25)
    assert Normalized(nn.Identity(), 0.5, [1, 2, 3])(images[:, :, 0, 0]).shape == (2, 3)
    assert network(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ([], [1], "a number for each channel"),
        ([0, 0], [1, 1, 1], "mean has 2 channels, std 3"),
        (0, 0, "std must be positive"),
        (0, -1, "std must be positive"),
        (float("nan"), 1, "finite"),
        ("half", 1, "finite number"),
        (True, 1, "finite number"),
    ],
)
def test_wrong_mean_and_std(mean: Any, std: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Normalized(nn.Identity(), mean, std)


def test_images_that_do_not_fit_mean_and_std() -> None:
    network = Normalized(nn.Identity(), [0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="3 channels"):
        network(torch.rand(2, 1, 4, 4))
    with pytest.raises(TypeError, match="uint8"):
        network(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_mean_and_std_are_of_pixels_whatever_the_bounds(bounds: tuple[float, float]) -> None:
    low, high = bounds
    network, pixels = nn.Flatten(), torch.rand(3, 2, 4, 4)
    found = with_mean_and_std(network, "mine:net", (0.5, 0.4), (0.25, 0.2), bounds)
    mean, std = torch.tensor([0.5, 0.4]).view(2, 1, 1), torch.tensor([0.25, 0.2]).view(2, 1, 1)
    torch.testing.assert_close(found(low + (high - low) * pixels), ((pixels - mean) / std).flatten(1))
