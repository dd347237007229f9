"""Saved ensembles that travel through a hub; processes of their own, for its address is read once."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import selfensemble as rse
from selfensemble.artefacts.config import Architecture
from selfensemble.artefacts.storage import read_config

from ..fake_hub import hub
from ..forked import run_forked


def python(code: str, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache"), "HF_TOKEN": "secret",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    return run_forked("-c", code, env=environment, cwd=folder)


def test_pushed_and_fetched(tmp_path: Path) -> None:
    """From a method and from a folder: only the files of an ensemble, which answers as it did."""
    architecture = Architecture(name="small-cnn", classes=4, channels=3, width=0.25)
    ensemble = rse.SelfEnsemble(rse.create_model(**architecture.model_dump()), draws=3).eval()
    rse.save(ensemble, tmp_path / "mine", architecture=architecture, input_shape=(3, 8, 8))
    (tmp_path / "mine" / "checkpoint.pt").write_bytes(b"a pickle")
    images = torch.rand(2, 3, 8, 8)
    expected = ensemble.predict(images, seed=1).probabilities
    torch.save(images, tmp_path / "images.pt")
    with hub() as (address, server):
        pushed = python(
            "import selfensemble as rse\n"
            "from selfensemble.artefacts.upload import push\n"
            "print(push('mine', 'me/pushed'))\n"
            "print(rse.load('mine').push_to_hub('me/method', licence='mit'))\n",
            address, tmp_path,
        )  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.startswith(f"{address}/me/pushed/commit/")
        assert set(server.files["me/pushed"]) == {"config.json", "model.safetensors"}
        assert set(server.files["me/method"]) == {"config.json", "model.safetensors", "README.md"}
        assert b'license: "mit"' in server.files["me/method"]["README.md"]
        assert "Bearer secret" in server.tokens
        fetched = python(
            "import torch, json, selfensemble as rse\n"
            "images = torch.load('images.pt')\n"
            "for model in (rse.load('hf-hub:me/pushed'), rse.SelfEnsemble.from_pretrained('me/pushed')):\n"
            "    print(json.dumps(model.predict(images, seed=1).probabilities.tolist()))\n",
            address, tmp_path,
        )  # fmt: skip
        assert fetched.returncode == 0, fetched.stderr
        for line in fetched.stdout.splitlines():
            torch.testing.assert_close(torch.tensor(json.loads(line)), expected)
        command = "import sys; sys.argv[1:] = ['info', 'hf-hub:me/pushed', '--json']\n"
        described = python(command + "from selfensemble.__main__ import main\nmain()", address, tmp_path)
        assert json.loads(described.stdout)["architecture"]["width"] == 0.25

        refusals = (
            ("rse.load('hf-hub:me/nobody')", "FileNotFoundError: the Hub has no network me/nobody"),
            ("rse.load('hf-hub:nobody')", "ValueError: 'nobody' is not a name"),
            ("rse.SelfEnsemble.from_pretrained('nobody')", "ValueError: 'nobody' is not a name"),
            (
                "rse.load('mine').push_to_hub('forbidden/x')",
                "PermissionError: the Hub does not take forbidden/x",
            ),
        )
        attempts = "".join(
            f"try: {code}\nexcept Exception as error: print(f'{{type(error).__name__}}: {{error}}')\n"
            for code, _ in refusals
        )
        refused = python(f"import selfensemble as rse\n{attempts}", address, tmp_path)
        assert refused.returncode == 0, refused.stderr
        for line, (_, problem) in zip(refused.stdout.splitlines(), refusals, strict=True):
            assert line.startswith(problem)
    # What was downloaded before is there without the hub; nothing else is.
    offline = python("import selfensemble as rse; rse.load('hf-hub:me/pushed')", address, tmp_path)
    assert offline.returncode == 0, offline.stderr
    lost = python("import selfensemble as rse; rse.load('hf-hub:me/method')", address, tmp_path)
    assert "FileNotFoundError: cannot reach the Hub" in lost.stderr


@pytest.mark.parametrize("name", ["ResNet", "ViT", "Swin"])
def test_networks_of_transformers_are_built_again(tmp_path: Path, name: str) -> None:
    """From their configuration alone, and the folder is one that the command line takes."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, dict[str, Any]] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_channels": 1},
        "ViT": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
                "image_size": 16, "patch_size": 8, "num_channels": 1},
        "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 16, "patch_size": 2,
                 "window_size": 2, "num_channels": 1},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(num_labels=4, **small[name])
    network = getattr(transformers, f"{name}ForImageClassification")(config)
    images = torch.rand(2, 1, 16, 16)
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.3, 0.1), example_inputs=images).eval()
    ensemble.save_pretrained(tmp_path / "net", classes=("a", "b", "c", "d"), input_shape=(1, 16, 16))
    again = rse.SelfEnsemble.from_pretrained(tmp_path / "net")
    torch.testing.assert_close(
        again.predict(images, seed=2).probabilities, ensemble.predict(images, seed=2).probabilities
    )
    card = (tmp_path / "net" / "README.md").read_text()
    assert f"{name}ForImageClassification of transformers" in card
    assert "license" not in card
    assert read_config(tmp_path / "net").transformers is not None


