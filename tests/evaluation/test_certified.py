"""Certification runs: killed and gone on, and certificates that no attack breaks."""

import csv
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import selfensemble as rse
from selfensemble.attacks import pgd
from selfensemble.certainty.certification import certify
from selfensemble.evaluation.certified import Certification, Settings, read_certified
from selfensemble.report.card import _certificate
from selfensemble.report.html import write_report

from ..command import error, run
from ..forked import Forked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certified") / "model"
    sets = ["train.epochs=5", "model.width=0.5", "noise.init_std=0.3"]
    run("train", "digits-rse", "--out", out, *(p for item in sets for p in ("--set", item)))
    return out


def test_a_run_by_the_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("certify", model, "--n-images", 60, "--n", 400, "--shard", 20, "--out", out)
    results = json.loads(run(*arguments, "--json").stdout)
    assert results == json.loads((out / "certified.json").read_text())
    assert results["std"] == pytest.approx(0.3)
    rows = list(csv.DictReader((out / "certificates.csv").read_text().splitlines()))
    assert len(rows) == 60
    at = {point["radius"]: point["accuracy"] for point in results["curve"]}
    for radius in (0.0, 0.1, 0.3):
        good = [row for row in rows if row["answer"] == row["truth"] and float(row["radius"]) >= radius]
        assert at[radius] == pytest.approx(len(good) / 60)
    assert at[0.0] > 0.8
    assert 1 > at[0.1] >= at[0.3] > 0
    assert "certified accuracy" in run(*arguments).stdout
    assert "untouched" in error(*arguments, "--seed", 1)
    assert "Traceback" not in run("certify", model, "--method", "votes", expect=2).stderr


def test_wanted_radii_by_the_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = (
        "certify",
        model,
        "--n-images",
        40,
        "--n",
        2000,
        "--shard",
        20,
        "--method",
        "vote",
        "--out",
        out,
    )
    text = run(*arguments, "--radius", 0.3, "--radius", 0.1).stdout
    results = json.loads((out / "certified.json").read_text())
    rows = list(csv.DictReader((out / "certificates.csv").read_text().splitlines()))
    verdicts = [row["verdict"].split() for row in rows]
    assert {word for words in verdicts for word in words} >= {"reached"}
    for column, wanted in enumerate(results["wanted"]):
        assert wanted["radius"] == (0.1, 0.3)[column]
        for word in ("reached", "out-of-reach", "open"):
            share = sum(words[column] == word for words in verdicts) / len(rows)
            assert wanted[word.replace("-", "_")] == pytest.approx(share)
        assert f"within {wanted['radius']:g}: {wanted['reached']:.1%} certified" in text
    # The table has the wanted radii alone, for at others it would be a lower bound.
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == ["0.1", "0.3"]
    assert "at all, add --radius 0.01" in text
    for row, words in zip(rows, verdicts, strict=True):
        assert (words[1] == "reached") == (float(row["radius"]) >= 0.3)
    # Where bets ended the draws there are no bounds, and none are made up.
    early = [row for row in rows if int(row["draws"]) < 2000 + 100]
    assert early
    assert all(row["lower"] == row["upper"] == "" for row in early)
    assert all(0 <= float(row["estimate"]) <= 1 for row in rows)
    assert results["draws"] < 1000
    # What was written goes on, or is refused where it is of other radii.
    for radii in ((0.3, 0.1), (0.1, 0.3), (0.3, 0.1, 0.3)):
        assert run(*arguments, *(part for radius in radii for part in ("--radius", radius))).stdout == text
    assert "untouched" in error(*arguments, "--radius", 0.3)


