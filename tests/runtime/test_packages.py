"""The core works without any optional package, and what needs one says which."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest

import selfensemble as rse
from selfensemble.runtime.errors import MissingPackage
from selfensemble.runtime.packages import needs

from ..command import error

ROOT = Path(__file__).parents[2]
# What the extras bring, as it is imported.
OPTIONAL = (
    "accelerate", "click", "datasets", "fastapi", "huggingface_hub", "jinja2", "lightning", "matplotlib",
    "onnx", "onnxruntime", "onnxscript", "pandas", "PIL", "prometheus_client", "pyarrow", "python_multipart",
    "requests", "rich", "sklearn", "tensorboard", "timm", "torchvision", "transformers", "typer", "uvicorn",
    "yaml",
)  # fmt: skip
CORE = """
import torch

import selfensemble as rse

digits = rse.load_data("digits", "test")
images, labels = digits.inputs(slice(20)), digits.labels[:20]
ensemble = rse.load("digits-rse")
assert (ensemble.predict(images, seed=0).label == labels).sum() >= 16
attacked = rse.attacks.pgd(ensemble, images, labels, norm="l2", eps=1.0, steps=5)
assert rse.judge(ensemble, images, attacked, labels, norm="l2", eps=1.0).l2.max() <= 1.001
assert (rse.certify(ensemble, images, n=200).radius >= 0).all()
rse.decide(ensemble, images[:2], alpha=0.1)
model = rse.create_model("small-cnn", channels=1, width=0.25)
assert not [issue for issue in rse.validate(model, images) if issue.severity == "error"]
mine = rse.SelfEnsemble(model, example_inputs=images)
mine.save_pretrained("mine", classes=digits.classes, input_shape=digits.shape)
assert torch.equal(rse.load("mine").predict(images, seed=0).label, mine.predict(images, seed=0).label)
"""


def run_without_packages(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """In a process in which no optional package can be imported."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", blocked + code],
        cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_the_core_needs_no_optional_package(tmp_path: Path) -> None:
    done = run_without_packages(CORE, tmp_path)
    assert done.returncode == 0, done.stderr


# What Python runs, the package that it lacks, and the extra that brings it.
LACKING = (
    ("rse.Trainer", "accelerate", "train"),
    ("rse.load_recipe('digits-rse')", "yaml", "train"),
    ("rse.evaluation.load_protocol('honest')", "yaml", "cli"),
    ("rse.load_data('cifar10', 'test')", "datasets", "data"),
    ("rse.load('hf-hub:a/b')", "huggingface_hub", "hub"),
    ("rse.OnnxEnsemble('a.onnx').predict(torch.zeros(1, 1, 8, 8))", "onnxruntime", "onnx"),
    ("import selfensemble.report.html", "matplotlib", "report"),
    ("import selfensemble.serving.run", "fastapi", "serve"),
)
EACH = f"""
import torch

import selfensemble as rse

for code, package, extra in {LACKING!r}:
    try:
        exec(code)
    except ImportError as error:
        assert str(error) == f"{{package}} is not installed: pip install 'selfensemble[{{extra}}]'", error
    else:
        raise AssertionError(code)
"""


def test_what_is_missing_is_one_sentence_with_the_command(tmp_path: Path) -> None:
    done = run_without_packages(EACH, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_command_says_what_it_needs(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module('selfensemble', run_name='__main__')"
    done = run_without_packages(code, tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: rich is not installed: pip install 'selfensemble[cli]'\n"


def test_the_version_needs_no_package(tmp_path: Path) -> None:
    code = "import runpy, sys\nsys.argv[1:] = ['--version']\n"
    code += "runpy.run_module('selfensemble', run_name='__main__')"
    done = run_without_packages(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"selfensemble {rse.__version__}\n"


@pytest.mark.parametrize("lacking", ["accelerate", "jinja2", "matplotlib"])
def test_the_demo_asks_for_all_its_extras_at_once(lacking: str, tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {lacking: None}):
        said = error("demo", "--out", tmp_path / "demo")
    assert said == f"error: {lacking} is not installed: pip install 'selfensemble[report,train]'"


def test_other_faults_within_are_left_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), needs("timm"):
        raise ZeroDivisionError
    with (
        pytest.raises(MissingPackage, match=r"^no_such_package is not installed: pip install 'timm'$"),
        needs("timm"),
    ):
        importlib.import_module("no_such_package.part")


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        found
        for file in (ROOT / "src").rglob("*.py")
        for extras in file.read_text().split("selfensemble[")[1:]
        if "]" in extras.splitlines()[0]
        for found in extras.split("]")[0].split(",")
    }
    assert named <= set(project["optional-dependencies"])
    core = {name.partition(">=")[0] for name in project["dependencies"]}
    assert core == {"numpy", "pydantic", "safetensors", "scipy", "torch"}
