"""Recipes: the shipped ones are valid, and mistakes are named."""

from pathlib import Path

import pytest
import yaml

from selfensemble.training.recipe import Recipe, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(str(again)) == recipe


def test_published_training() -> None:
    recipe = load_recipe("cifar10-vgg16-rse")
    train = recipe.train
    assert (train.lr, train.momentum, train.weight_decay, train.batch_size) == (0.1, 0.9, 5e-4, 128)
    assert (train.schedule, train.stages, train.epochs) == ("stages", (80, 60, 40, 20), 200)
    assert (recipe.noise.init_std, recipe.noise.inner_std) == (0.2, 0.1)
    assert (recipe.data.crop_padding, recipe.data.flip) == (4, True)


def test_a_plain_twin_differs_in_noise_only() -> None:
    for name in shipped_recipes():
        if name.endswith("-rse"):
            rse, plain = load_recipe(name), load_recipe(name.removesuffix("rse") + "plain")
            assert (plain.noise.init_std, plain.noise.inner_std) == (0, 0)
            same = {"name": "", "description": "", "noise": rse.noise}
            assert rse.model_copy(update=same) == plain.model_copy(update=same)


def test_overrides() -> None:
    recipe = load_recipe(
        "digits-rse", ["train.epochs=3", "model.width=0.5", "data.size=null", "train.precision=bf16"]
    )
    assert recipe.train.epochs == 3
    assert recipe.model.width == 0.5
    assert recipe.data.size is None
    assert recipe.train.precision == "bf16"
    assert load_recipe("cifar10-vgg16-rse", ["train.precision=no"]).train.precision == "no"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key train.epoch; known here: epochs"),
        ("trian.epochs=3", "unknown key trian; known here: name"),
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=many", "train.epochs"),
        ("train.lr=nan", "train.lr"),
        ("noise.init_std=-1", "noise.init_std"),
        ("noise.inner_std=.inf", "noise.inner_std"),
        ("model.name=vgg12", "unknown model.name"),
        ("model.activation=gelu", "model.activation"),
        ("noise.learn=pixel", "noise.learn"),
        ("noise.hold=-1", "noise.hold"),
        ("resize_pad={smallest: 8}", "resize_pad.largest"),
        ("defense={name: trades, bta: 1}", "unknown key defense.bta; known here: norm"),
        ("data.validation=1", "data.validation"),
        ("train.epochs", "section.key=value"),
        ("train.epochs=[", "YAML"),
        ("train.epochs.more=1", "not a section"),
        ("train=5", "train"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        load_recipe("digits-rse", [override])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="digits-rse"):
        load_recipe("nothing")
    with pytest.raises(FileNotFoundError):
        load_recipe(str(tmp_path / "nothing.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(str(broken))
    broken.write_text("just words")
    with pytest.raises(ValueError, match="keys and values"):
        load_recipe(str(broken))


def test_defaults_are_a_recipe() -> None:
    assert Recipe(name="x").data.source == "digits"
