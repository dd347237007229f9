"""Names are what users choose: with brackets, colons, spaces and any letter, they are text everywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from selfensemble.report.card import model_card
from selfensemble.report.markdown import code, plain
from selfensemble.runtime.texts import read_text, utf8
from selfensemble.training.recipe import load_recipe

from ..command import call, error, run

ODD = "[bold] [x] :x: {a} 試é"
CLOSING = "[" + "/b]"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A trained network in a folder of such a name, and such names of classes."""
    folder = tmp_path / ODD
    ensemble = rse.load("digits-rse")
    rse.save(
        ensemble, folder, architecture=read_config("digits-rse").architecture, input_shape=(1, 8, 8),
        classes=tuple(f"{k} {ODD} {CLOSING}" for k in range(10)),
    )  # fmt: skip
    return folder


def joined(text: str) -> str:
    """Without the lines of a table, and the breaks within its cells."""
    return "".join(text.replace("│", "").replace("┃", "").split())


def test_names_are_printed_as_they_are(odd: Path) -> None:
    picture = odd / f"{ODD} :+1:.png"
    Image.new("L", (8, 8)).save(picture)
    shown = joined(run("predict", "--model", odd, picture).stdout)
    for piece in ("[bold]", "[x]", ":x:", ":+1:", "{a}", "試é", CLOSING):
        assert piece in shown
    assert joined(ODD) in joined(run("info", odd).stdout)
    missing = joined(error("predict", "--model", odd, odd / f"{CLOSING} :x: none.png"))
    assert joined(f"{CLOSING} :x: none.png") in missing


def test_a_training_that_ends_is_no_error(tmp_path: Path) -> None:
    """`[/b]` closes nothing: it was an error of markup, after all the work."""
    out = tmp_path / CLOSING[1:-1].replace("/", "[")  # a slash is no part of a name
    for name in (out / "[" / "b] x", tmp_path / ODD):
        trained = call(
            "train", "digits-rse", "--out", name, "--set", "train.epochs=1", "--set", "model.width=0.1"
        )
        assert trained.returncode == 0, trained.stderr
        assert f"Written to {name}:" in trained.stdout


def test_a_terminal_without_these_letters(odd: Path) -> None:
    """In another encoding they are written as numbers; what was done is done, and JSON is JSON."""
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0", "COLUMNS": "400"}
    command = [sys.executable, "-m", "selfensemble", "info", str(odd)]
    finished = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert b"\\u8a66\xe9" in finished.stdout


def test_yaml_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    recipes = [tmp_path / name for name in ("é試.yaml", "marked é試.yaml")]
    shipped = Path(rse.__file__).parent / "training" / "recipes" / "digits-rse.yaml"
    text = shipped.read_text(encoding="utf-8") + "\n"
    described = text.replace("description: ", "description: 試é ", 1)
    assert described != text
    code_ = (
        "import sys; from selfensemble.training.recipe import load_recipe\n"
        "for file in sys.argv[1:]: print(ascii(load_recipe(file).description))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for recipe, mark in zip(recipes, (b"", b"\xef\xbb\xbf"), strict=True):
        recipe.write_bytes(mark + described.encode())
    command = [sys.executable, "-c", code_, *map(str, recipes)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert shown.stdout.count("\\u8a66\\xe9") == 2, shown.stderr
    recipe = recipes[0]
    recipe.write_bytes(described.encode("utf-16"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        load_recipe(str(recipe))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_text(recipe)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_of_folders_and_classes_whatever_the_locale(tmp_path: Path) -> None:
    """TensorBoard writes names in UTF-8; a class has one name in the locale of training and in another."""
    for split in ("train", "test"):
        for number, name in enumerate("éü"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for image in range(10):
                file = tmp_path / "photos" / split / name / f"{image}.png"
                Image.new("RGB", (8, 8), (200 * number, image, 0)).save(file)
    settings = {
        "data": {"source": str(tmp_path / "photos")}, "model": {"name": "small-cnn", "width": 0.1},
        "train": {"epochs": 1, "batch_size": 8, "precision": "no"},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    finished = subprocess.run(
        [sys.executable, "-m", "selfensemble", "train", "r.yaml", "--out", "名"],
        cwd=tmp_path, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert list((tmp_path / "名" / "tensorboard").iterdir())
    assert read_config(str(tmp_path / "名")).classes == ("é", "ü")


def test_a_report_on_a_network_whose_name_is_no_text(tmp_path: Path) -> None:
    """As an evaluation in a locale of ASCII records the name of a folder."""
    name = "\udcc3\udca9 \udcff"
    assert utf8(name) == "é \N{REPLACEMENT CHARACTER}".encode()
    (tmp_path / "quick.yaml").write_text("attacks: [{attack: fgsm, norm: linf, eps: [0.1]}]\nimages: 5\n")
    run("evaluate", "digits-rse", "--protocol", tmp_path / "quick.yaml", "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"name": name}))
    run("report", tmp_path / "run", "--out", tmp_path / "report.html")
    assert "é \N{REPLACEMENT CHARACTER}" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_are_text_in_markdown(odd: Path) -> None:
    card = model_card(ODD, read_config(odd))
    assert r"# \[bold\] \[x\] \:x: {a} 試é" in card
    assert json.dumps(ODD, ensure_ascii=False) in card
    assert plain("*a* _b_ snake_case `c` <d> |\n#") == r"\*a\* \_b\_ snake_case \`c\` \<d\> \| #"
    assert code("a `b` ``c``") == "``` a `b` ``c`` ```"
    assert code("plain") == "`plain`"
    shutil.rmtree(odd)
