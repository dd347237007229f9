"""The board: every defense of its list has a recipe that trains, and its tables say what was measured."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import selfensemble as rse
from selfensemble.cli import experiments as commands  # noqa: F401  (adds its commands to the app)
from selfensemble.cli.base import app
from selfensemble.experiments import EXPERIMENTS
from selfensemble.experiments.board import Board, all_right, claims, kept
from selfensemble.experiments.networks import family, network, recipe_of
from selfensemble.experiments.records import read_record
from selfensemble.experiments.scales import load_scale
from selfensemble.noise.injection import is_convolution
from selfensemble.report.intervals import bounded
from selfensemble.training.defenses.adversarial import Attacking
from selfensemble.training.recipe import Recipe
from selfensemble.training.trainer import Trainer

NOT_RANDOM = {"plain", "adversarial-linf"}


def board_recipe(name: str, scale: str, source: str | None = None) -> Recipe:
    return recipe_of(network(name), family("vgg16"), load_scale(scale), source)[1]


def test_all_have_the_same_epochs_width_and_gradients() -> None:
    recipes = {name: board_recipe(name, "half") for name in claims()}
    assert len(recipes.keys() - NOT_RANDOM) >= 8
    assert {(each.train.epochs, each.model.width, each.model.name) for each in recipes.values()} == {
        (20, 0.5, "vgg16")
    }
    attacks = {
        name: (each.defense.steps, each.defense.eot)
        for name, each in recipes.items()
        if isinstance(each.defense, Attacking)
    }
    assert set(attacks.values()) == {(1, 1)}
    assert {"pni", "adv-bnn", "learn2perturb", "rpf", "adversarial-linf", "smoothadv-equal"} == attacks.keys()


@pytest.mark.parametrize("name", list(claims()))
def test_a_recipe_trains_two_steps_and_loads(name: str, tmp_path: Path) -> None:
    recipe = board_recipe(name, "quick", "digits")
    data = recipe.data.model_copy(update={"images": 150})
    train = recipe.train.model_copy(update={"epochs": 1})
    recipe = recipe.model_copy(update={"data": data, "train": train})
    trainer = Trainer(recipe, tmp_path)
    before = {key: parameter.detach().clone() for key, parameter in trainer.network.named_parameters()}
    results = trainer.run()
    assert trainer.steps == 2
    assert np.isfinite(results["history"][-1]["train/loss"])
    moved = {key for key, each in trainer.network.named_parameters() if not torch.equal(each, before[key])}
    levels = {"alpha", "log_std", "theta", "factor"}
    learned = {key for key in before if key.rpartition(".")[2] in levels}
    assert learned <= moved
    assert len(moved) > len(before) // 2
    loaded = rse.load(tmp_path)
    assert loaded.is_random == (name not in NOT_RANDOM)
    images = rse.load_data("digits", "test").inputs(slice(4))
    torch.testing.assert_close(
        loaded.predict_proba(images, seed=3), trainer.network.predict_proba(images, seed=3)
    )


def test_the_authors_place_their_noise_behind_the_first_convolution(tmp_path: Path) -> None:
    recipe = board_recipe("rse-authors", "quick", "digits")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    Trainer(recipe, tmp_path).run()
    model = rse.load(tmp_path).model
    convolutions = [fqn for fqn, module in model.named_modules() if is_convolution(module)]
    levels = {fqn: layer.std for fqn, layer in rse.noise_layers(model).items()}
    assert levels == dict(zip(convolutions[1:], (0.2, 0.1, 0.1), strict=True))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks of the board, by the command, on digits."""
    here = tmp_path_factory.mktemp("board")
    arguments = ["reproduce", "board", "--scale", "quick", "--data", "digits", "--device", "cpu"]
    arguments += ["--models", str(here / "models"), "--runs", str(here / "runs"), "--out", str(here / "out")]
    assert not app([*arguments, "--only", "rpf", "--only", "plain"], standalone_mode=False)
    return here / "out" / "board"


def test_the_page_has_claimed_honest_and_persistent_figures(page: Path) -> None:
    text = (page / "index.md").read_text()
    for words in ("84 / 61", "one draw, L-inf 8/255", "worst case, L2 0.5", "10 queries", "Dong & Xu"):
        assert words in text
    record = read_record(page, "rpf")
    assert record is not None
    entries = record.facts.entries
    norms = {(entry["norm"], entry["eps"]) for entry in entries.values() if entry["eps"] is not None}
    assert norms == {("l2", 0.5), ("linf", 8 / 255)}
    (single,) = [entry for entry in entries.values() if entry["title"] == "PGD, one draw a step"]
    assert single["gradients"] == 5
    worst = next(key for key, entry in entries.items() if entry["attack"] == "worst case")
    one, ten = kept(record, worst, 1).value, kept(record, worst, 10).value
    assert ten <= one
    wrong = record.numbers(f"{worst}.wrong")
    np.testing.assert_allclose(one, 1 - wrong.mean() / entries[worst]["queries"])


def test_kept_images_are_counted_without_bias() -> None:
    """Against all ways to take k of Q answers."""
    for asked, right in ((6, 4), (6, 6), (5, 0), (7, 2)):
        answers = [True] * right + [False] * (asked - right)
        for count in range(1, asked + 1):
            ways = list(itertools.combinations(answers, count))
            expected = sum(map(all, ways)) / len(ways)
            found: Any = all_right(np.array([float(right)]), asked, count)[0]
            assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="count must be 1 to 5"):
        all_right(np.array([1.0]), 5, 6)


def test_intervals_of_kept_images_hold() -> None:
    """Of shares that differ from image to image, at the ends as well; 95 %, less three standard errors."""
    law = np.random.default_rng(0)
    laws: dict[float, Callable[[int], Any]] = {
        0.3: lambda n: law.beta(0.3, 0.7, n),
        0.01: lambda n: (law.random(n) < 0.01).astype(float),
    }
    for truth, share in laws.items():
        found = [bounded(share(100)) for _ in range(1000)]
        held = np.mean([each.low <= truth <= each.high for each in found])
        assert held > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 1000)
    nothing, all_ = bounded(np.zeros(400)), bounded(np.ones(400))
    assert nothing.low == 0 < nothing.high < 0.01
    assert all_.high == 1 > all_.low > 0.99


def test_every_name_of_the_board_is_a_network_of_the_file() -> None:
    assert EXPERIMENTS["board"].names == Board.names == tuple(claims())
    for name, claim in claims().items():
        assert network(name).title
        assert (claim.clean is None) == (claim.attacked is None)
        assert (claim.clean is None) or claim.attack
