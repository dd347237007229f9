"""Networks that come with the package, packing, and cards."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from selfensemble.artefacts.zoo import locate, zoo
from selfensemble.report.card import model_card
from selfensemble.report.packing import licence_of, pack, write_card

NAMES = list(zoo())


def test_the_zoo_is_small_and_complete() -> None:
    assert "digits-rse" in NAMES
    files = [file for folder in zoo().values() for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 24 * 2**20
    for name, folder in zoo().items():
        card = (folder / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front["license"] == "apache-2.0"
        assert f'rse.load("{name}")' in card
        assert "attack" in card.split("## Measured")[1]
        config = (folder / "config.json").read_text()
        assert '"source": "/' not in config
        assert read_config(name).metrics["test"]["accuracy"] > 0.7


@pytest.mark.parametrize("name", NAMES)
def test_networks_load_by_name_and_answer_as_before(name: str, golden: Path) -> None:
    """Logits of seeded noise on made images, which `tests/golden/zoo.py` wrote once."""
    ensemble = rse.load(name)
    stored = safetensors.torch.load_file(golden / "zoo" / f"{name}.safetensors")
    shape = read_config(name).input_shape
    assert shape is not None
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, stored["images"])
    with torch.no_grad(), rse.noise_draw(3, sampling="shared"):
        logits = ensemble.draw_logits(images)
    torch.testing.assert_close(logits, stored["logits"], rtol=1e-4, atol=1e-4)


def test_clean_accuracy_is_the_one_on_the_card() -> None:
    """On 450 images that come along; fresh noise, and 4 standard errors of the difference."""
    data, record = rse.load_data("digits", "test"), read_config("digits-rse").metrics["test"]
    answers = rse.load("digits-rse").predict(data.inputs(slice(None)), seed=11, sampling="per_image").label
    accuracy = (answers == data.labels).double().mean().item()
    error = (2 * record["accuracy"] * (1 - record["accuracy"]) / len(data)) ** 0.5
    assert record["images"] == len(data)
    assert abs(accuracy - record["accuracy"]) <= 4 * error
    assert accuracy > 0.95


def test_unknown_names_list_the_zoo(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="digits-rse"):
        rse.load("digits-rsf")
    mine = tmp_path / "digits-rse"
    mine.mkdir()
    assert locate(mine) == mine
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        rse.load(mine)


def test_predict_by_name(tmp_path: Path) -> None:
    from PIL import Image

    image = rse.load_data("digits", "test").images[0, 0]
    Image.fromarray(image.numpy()).save(tmp_path / "digit.png")
    command = [
        sys.executable,
        "-m",
        "selfensemble",
        "predict",
        "--model",
        "digits-rse",
        "digit.png",
        "--json",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    label = int(rse.load_data("digits", "test").labels[0])
    assert f'"label": "{label}"' in run.stdout


def test_packing_halves_weights_and_measures_what_is_written(tmp_path: Path) -> None:
    data = rse.load_data("digits", "test")
    run, out = tmp_path / "run", tmp_path / "packed"
    config = read_config("digits-rse")
    assert config.recipe is not None
    recipe = {**config.recipe, "data": {**config.recipe["data"], "source": "/home/somebody/digits"}}
    rse.save(
        rse.load("digits-rse"), run, architecture=config.architecture, classes=config.classes,
        input_shape=config.input_shape, recipe=recipe,
    )  # fmt: skip
    pack(run, out, data)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (run, out)]
    assert sizes[1] < 0.55 * sizes[0]
    packed = read_config(out)
    assert packed.recipe is not None
    assert packed.recipe["data"]["source"] == "digits"
    assert packed.metrics["test"]["accuracy"] > 0.95
    for one, other in zip(rse.load(run).parameters(), rse.load(out).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-8, atol=0)
    before = (out / "README.md").read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        pack(run, out, data)
    assert (out / "README.md").read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [out, run]
    pack(run, tmp_path / "given", data, licence="mit")
    assert 'license: "mit"' in (tmp_path / "given" / "README.md").read_text()
    assert b"license" not in before


def test_packing_that_fails_leaves_nothing_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble, config = rse.load("digits-rse"), read_config("digits-rse")
    images = rse.load_data("digits", "test").inputs(slice(None))
    ensemble.stopping = stopping = rse.calibrate(ensemble, images, epsilon=0.1)

    def fails(*args: object, **kwargs: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("selfensemble.report.packing.count_correct", fails)
    with pytest.raises(KeyboardInterrupt):
        pack(None, tmp_path / "out", rse.load_data("digits", "test"), ensemble=ensemble, config=config)
    assert list(tmp_path.iterdir()) == []
    assert ensemble.stopping is stopping


def test_cards_say_of_weights_and_inputs_what_is_known(tmp_path: Path) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv1d(1, 2, 3), torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten(), torch.nn.Linear(2, 2)
    )
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.1, 0.1), bounds=(-1.0, 1.0)).eval()
    ensemble.save_pretrained(tmp_path / "mine", input_shape=(1, 800), metrics={"test": {"accuracy": 0.9}})
    card = (tmp_path / "mine" / "README.md").read_text()
    for text in ("audio-classification", "values in [-1, 1]", "on the input", "Test accuracy 90.0 %."):
        assert text in card
    for text in ("license", "image-classification", "pixels", "on the image"):
        assert text not in card
    card = write_card(tmp_path / "mine", ensemble=ensemble, licence="cc-by-4.0").read_text()
    assert licence_of(tmp_path / "mine" / "README.md") == "cc-by-4.0"


def test_cards_take_evaluations_of_the_same_network_only(tmp_path: Path) -> None:
    from selfensemble.evaluation import Evaluation, load_protocol
    from selfensemble.evaluation.certified import Certification, Settings

    mine = tmp_path / "mine"
    shutil.copytree(zoo()["digits-rse"], mine)
    attacks = [{"attack": "fgsm", "title": "FGSM", "eps": 0.1}]
    protocol = load_protocol("paper", {"images": 20, "attacks": attacks, "judge": {"seeds": 3, "queries": 3}})
    data = rse.load_data("digits", "test")
    results = Evaluation(rse.load(mine), data, protocol, tmp_path / "run", name="mine").run()
    card = write_card(mine, [results]).read_text()
    entry = results.attacks[0]
    assert f"| FGSM | linf 0.1 | {100 * entry.accuracy:.1f} % ({100 * entry.low:.1f} to" in card
    assert "The network carries no certificate" in card
    settings = Settings(images=20, n0=10, n=200, method="vote")
    certified = Certification(rse.load(mine), data, settings, tmp_path / "certified", name="mine").run()
    card = write_card(mine, [results], certificates=[certified]).read_text()
    assert "selfensemble certify mine --method vote --max-draws 200 --n 20" in card
    assert f"| 0.00 | {100 * certified.curve[0].accuracy:.1f} %" in card
    assert "carries no certificate" not in card
    other = rse.load(mine)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    config = read_config(mine)
    rse.save(other, tmp_path / "other", architecture=config.architecture)
    with pytest.raises(ValueError, match="another network"):
        write_card(tmp_path / "other", [results])
    with pytest.raises(ValueError, match="another network"):
        write_card(tmp_path / "other", certificates=[certified])
    assert not (tmp_path / "other" / "README.md").exists()
    bare = read_config(tmp_path / "other")
    assert "Not evaluated under attack" in model_card("bare", bare)
    assert "noise must stay on" in model_card("bare", bare)
    quiet = bare.model_copy(update={"noise": dict.fromkeys(bare.noise, 0.0)})
    assert "noise must stay on" not in model_card("quiet", quiet)
