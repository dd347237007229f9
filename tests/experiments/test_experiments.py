"""Experiments: tables come from stored results alone, work is neither repeated nor mixed up."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import selfensemble as rse
from selfensemble.artefacts import storage
from selfensemble.artefacts.storage import read_config
from selfensemble.certainty.certification import METHODS
from selfensemble.cli import experiments as commands  # noqa: F401  (adds its commands to the app)
from selfensemble.cli.base import app
from selfensemble.experiments import EXPERIMENTS, Reproduction, networks, render_all, reproduce
from selfensemble.experiments.certainty import auroc, calibration_error
from selfensemble.experiments.certificates import between, empirical
from selfensemble.experiments.certified_tables import reach
from selfensemble.experiments.curvature import local_lipschitz, second_order_term
from selfensemble.experiments.draws import COUNTS, right_groups
from selfensemble.experiments.judged import accuracy, by_strength, rms
from selfensemble.experiments.networks import family, recipe_of
from selfensemble.experiments.published import published_curve
from selfensemble.experiments.records import Record, read_record
from selfensemble.experiments.scales import Scale, load_scale
from selfensemble.experiments.targeted import targets_of
from selfensemble.report.figures import Line, Panel, draw
from selfensemble.report.intervals import mean, share
from selfensemble.report.packing import pack
from selfensemble.report.page import Table
from selfensemble.training.checkpoints import CHECKPOINT, RESULTS


class Done:
    """An experiment that was run by the command: its folders, and what the command printed."""

    def __init__(self, root: Path) -> None:
        self.models, self.runs, self.out = root / "models", root / "runs", root / "out"

    def reproduction(self, **changes: Any) -> Reproduction:
        settings = {"models": self.models, "runs": self.runs, "out": self.out} | changes
        return Reproduction("quick", "digits", **settings)

    def record(self, experiment: str, network: str) -> Record:
        found = read_record(self.out / experiment, network)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Three networks of `headline`, by the command."""
    here = Done(tmp_path_factory.mktemp("experiments"))
    arguments = ["reproduce", "headline", "--quick", "--data", "digits", "--models", str(here.models)]
    arguments += ["--runs", str(here.runs), "--out", str(here.out), "--device", "cpu"]
    arguments += ["--only", "plain", "--only", "rescaled", "--only", "rse"]
    assert not app(arguments, standalone_mode=False)
    return here


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_headline_stores_pages_and_images(done: Done) -> None:
    folder = done.out / "headline"
    names = {
        "index.md",
        "accuracy.svg",
        *(f"{name}.{kind}" for name in ("plain", "rescaled", "rse") for kind in ("csv", "json")),
    }
    assert set(contents(folder)) == names
    page = (folder / "index.md").read_text()
    for text in (
        "`selfensemble reproduce headline --scale quick --data digits`",
        "cifar10-vgg16-rse",
        "torch",
        "seed",
        "digits",
    ):
        assert text in page
    assert str(done.out.parent) not in page + (folder / "rse.json").read_text()
    for name in ("plain", "rse"):
        record = done.record("headline", name)
        keys = by_strength(record)
        assert list(keys) == [0, 0.01, 0.03, 0.1, 0.4]
        assert all(len(values) == 24 for values in record.columns.values())
        assert f"{100 * accuracy(record, keys[0.4]).value:.1f} (" in page
        assert rms(record, keys[0.4]) > rms(record, keys[0.01]) > 0
    assert (folder / "accuracy.svg").read_bytes().startswith(b"<?xml")


def test_rescaled_logits_change_margins_and_no_answer(done: Done) -> None:
    plain, rescaled = done.record("headline", "plain"), done.record("headline", "rescaled")
    assert plain.columns["clean.right"] == rescaled.columns["clean.right"]
    key = by_strength(plain)[0.4]
    assert rms(rescaled, key) < rms(plain, key)
    assert accuracy(rescaled, key).value >= accuracy(plain, key).value