@pytest.mark.parametrize("name", ["Nothing", "AutoModel", "pipeline", "PreTrainedModel"])
def test_only_networks_of_transformers_are_built(tmp_path: Path, name: str) -> None:
    """A configuration from a stranger names a class; nothing but a network is made."""
    pytest.importorskip("transformers")
    rse.save(rse.SelfEnsemble(torch.nn.Conv2d(1, 2, 1)), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {"transformers": {"name": name, "config": {}}}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"no network|cannot be built"):
        rse.load(tmp_path)


def saved_vit(folder: Path) -> dict[str, Any]:
    """A saved network of transformers; what is in its `config.json`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        num_labels=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=16, patch_size=8, num_channels=1,
    )  # fmt: skip
    rse.save(rse.SelfEnsemble(transformers.ViTForImageClassification(config)).eval(), folder)
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def changed(folder: Path, values: dict[str, Any], kind: str | None = None, **changes: Any) -> Path:
    section = values["transformers"] | ({} if kind is None else {"name": kind, "config": {}})
    section["config"] = section["config"] | changes
    (folder / "config.json").write_text(json.dumps(values | {"transformers": section}))
    return folder


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (None, {"attn_implementation": "strangers/kernel"}),
        (None, {"_attn_implementation": "strangers/kernel"}),
        (None, {"_attn_implementation_internal": "strangers/kernel"}),
        (None, {"experts_implementation": "strangers/kernel:forward"}),
        (None, {"hidden_act": "strangers/activation"}),
        (None, {"quantization_config": {"quant_method": "awq"}}),
        (None, {"use_kernels": True}),
        ("DPTForSemanticSegmentation", {"backbone": "microsoft/resnet-50", "use_pretrained_backbone": True}),
        ("UperNetForSemanticSegmentation", {"backbone": "resnet18", "use_timm_backbone": True}),
        ("UperNetForSemanticSegmentation",
         {"backbone_config": {"model_type": "swin", "attn_implementation": "strangers/kernel"}}),
        ("UperNetForSemanticSegmentation",
         {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}}),
        ("TimmWrapperForImageClassification", {"architecture": "hf-hub:strangers/net"}),
        ("TimmWrapperForImageClassification", {"model_args": {"pretrained": True}}),
        ("TimmWrapperForImageClassification", {"model_args": {"checkpoint_path": "weights.pt"}}),
    ],
)  # fmt: skip
def test_a_strangers_configuration_fetches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None, asked: dict[str, Any]
) -> None:
    """Refused by the name of the key, before anything is asked for."""
    values = saved_vit(tmp_path)
    import socket

    def connect(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(ValueError, match=r"nothing is fetched|nothing but the network") as refused:
        rse.load(changed(tmp_path, values, kind, **asked))
    assert any(key in str(refused.value) for key in asked)


def test_keys_that_no_class_declares_are_left_out(tmp_path: Path) -> None:
    """Old and foreign ones, of which the network is none the worse."""
    values = saved_vit(tmp_path)
    images = torch.rand(2, 1, 16, 16)
    expected = rse.load(tmp_path).predict(images, seed=1).probabilities
    beside: dict[str, Any] = {
        "auto_map": {"AutoModel": "strangers/code--model.Net"}, "torchscript": False, "bad_words_ids": None,
        "_name_or_path": "/somebody/net", "license": "https://example.org", "_attn_implementation": "sdpa",
    }  # fmt: skip
    again = rse.load(changed(tmp_path, values, **beside))
    torch.testing.assert_close(again.predict(images, seed=1).probabilities, expected)
    config: Any = again.model.config
    assert not hasattr(config, "license")
    assert not hasattr(config, "auto_map")