def test_accuracy_at_the_wanted_radii_is_told_wherever_they_are(model: Path, tmp_path: Path) -> None:
    """Also between those of the curve; and that more may be certified elsewhere."""
    arguments = ("certify", model, "--n-images", 20, "--n", 1000, "--method", "vote", "--out", tmp_path)
    text = run(*arguments, "--radius", 0.123, "--radius", 0.01).stdout
    assert "certified at all" not in text
    found = read_certified(tmp_path)
    rows = list(csv.DictReader((tmp_path / "certificates.csv").read_text().splitlines()))
    for radius, point in zip((0.01, 0.123), found.known, strict=True):
        right = [row for row in rows if row["answer"] == row["truth"] and float(row["radius"]) >= radius]
        assert (point.radius, point.accuracy) == (radius, len(right) / 20)
        assert 0 < point.accuracy < 1 or radius == 0.01
    card = _certificate(found)
    assert "--radius 0.01 --radius 0.123" in card
    assert f"| 0.123 | {100 * found.known[1].accuracy:.1f} %" in card
    assert "| 0.10 |" not in card
    assert "at most" in card
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert f"at least {found.mean_radius:.4g}"[:14] in page
    assert "<li>0.123: " in page
    whole = found.model_copy(update={"wanted": ()})
    assert whole.known == found.curve


def test_files_and_table_say_the_same_of_any_radius(model: Path, tmp_path: Path) -> None:
    """A third is no number of six decimals; the command on the card makes the same figures."""
    out, again = tmp_path / "run", tmp_path / "again"
    given: tuple[str | float, ...] = (
        "--method",
        "vote",
        "--max-draws",
        400,
        "--alpha",
        0.05,
        "--seed",
        7,
        "--n0",
        50,
        "--shard",
        7,
    )
    given += ("--n", 20, "--radius", 0.123456789, "--radius", 0.01, "--grid")
    run("certify", model, "--out", out, *given)
    found = read_certified(out)
    rows = list(csv.DictReader((out / "certificates.csv").read_text().splitlines()))
    (near, far) = found.known
    for point in (near, far):
        right = [
            row for row in rows if row["answer"] == row["truth"] and float(row["radius"]) >= point.radius
        ]
        assert len(right) / 20 == point.accuracy
    (command,) = re.findall(r"`selfensemble (certify [^`]*)`", _certificate(found))
    name, *rest = command.split()[1:]
    assert name == model.name
    run("certify", model, *rest, "--out", again)
    assert (again / "certificates.csv").read_bytes() == (out / "certificates.csv").read_bytes()