def test_the_authors_curve_against_itself_is_equal_at_every_distortion(done: Done) -> None:
    """A record with the authors' accuracies and distortions, then one that meets them at half the c."""
    curve = published_curve("vgg16", "rse")
    assert curve is not None
    record = done.record("headline", "rse")
    images = 4000
    for factor in (1, 2):
        entries: dict[str, Any] = {"clean": {"attack": "none"}}
        columns = {"clean.right": ["1" if i < curve.accuracy[0] * images else "0" for i in range(images)]}
        for place in range(1, 7):
            key = f"c{place}"
            entries[key] = {"attack": "cw-paper", "c": curve.c[place] / factor}
            right = round(curve.accuracy[place] * images)
            columns[f"{key}.right"] = ["1"] * right + ["0"] * (images - right)
            columns[f"{key}.l2"] = [str(curve.rms_l2[place])] * images
        model = record.facts.recipe | {"model": record.facts.recipe["model"] | {"name": "vgg16"}}
        facts = record.facts.model_copy(update={"entries": entries, "published": "rse", "recipe": model})
        (table,) = [
            part
            for part in EXPERIMENTS["headline"]._authors([Record(facts, columns)])  # type: ignore[attr-defined]
            if part.title == "At the authors' distortion"
        ]
        assert len(table.rows) == (8 if factor == 1 else 7)  # c up to ours, and the steepness
        for row in table.rows[:-1]:
            authors, ours = (float(figure) for figure in row[1].split(", "))
            assert abs(authors - ours) < 0.11, row
        assert table.rows[-1] == ["steepness", "1.00" if factor == 1 else "\N{EN DASH}"]