def test_curves_of_earlier_versions_lack_wanted_radii(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("certify", model, "--out", out, "--n-images", 20, "--n", 400, "--radius", ".26")
    path = out / "certified.json"
    found = json.loads(path.read_text())
    known = read_certified(out).known
    assert [point.radius for point in known] == [0.26]
    found["curve"] = [point for point in found["curve"] if point["radius"] != 0.26]
    path.write_text(json.dumps(found))
    again = read_certified(out)
    assert again.known == again.curve
    assert again.known
    run("report", out, "--out", tmp_path / "page.html")


def test_what_is_refused_leaves_its_folder_free(model: Path, tmp_path: Path) -> None:
    few = ("certify", model, "--n", 2, "--out", tmp_path / "run")
    assert "1,048,576 draws at most" in error(*few, "--max-draws", 99_999_999)
    assert "no image can be certified within 50" in error(*few, "--max-draws", 200, "--radius", 50)
    assert not (tmp_path / "run").exists()
    run(*few, "--max-draws", 200)
    # As many images as there are, however many were asked for.
    run(*few, "--max-draws", 200)
    (shard,) = (tmp_path / "run" / "shards").iterdir()
    shard.write_text("{}")
    assert "holds no certificates, it is damaged: delete it" in error(*few, "--max-draws", 200)


def test_a_grid_that_cannot_be_is_refused_before_the_folder_is_taken(tmp_path: Path) -> None:
    network = rse.Normalized(rse.create_model("small-cnn", channels=1), (0.5,), (0.25,))
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.2, 0), draws=2).eval()
    data, few = rse.load_data("digits", "test"), Settings(images=2, n0=5, n=20)
    with pytest.raises(ValueError, match="grid"):
        Certification(ensemble, data, few.model_copy(update={"grid": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert Certification(ensemble, data, few, tmp_path / "run").run().images == 2


def test_a_run_of_a_version_without_estimates_goes_on(model: Path, tmp_path: Path) -> None:
    arguments = ("certify", model, "--n-images", 20, "--n", 200, "--shard", 10, "--out", tmp_path)
    run(*arguments)
    first, second = sorted(tmp_path.glob("shards/*.json"))
    older = json.loads(first.read_text())
    del older["estimate"]
    first.write_text(json.dumps(older))
    second.unlink()
    run(*arguments)
    rows = list(csv.DictReader((tmp_path / "certificates.csv").read_text().splitlines()))
    assert [bool(row["estimate"]) for row in rows] == [False] * 10 + [True] * 10


def test_killed_and_gone_on(model: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ("certify", model, "--n-images", 40, "--n", 1500, "--shard", 10, "--method", "vote")
    run(*arguments, "--out", whole)
    process = Forked(*arguments, "--out", broken)
    until = time.monotonic() + 60
    while not list(broken.glob("shards/*.json")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in broken.glob("shards/0*.json")}
    assert 1 <= len(done) < 4
    run(*arguments, "--out", broken)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert (broken / "certificates.csv").read_bytes() == (whole / "certificates.csv").read_bytes()
    assert read_certified(broken) == read_certified(whole)
    assert read_certified(whole).done is None


def test_a_run_that_is_stopped_has_a_table_of_what_is_done(model: Path, tmp_path: Path) -> None:
    settings = Settings(images=40, n=300, radius=(0.1,), shard=10)

    def stop(text: str, done: float) -> None:
        if text.startswith("images 20 to 29"):
            raise KeyboardInterrupt

    def certification(**more: Any) -> Certification:
        return Certification(rse.load(model), rse.load_data("digits", "test"), settings, tmp_path, **more)

    with pytest.raises(KeyboardInterrupt):
        certification(progress=stop).run()
    early = read_certified(tmp_path)
    assert (early.done, early.images, early.data.images) == (20, 20, 40)
    rows = list(csv.DictReader((tmp_path / "certificates.csv").read_text().splitlines()))
    assert len(rows) == 20
    right = sum(row["answer"] == row["truth"] for row in rows)
    assert early.curve[0].accuracy == pytest.approx(right / 20)
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "20 of 40, not ended" in page
    assert f"within 0.1 the answer of {100 * early.wanted[0].reached:.1f}" in page
    whole = certification().run()
    assert (whole.done, whole.images) == (None, 40)
    assert "not ended" not in write_report([tmp_path], tmp_path / "report.html").read_text()


def test_no_attack_within_the_radius_changes_the_answer(model: Path) -> None:
    """Steps of PGD on the ensemble, as far as the certificate reaches and no farther."""
    ensemble = rse.load(model)
    data = rse.load_data("digits", "test")
    inputs = data.inputs(slice(100))
    found = certify(ensemble, inputs, n=1_000, method="mean", seed=0)
    chosen = found.radius > 0.05
    assert chosen.sum() > 40
    x, label, radius = inputs[chosen], found.label[chosen], found.radius[chosen].float()
    attacked = pgd(ensemble, x, label, norm="l2", eps=1.0, steps=20, eot=4, seed=1)
    change = attacked - x
    length = change.flatten(1).norm(dim=1)
    scale = torch.minimum(radius / length.clamp_min(1e-9), torch.ones(()))
    moved = x + change * scale.view(-1, 1, 1, 1)
    assert ((moved - x).flatten(1).norm(dim=1) <= radius * (1 + 1e-5)).all()
    answer = ensemble.predict(moved, draws=2_000, seed=2)
    assert (answer.label == label).all()
    # The attack is one: as far as it likes it fools most.
    assert (ensemble.predict(attacked, draws=200, seed=3).label != label).double().mean() > 0.3


def test_votes_and_means_of_a_run(model: Path, tmp_path: Path) -> None:
    ensemble, data = rse.load(model), rse.load_data("digits", "test")
    progress: list[float] = []
    for method in ("vote", "mean"):
        run = Certification(
            rse.optimize(ensemble, data.inputs(slice(2)), "bf16"),
            data,
            Settings.model_validate({"images": 30, "n": 300, "method": method, "radius": 0.1, "shard": 16}),
            tmp_path / method,
            progress=lambda text, done: progress.append(done),
        )
        results = run.run()
        assert results == read_certified(tmp_path / method)
        assert results.precision == "bf16"
        assert 110 < results.draws < 400  # most stop early
        assert 0 < results.mean_radius < 1
    assert progress == sorted(progress[: len(progress) // 2]) + progress[len(progress) // 2 :]
    assert max(progress) == pytest.approx(1)
    with pytest.raises(FileNotFoundError, match="folder of a `selfensemble certify`"):
        read_certified(tmp_path)


def test_two_processes_share_the_slices(model: Path, tmp_path: Path) -> None:
    data, settings = rse.load_data("digits", "test"), Settings(images=30, n=200, shard=10)
    alone = Certification(rse.load(model), data, settings, tmp_path / "alone")
    alone.run()
    for rank in (1, 0):
        half = Certification(rse.load(model), data, settings, tmp_path / "both", rank=rank)
        half.world = 2 if rank else 1  # the second finishes what the first left
        if rank:
            half._write = lambda: None  # type: ignore[method-assign]
            with pytest.raises(FileNotFoundError):
                half.run()
            assert [file.name for file in (tmp_path / "both" / "shards").iterdir()] == ["0000010.json"]
        else:
            half.run()
    tables = [(tmp_path / name / "certificates.csv").read_bytes() for name in ("alone", "both")]
    assert tables[0] == tables[1]
    (tmp_path / "both" / "shards" / "0000010.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Certification(rse.load(model), data, settings, tmp_path / "both").run()


def test_noise_placed_by_hand_is_another_network(tmp_path: Path) -> None:
    data = rse.load_data("digits", "test")
    network = rse.create_model("small-cnn", channels=1, width=0.25).eval()
    for std in (0.25, 0.5):
        ensemble = rse.SelfEnsemble(torch.nn.Sequential(rse.GaussianNoise(std), network)).eval()
        if std == 0.25:
            Certification(ensemble, data, Settings(images=2, n=10), tmp_path / "run").run()
        else:
            with pytest.raises(ValueError, match=r"differs in .*digest"):
                Certification(ensemble, data, Settings(images=2, n=10), tmp_path / "run")


def test_calibrating_by_the_command(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.glob("*.*"):
        (copy / file.name).write_bytes(file.read_bytes())
    finished = run(
        "calibrate", copy, "--n-images", 400, "--epsilon", 0.2, "--most", 12, "--seed", 0, "--json",
        "--precision", "bf16",
    )  # fmt: skip
    rule = json.loads(finished.stdout)
    assert json.loads((copy / "config.json").read_text())["stopping"] == rule
    data = rse.load_data("digits", "test")
    images = data.inputs(slice(50))
    answer = rse.optimize(rse.load(copy), images, "bf16").predict(images, stop="calibrated")
    assert answer.draws.max() <= 12
    assert rule["precision"] == "bf16"
    with pytest.raises(ValueError, match="calibrated in bf16, and this ensemble computes in float32"):
        rse.load(copy).predict(images, stop="calibrated")
    assert "in a copy, made by selfensemble pack digits-rse FOLDER" in error("calibrate", "digits-rse")
    assert "asks for" in error("calibrate", copy, "--n-images", 5000)
    Image.fromarray(data.images[0, 0].numpy()).save(tmp_path / "digit.png")
    told = run("predict", "--model", copy, tmp_path / "digit.png", "--stop", "calibrated", "--json")
    assert 1 <= json.loads(told.stdout)["images"][0]["draws"] <= 12
    refused = error("predict", "--model", model, tmp_path / "digit.png", "--stop", "calibrated")
    assert "selfensemble calibrate" in refused