def test_levels_measure_the_second_half_of_the_test_set(done: Done) -> None:
    (page,) = done.reproduction(only=("init0.2-inner0.1-features",)).run(["levels"]).values()
    record = done.record("levels", "init0.2-inner0.1-features")
    test = rse.load_data("digits", "test").labels
    assert record.numbers("label").tolist() == test[len(test) // 2 :][:24].tolist()
    assert record.facts.recipe["noise"]["first"] == "features"
    assert "the first 24 of the second half of the test set" in page.markdown()


def test_levels_that_leave_the_authors_shares_are_no_distance_from_their_curve(done: Done) -> None:
    """With three quarters of the authors' accuracy at every c, and at their distortion."""
    curve = published_curve("vgg16", "rse")
    assert curve is not None
    images, columns = 4000, dict[str, list[str]]()
    entries: dict[str, dict[str, Any]] = {"clean": {"attack": "none"}}
    for place in range(7):
        key = f"c{place}" if place else "clean"
        if place:
            entries[key] = {"attack": "cw-paper", "c": curve.c[place]}
            columns[f"{key}.l2"] = [str(curve.rms_l2[place])] * images
        right = round(0.75 * curve.accuracy[place] * images)
        columns[f"{key}.right"] = ["1"] * right + ["0"] * (images - right)
    facts = done.record("headline", "rse").facts.model_copy(update={"entries": entries, "title": "like them"})
    page = EXPERIMENTS["levels"].page([Record(facts, columns)])
    tables = {part.title: part for part in page.parts if isinstance(part, Table)}
    (row,) = tables["Distance from the authors' curve"].rows
    assert row[0] == "like them"
    assert float(row[1]) <= 0.1
    assert float(row[2]) <= 0.1
    assert row[3] == "1.00"
    for title in ("Share kept against c", "Share kept at the authors' distortion"):
        for _, theirs, ours in tables[title].rows:
            assert abs(float(theirs) - float(ours)) < 0.11


def test_pages_come_from_stored_results_alone(done: Done, tmp_path: Path) -> None:
    """Deleted and rendered again, without models and runs: the same bytes."""
    before = contents(done.out)
    shutil.copytree(done.out, tmp_path / "out")
    for name in ("index.md", "accuracy.svg"):
        (tmp_path / "out" / "headline" / name).unlink()
    assert not app(["reproduce", "all", "--render", "--out", str(tmp_path / "out")], standalone_mode=False)
    assert contents(tmp_path / "out") == before
    with pytest.raises(FileNotFoundError, match="selfensemble reproduce draws"):
        render_all(["draws"], tmp_path / "out")


def test_each_scale_has_a_folder_of_its_own(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a clone has results of another scale as well, in docs/results."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done.out, tmp_path / "runs" / "results" / "quick")
    shutil.copytree(done.out, tmp_path / "docs" / "results")
    assert Reproduction("wide").folder == Path("runs/results/wide")
    assert not app(["reproduce", "headline", "--quick", "--render"], standalone_mode=False)
    with pytest.raises(FileNotFoundError, match=r"runs/results/half"):
        app(["reproduce", "headline", "--render"], standalone_mode=False)


def test_started_again_it_repeats_nothing(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(done.out)
    said: list[str] = []
    pages = done.reproduction(only=("plain",), progress=lambda text, part: said.append(text)).run(
        ["headline"]
    )
    assert contents(done.out) == before
    assert not any("epoch" in text or "images" in text for text in said)
    assert "plain: preparing" in said[0]
    assert json.loads(json.dumps(pages["headline"].values()))["tables"][0]["head"][0] == "c"


def test_stopped_anywhere_it_ends_the_same(done: Done, tmp_path: Path) -> None:
    """Stopped while it trains and while it measures: the results of an undisturbed run."""

    def stop_at(word: str, count: int) -> Any:
        seen = 0

        def progress(text: str, part: float) -> None:
            nonlocal seen
            seen += word in text
            if seen == count:
                raise KeyboardInterrupt

        return progress

    folders = {"models": tmp_path / "models", "runs": tmp_path / "runs", "out": tmp_path / "out"}
    for word, count in (("epoch 2", 3), ("C&W", 2)):
        with pytest.raises(KeyboardInterrupt):
            done.reproduction(only=("rse",), progress=stop_at(word, count), **folders).run(["headline"])
        assert not (tmp_path / "out" / "headline" / "index.md").exists()
    done.reproduction(only=("rse",), **folders).run(["headline"])
    found = read_record(tmp_path / "out" / "headline", "rse")
    assert found is not None
    assert found.columns == done.record("headline", "rse").columns


def test_mistakes_are_named(done: Done, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no experiment 'nothing': choose among headline, .*, all"):
        done.reproduction().run(["nothing"])
    with pytest.raises(ValueError, match="no scale 'huge': choose one of quick, half, quarter, wide, full"):
        Reproduction("huge").run(["headline"])
    with pytest.raises(ValueError, match=r"no network 'nobody' here: choose among .*plain"):
        done.reproduction(only=("nobody",)).run(["headline"])
    with pytest.raises(FileNotFoundError, match="How to get it"):
        done.reproduction(stl10=str(tmp_path / "nowhere"), only=("plain",)).run(["stl10"])


def test_a_folder_of_another_recipe_is_refused(done: Done) -> None:
    before = contents(done.models)
    other = done.models / "cifar10-vgg16-trades"
    shutil.copytree(done.models / "cifar10-vgg16-rse", other)
    with pytest.raises(ValueError, match=r"different: .*defense\.name.*noise\.init_std"):
        done.reproduction(only=("trades",)).run(["honest"])
    shutil.rmtree(other)
    assert contents(done.models) == before


@pytest.mark.parametrize("name", ["quick", "half", "wide", "full"])
def test_networks_that_share_a_folder_share_a_recipe(name: str) -> None:
    scale, recipes = load_scale(name), dict[str, Any]()
    for experiment in EXPERIMENTS.values():
        for each in experiment.networks(scale):
            folder, recipe = recipe_of(each, experiment.family, scale, None)
            assert recipes.setdefault(folder, recipe) == recipe, (experiment.name, each.name)
    assert len(recipes) > 20


def test_a_network_of_the_zoo_serves_if_its_recipe_is_the_same(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, scale = "cifar10-vgg16-rse", load_scale("quick")
    packed = tmp_path / "zoo" / name
    pack(done.models / name, packed, rse.load_data("digits", "test"))
    monkeypatch.setattr(networks, "zoo", lambda: {name: packed})
    said: list[str] = []

    def find(scale: Scale) -> networks.Trained:
        entry, kin = networks.network("rse"), family("vgg16")
        return networks.trained(
            entry, kin, scale, "digits", tmp_path, lambda step, steps, text: said.append(text)
        )

    found = find(scale)
    assert not said
    assert not (tmp_path / name).exists()
    for one, other in zip(
        found.ensemble.parameters(), rse.load(done.models / name).parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2**-8, atol=0)
    trained = json.loads((done.models / name / "results.json").read_text())
    assert found.training["training_seconds"] == trained["training_seconds"]
    assert found.training["metrics"] == read_config(packed).metrics
    find(scale.model_copy(update={"digits": scale.digits | {"train.epochs": 1}}))
    assert said[0] == "training"


def test_a_network_that_begins_with_another_has_that_trained_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beginning(wanted: networks.Network, *rest: Any) -> tuple[str, Any]:
        name, recipe = recipe_of(wanted, *rest)  # on digits first weights are left out
        first = {"weights": "cifar10-vgg16-rse"} if wanted.after else {}
        return name, recipe.model_copy(update={"model": recipe.model.model_copy(update=first)})

    monkeypatch.setattr(networks, "recipe_of", beginning)
    scale = load_scale("quick")
    scale = scale.model_copy(update={"digits": scale.digits | {"train.epochs": 1, "train.lr": 1e-9}})
    entry = networks.network("rse", after="rse", folder="second")
    said: list[str] = []

    def find() -> networks.Trained:
        return networks.trained(
            entry, family("vgg16"), scale, "digits", tmp_path, lambda step, steps, text: said.append(text)
        )

    second = find()
    assert said.count("training") == 2
    assert {each.name for each in tmp_path.iterdir()} == {"cifar10-vgg16-rse", "second"}
    first = rse.load(tmp_path / "cifar10-vgg16-rse")
    assert second.recipe.model.weights == str(tmp_path / "cifar10-vgg16-rse")
    for one, other in zip(second.ensemble.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)  # it has learned next to nothing
    said.clear()
    shutil.rmtree(tmp_path / "cifar10-vgg16-rse")
    find()
    assert not said  # it is there: what it began with is not needed


def test_a_network_is_whole_when_its_evaluation_is(tmp_path: Path) -> None:
    """Its weights are written before it is evaluated; what the zoo holds has no checkpoint."""
    for name in (storage.CONFIG, storage.WEIGHTS):
        assert not networks._is_whole(tmp_path)
        (tmp_path / name).touch()
    assert networks._is_whole(tmp_path)
    (tmp_path / CHECKPOINT).touch()
    assert not networks._is_whole(tmp_path)
    (tmp_path / RESULTS).touch()
    assert networks._is_whole(tmp_path)


def test_results_of_two_scales_are_not_mixed(done: Done) -> None:
    before = contents(done.out)
    path = done.out / "headline" / "plain.json"
    path.write_text(path.read_text().replace('"scale": "quick"', '"scale": "half"'))
    with pytest.raises(ValueError, match="results of the scale half; they are untouched"):
        done.reproduction(only=("rse",)).run(["headline"])
    path.write_bytes(before["headline/plain.json"])


def test_theory_and_draws_on_trained_networks(done: Done) -> None:
    pages = done.reproduction(only=("plain", "rse")).run(["theory", "draws"])
    assert set(pages) == {"theory", "draws"}
    for name in ("plain", "rse"):
        record = done.record("theory", name)
        gap = record.numbers("gap")
        assert (gap >= -1e-12).all()
        assert gap.max() > 0
        assert np.allclose(record.numbers("loss.1") - record.numbers("ensemble"), gap, atol=1e-4)
        assert (record.numbers("term") >= -1e-6).all()  # a sum of squares: the network is piecewise linear
    record = done.record("draws", "rse")
    groups = record.facts.entries["clean"]["groups"]
    assert groups == {str(n): 2 * (100 // n) for n in COUNTS}
    for n in COUNTS:
        assert (record.numbers(f"attacked.{n}") <= groups[str(n)]).all()
    again = contents(done.out / "theory")
    render_all(["theory"], done.out)
    assert contents(done.out / "theory") == again


@pytest.mark.parametrize("columns", [1, 2])
def test_no_legend_is_wider_than_its_figure(columns: int) -> None:
    lines = [
        Line(f"a network with a long name, number {look}", look, [0, 1], [0.2, 0.4]) for look in range(6)
    ]
    figure = draw([[Panel("title", "x", "y", lines)] * columns])
    (legend,) = figure.legends
    assert 0 < legend.get_window_extent().width <= figure.bbox.width


def test_attacks_beside_certificates_are_those_of_the_same_network() -> None:
    """The stored results have two networks named smoothadv, of half and of a quarter of the width."""
    stored = Path(__file__).parents[2] / "docs" / "results"
    for experiment, name, same in (
        ("certificates", "rse", True),
        ("certified-noise", "smoothadv", False),
    ):
        certified, attacked = (read_record(stored / each, name) for each in (experiment, "honest"))
        assert certified is not None
        assert attacked is not None
        lines = empirical([certified], [attacked])
        assert bool(lines) == same == (certified.facts.model == attacked.facts.model)
        tables = between(certified, [attacked])
        assert bool(tables) == same
        for radius, least, most, left, _ in (row for table in tables for row in table.rows if row[1]):
            reached = (reach(certified, "mean") >= float(radius)).mean()
            assert float(least.split()[0]) == pytest.approx(100 * reached, abs=0.05)
            assert float(left) == pytest.approx(float(most.split()[0]) - 100 * reached, abs=0.1)
            assert float(left) > 0


def test_certificates_by_both_methods(done: Done) -> None:
    """Those that are reached early are a part of those that all draws certify, but for the share of alpha."""
    (page,) = done.reproduction(only=("rse",)).run(["certificates"]).values()
    record = done.record("certificates", "rse")
    assert record.facts.entries["certificate"] == {
        "std": pytest.approx(0.2, abs=1e-6),
        "precision": "float32",
    }
    settings = load_scale("quick").certificates
    for method in ("vote", "mean"):
        radii = reach(record, method)
        assert radii.max() > 0.1
        answered = record.numbers(f"{method}.answer") >= 0
        assert (record.numbers(f"{method}.radius")[answered] > 0).all()
        draws = record.numbers(f"{method}.draws")
        assert ((settings.n0 < draws) & (draws <= settings.n0 + settings.n)).all()
        assert set(record.numbers(f"{method}.reached")) <= {0, 1}
        table = page.tables[0]
        (row,) = (row for row in table.rows if row[0] == f"{record.facts.title}, {method}")
        assert row[1].startswith(f"{100 * (radii >= 0).mean():.1f} ")
    (withstood,) = (table for table in page.tables if table.title.startswith("Attacks within"))
    assert [row[1] for row in withstood.rows][1] == "8"
    assert all(cell.startswith("0 (") for row in withstood.rows for cell in row[2:])
    again = contents(done.out / "certificates")
    render_all(["certificates"], done.out)
    assert contents(done.out / "certificates") == again


def test_certificates_that_look_for_radii_stop_and_are_kept_apart(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done.reproduction(only=("rse",)).run(["certificates"])
    quick = load_scale("quick")
    radii = (0.01, 0.1, 0.75)  # the last one takes 80,000 draws of which all agree: it is not looked for
    certificates = quick.certificates.model_copy(update={"radii": radii, "n": 1000, "attacked": 0})
    scale = quick.model_copy(update={"certificates": certificates})
    monkeypatch.setattr(reproduce, "load_scale", lambda name: scale)
    other = {"runs": tmp_path / "runs", "out": tmp_path / "out"}
    (page,) = done.reproduction(only=("rse",), **other).run(["certificates"]).values()
    record = read_record(tmp_path / "out" / "certificates", "rse")
    assert record is not None
    assert record.facts.settings["radii"] == list(radii)
    assert record.facts.entries["certificate"]["sought"] == [0.01, 0.1]
    (sure,) = (table for table in page.tables if table.title.startswith("Probability of the right"))
    right = record.numbers("vote.answer") == record.numbers("label")
    share = 100 * (right & (record.numbers("vote.estimate") >= 0.9)).mean()
    assert sure.rows[0][3] == f"{share:.1f}"
    for row, method in zip(page.tables[0].rows, METHODS, strict=False):
        drawn = record.numbers(f"{method}.all-draws")
        assert drawn.min() < 1000 / 2
        assert row[-1] == f"{drawn.mean():,.0f}"
        assert row[2].startswith(f"{100 * (reach(record, method) >= 0.1).mean():.1f} ")
        assert row[3:8] == [""] * 5
    # Before another network is trained or measured, not after.
    with pytest.raises(ValueError, match=r"results of rse .*different: attacked, n, radii\)"):
        done.reproduction(only=("ours",), runs=tmp_path / "runs").run(["certificates"])
    assert not (done.models / "cifar10-vgg16-rse-adversarial").exists()
    # Nor are a network's own results replaced, or those of an experiment that is measured before.
    before = contents(done.out / "certificates")
    with pytest.raises(ValueError, match=r"results of rse .*different: attacked, n, radii\)"):
        done.reproduction(only=("rse",), runs=tmp_path / "runs").run(["certificates"])
    measured = contents(done.out)
    with pytest.raises(ValueError, match=r"results of rse .*different: attacked, n, radii\)"):
        done.reproduction(only=("ours", "rse"), runs=tmp_path / "runs").run(["draws", "certificates"])
    assert not (done.models / "cifar10-vgg16-rse-adversarial").exists()
    assert contents(done.out / "certificates") == before
    assert contents(done.out) == measured


def test_ways_of_training_are_compared_at_the_same_noise(done: Done) -> None:
    names = ("init0.2-inner0", "init0.2-inner0.1", "consistency")
    (page,) = done.reproduction(only=names).run(["certified-noise"]).values()
    without, inner, consistency = (done.record("certified-noise", name) for name in names)
    for title, record in (("What inner noise does", inner), ("Training for", consistency)):
        (table,) = (table for table in page.tables if table.title.startswith(title))
        assert [row[0] for row in table.rows] == [f"{record.facts.title}, {method}" for method in METHODS]
        for row, method in zip(table.rows, METHODS, strict=True):
            ours, theirs = (reach(each, method) >= 0.1 for each in (record, without))
            assert row[2].startswith(f"{100 * (ours.mean() - theirs.mean()):+.1f} ")


def test_certainty_of_networks_with_and_without_noise(done: Done) -> None:
    pages = done.reproduction(only=("plain", "rse")).run(["certainty"])
    titles = [table.title for table in pages["certainty"].tables]
    assert "Decision of the infinite ensemble" in titles
    plain, noisy = done.record("certainty", "plain"), done.record("certainty", "rse")
    assert (plain.numbers("information") < 1e-9).all()
    assert (noisy.numbers("information") > 0).any()
    assert "robust.size" not in plain.columns
    assert (noisy.numbers("robust.size") >= noisy.numbers("set.size")).all()
    decided = noisy.numbers("decide.answer") >= 0
    assert (noisy.numbers("decide.draws")[decided] >= 10).all()
    assert noisy.numbers("noise.entropy").mean() > noisy.numbers("entropy").mean()


def test_calibration_error_and_auroc() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.2, 1, 20_000)
    right = generator.uniform(size=len(confidence)) < confidence
    assert calibration_error(confidence, right) < 0.02
    # Sure of itself by .1 too much everywhere.
    assert calibration_error(np.minimum(confidence + 0.1, 1), right) == pytest.approx(0.1, abs=0.02)
    ours, others = generator.integers(0, 6, 40).astype(float), generator.integers(2, 8, 30).astype(float)
    pairs = others[None, :] - ours[:, None]
    expected = (pairs > 0).mean() + 0.5 * (pairs == 0).mean()
    found = auroc(ours, others)
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


def test_targeted_wants_another_class(done: Done) -> None:
    labels = torch.arange(10).repeat(200)
    targets = targets_of(labels, 10, 0)
    assert (targets != labels).all()
    assert torch.equal(targets, targets_of(labels, 10, 0))
    assert torch.bincount((targets - labels) % 10, minlength=10)[1:].min() > 150
    done.reproduction(only=("plain",)).run(["targeted"])
    record = done.record("targeted", "plain")
    assert (record.numbers("target") != record.numbers("label")).all()
    assert set(record.columns["search.success"]) <= {"000", "111"}  # no noise: all seeds agree


@pytest.mark.parametrize("name", ["quick", "half", "wide", "full"])
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
def test_every_network_has_a_valid_recipe(name: str, experiment: Any) -> None:
    scale = load_scale(name)
    networks = experiment.networks(scale)
    assert len({network.name for network in networks}) == len(networks)
    for network in networks:
        _, recipe = recipe_of(network, experiment.family, scale, None)
        assert recipe.model.name == family(experiment.kin).model
        assert recipe.data.source == family(experiment.kin).source
        if name == "half":
            assert recipe.model.width == 0.5 or experiment.name in ("noise", "levels", "certified-noise")
        if name == "full":
            assert recipe.model.width == 1
            own = experiment.name in ("noise", "levels", "certified-noise", "board")
            assert own or network.name == "ours" or recipe.train.epochs == 200


@pytest.mark.parametrize(
    ("kin", "source", "weights"),
    [
        ("vgg16", "cifar10", "cifar10-vgg16-rse-adversarial-start"),
        ("vgg16", "digits", None),
        ("resnext29_2x64d", "cifar10", "cifar10-resnext29-rse-adversarial-start"),
        ("model_a", "stl10", "stl10-model-a-rse-adversarial-start"),
    ],
)
def test_first_weights_are_for_their_own_architecture_alone(
    kin: str, source: str, weights: str | None
) -> None:
    scale = load_scale("half")
    _, recipe = recipe_of(networks.network("ours"), family(kin), scale, source)
    assert recipe.model.weights == weights
    if weights is not None:
        first, begun = recipe_of(networks.network("ours-start"), family(kin), scale, source)
        assert first == weights
        assert begun.model.weights == weights.replace("-adversarial-start", "")
        assert begun.model.name == recipe.model.name


@pytest.mark.parametrize(
    ("defense", "at"),
    [
        ("none", 8.9),
        ("adversarial_retraining", 9.8),
        ("robust_opt_brelu", 47.9),
        ("distillation", 17.7),
        ("rse", 83.7),
    ],
)
def test_the_authors_curves(defense: str, at: float) -> None:
    curve = published_curve("vgg16", defense)
    assert curve is not None
    assert round(100 * curve.accuracy[curve.c.index(0.03)], 1) == pytest.approx(at, abs=0.051)
    assert len(curve.c) == len(curve.accuracy) == len(curve.rms_l2) == 17
    assert tuple(c for c in curve.c if c) == load_scale("full").strengths


def test_groups_of_draws() -> None:
    """Three draws are right by far, two wrong by little: so are pairs and the mean of all."""
    right, wrong = [0.9, 0.1], [0.4, 0.6]
    probabilities = torch.tensor([right, wrong, right, wrong, right])[:, None].expand(-1, 2, -1)
    labels = torch.tensor([0, 1])
    assert right_groups(probabilities, labels, 1).tolist() == [3, 2]
    assert right_groups(probabilities, labels, 2).tolist() == [2, 0]
    assert right_groups(probabilities, labels, 5).tolist() == [1, 0]


def test_intervals() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, size=400)
    assert mean(values) == pytest.approx(
        (values.mean(), *scipy.stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / 20))
    )
    assert share(np.array([True] * 8 + [False] * 2)) == pytest.approx((0.8, 0.4439, 0.9748), abs=1e-4)


def linear(seed: int = 0) -> tuple[rse.SelfEnsemble, torch.Tensor]:
    """A network whose logits are linear in the image, with its weights (K, pixels)."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(1, 3, 2, bias=False)
    ensemble = rse.SelfEnsemble(nn.Sequential(layer, nn.Flatten()), rse.NoiseConfig(0.2, 0.1)).eval()
    return ensemble.requires_grad_(False), layer.weight.detach().flatten(1)


def test_second_order_term_of_a_linear_network() -> None:
    ensemble, weight = linear()
    images, labels = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    estimates = second_order_term(ensemble, images, labels, [0.2], probes=1000, seed=0)
    softmax = (images.flatten(1) @ weight.T).softmax(dim=1)
    hessians = torch.diag_embed(softmax) - softmax[:, :, None] * softmax[:, None]
    traces = torch.stack([(weight.T @ hessian @ weight).trace() for hessian in hessians])
    assert torch.allclose(estimates.mean(dim=1), 0.2**2 / 2 * traces, rtol=0.1)


def test_local_lipschitz_of_a_linear_network() -> None:
    ensemble, weight = linear()
    images = torch.full((4, 1, 2, 2), 0.5)
    rse.remove_noise_(ensemble.model)
    quiet = rse.SelfEnsemble(ensemble.model, rse.NoiseConfig(0, 0)).eval()
    found = local_lipschitz(quiet, images, draws=1, radius=0.01, steps=20, seed=0)
    softmax = (images.flatten(1) @ weight.T).softmax(dim=1)[0]
    jacobian = (torch.diag(softmax) - softmax[:, None] * softmax[None]) @ weight
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert torch.allclose(found, (signs @ jacobian).norm(dim=1).max().expand(4), rtol=0.02)
