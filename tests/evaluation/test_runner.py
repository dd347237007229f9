"""Evaluation runs: results that repeat, survive SIGKILL, and are never mixed up or half-written."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest
import torch

import selfensemble as rse
from selfensemble.artefacts.config import Architecture
from selfensemble.data.images import ImageData
from selfensemble.evaluation.balls import within
from selfensemble.evaluation.doctor import examination
from selfensemble.evaluation.protocol import Protocol, expand
from selfensemble.evaluation.results import CheckRecord, Results, read_results
from selfensemble.evaluation.runner import Evaluation
from selfensemble.evaluation.shards import plans_of

from ..command import run
from ..forked import Forked, run_ranks

PROTOCOL = """
name: short
images: 30
shard: 6
judge: {seeds: 3, queries: 10}
attacks:
  - {attack: cw-paper, c: [0.1, 2], steps: 5, lr: 0.02}
  - {attack: pgd, eps: [0.1, 0.3], steps: 4, eot: 2, early_stop: true}
  - {attack: apgd, surrogate: base, eps: [0.1, 0.3], steps: 4}
  - {attack: fmn, norm: linf, eps: [0.1, 0.3], steps: 5, eot: 2}
  - {attack: ddn, steps: 4}
"""


# For commands that are killed or share their work: less of it, in 27 files.
OF_PROCESSES = PROTOCOL.replace("images: 30", "images: 18").replace("queries: 10", "queries: 2")
OF_PROCESSES = OF_PROCESSES[: OF_PROCESSES.index("  - {attack: fmn")]


@pytest.fixture
def model() -> rse.SelfEnsemble:
    return _model()


def _model() -> rse.SelfEnsemble:
    torch.manual_seed(0)
    net = rse.create_model("small-cnn", classes=10, channels=1, width=0.25)
    return rse.SelfEnsemble(net, draws=2).eval()


@pytest.fixture
def data() -> ImageData:
    return rse.load_data("digits", "test")


@pytest.fixture
def protocol() -> Protocol:
    import yaml

    return Protocol.model_validate(yaml.safe_load(PROTOCOL))


def saved(model: rse.SelfEnsemble, folder: Path) -> Path:
    architecture = Architecture(name="small-cnn", classes=10, channels=1, width=0.25)
    rse.save(model, folder, architecture=architecture, input_shape=(1, 8, 8))
    (folder / "short.yaml").write_text(OF_PROCESSES)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved network, and an evaluation of it that nobody disturbed."""
    folder = saved(_model(), tmp_path_factory.mktemp("whole") / "model")
    run(*command(folder, folder.parent / "run"))
    return folder, folder.parent / "run"


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "evaluate", str(folder), "--protocol", str(folder / "short.yaml"), "--data", "digits",
        "--out", str(out), *more,
    ]  # fmt: skip


def test_results(model: rse.SelfEnsemble, data: ImageData, protocol: Protocol, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    evaluation = Evaluation(
        model,
        data,
        protocol,
        tmp_path / "run",
        name="m",
        progress=lambda text, done: seen.append((text, done)),
    )
    results = evaluation.run()
    assert read_results(tmp_path / "run") == results
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert "left" in seen[5][0]
    entries = (results.clean, *results.attacks, *results.worst_case)
    assert len(entries) == 1 + 2 + 2 + 2 + 3 + 1 + 2
    for entry in entries:
        assert entry.images == 30
        assert entry.low <= entry.accuracy <= entry.high
        assert len(entry.seeds) == 3
        assert entry.accuracy == entry.seeds[0]
        assert entry.all_seeds <= min(entry.seeds)
        if entry.eps is not None:
            assert entry.max_linf <= entry.eps + 1e-6
    assert set(results.clean.persistent) == {1, 10}
    assert results.clean.persistent[1] == pytest.approx(results.clean.wrong_per_query)
    assert results.clean.persistent[1] <= results.clean.persistent[10] + 1e-9
    pgd = next(entry for entry in results.attacks if entry.attack == "pgd")
    assert 0 < pgd.gradients <= 8
    worst = results.worst_case[0]
    assert worst.eps == 0.1
    assert "time" not in results.provenance
    with (tmp_path / "run" / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 * len(entries)
    for entry in entries:
        own = [row for row in rows if row["entry"] == entry.key]
        assert sum(row["correct"] == "1" for row in own) / 30 == pytest.approx(entry.accuracy)
    timings = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert len(timings["seconds"]) == 5 * (1 + 8 + 2)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_nearest_images_are_taken_on_to_the_radius(norm: str) -> None:
    """In their direction, within ball and bounds; those beyond are projected, those not found stay."""
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.9, 0.5]])
    found = torch.tensor([[0.6, 0.5], [0.8, 0.5], [0.5, 0.5], [0.95, 0.5]])
    images = within(found, x, norm, 0.2, farther=True)
    torch.testing.assert_close(images, torch.tensor([[0.7, 0.5], [0.7, 0.5], [0.5, 0.5], [1.0, 0.5]]))
    images = within(found, x, norm, 0.2, farther=False)
    torch.testing.assert_close(images, torch.tensor([[0.6, 0.5], [0.7, 0.5], [0.5, 0.5], [0.95, 0.5]]))


def test_a_worst_case_knows_all_balls_within_its_own() -> None:
    """Of 12 pixels an L-inf ball of .1 lies in the L2 ball of .35, and an L2 ball of .2 in the L-inf one."""
    attacks: list[dict[str, object]] = [
        {"attack": "pgd", "norm": "linf", "eps": [0.1, 0.2]},
        {"attack": "pgd", "norm": "l2", "eps": [0.2, 0.34, 0.35]},
        {"attack": "cw", "eps": [0.2]},
    ]
    protocol = Protocol.model_validate({"name": "balls", "attacks": attacks})
    plans = list(plans_of(expand(protocol), 12))
    named = {plan.key: f"{plan.norm} {plan.eps}" for plan in plans}
    worst = {named[plan.key]: {named[key] for key in plan.members} for plan in plans if plan.members}
    assert worst == {
        "linf 0.2": {"linf 0.1", "linf 0.2", "l2 0.2"},
        "l2 0.2": {"l2 0.2"},
        "l2 0.34": {"l2 0.2", "l2 0.34"},
        "l2 0.35": {"l2 0.2", "l2 0.34", "l2 0.35", "linf 0.1"},
    }
    assert [named[plan.key] for plan in plans if plan.key.endswith("cw")] == ["l2 None"]


def test_killed_and_started_again_it_repeats_nothing(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGKILL twice, at whatever it is doing: the same bytes as an undisturbed run."""
    folder, undisturbed = whole
    out = tmp_path / "killed"
    kept: dict[Path, int] = {}
    for shards in (3, 11):
        process = Forked(*command(folder, out))
        deadline = time.monotonic() + 120
        while len(list(out.glob("shards/*.safetensors"))) < shards and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = {path: path.stat().st_mtime_ns for path in out.glob("shards/*.safetensors")}
        assert shards <= len(found) < 27
        assert all(found[path] == when for path, when in kept.items())
        assert not (out / "results.json").exists()
        kept = found
    run(*command(folder, out))
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    for name in ("results.json", "images.csv", "gallery.safetensors", "run.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_interrupt_says_how_to_go_on(whole: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = whole[0], tmp_path / "run"
    process = Forked(*command(folder, out))
    deadline = time.monotonic() + 120
    while not list(out.glob("shards/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "continue with the same command" in errors


def test_two_processes_share_the_work(whole: tuple[Path, Path], tmp_path: Path) -> None:
    folder, undisturbed = whole
    ranks = run_ranks(*command(folder, tmp_path / "two", "--device", "cpu"))
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    one, two = read_results(undisturbed), read_results(tmp_path / "two")
    assert two.attacks == one.attacks
    assert two.worst_case == one.worst_case


def test_another_model_or_protocol_is_refused(
    model: rse.SelfEnsemble, data: ImageData, protocol: Protocol, tmp_path: Path
) -> None:
    few = protocol.model_copy(update={"images": 6, "attacks": protocol.attacks[:1]})
    Evaluation(model, data, few, tmp_path / "run").run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = rse.SelfEnsemble(rse.create_model("small-cnn", classes=10, channels=1, width=0.25)).eval()
    for change, message in (
        ({"ensemble": other}, "model.digest"),
        ({"protocol": few.model_copy(update={"seed": 1})}, "protocol.seed"),
        ({"protocol": few.model_copy(update={"images": 7})}, "protocol.images"),
        ({"max_batch": 7}, "max_batch"),
    ):
        arguments = {"ensemble": model, "data": data, "protocol": few} | change
        with pytest.raises(ValueError, match=f"differs in .*{message}.*untouched"):
            Evaluation(out=tmp_path / "run", **arguments)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in before} == before
    rse.remove_noise_(model.model)
    noisier = rse.SelfEnsemble(model.model, rse.NoiseConfig(0.5, 0.5), draws=2).eval()
    with pytest.raises(ValueError, match=r"model\.digest"):
        Evaluation(noisier, data, few, tmp_path / "run")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"attack": "pgd", "steps": 0}, "steps must be"),
        ({"attack": "pgd", "eps": 8}, "eps must be above 0 and at most 1"),
        ({"attack": "apgd", "rho": 3.0}, "rho"),
        ({"attack": "cw-paper", "c": -1.0}, "c must be"),
        ({"attack": "cw", "eps": 100}, "eps must be above 0 and at most 8"),
    ],
)
def test_impossible_settings_are_found_before_any_work(
    model: rse.SelfEnsemble, data: ImageData, tmp_path: Path, spec: dict[str, object], message: str
) -> None:
    protocol = Protocol.model_validate({"name": "p", "images": 5, "attacks": [{"attack": "fgsm"}, spec]})
    with pytest.raises(ValueError, match=f"attack 01.*{message}"):
        Evaluation(model, data, protocol, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_attacks_found_is_written_before_the_checks(
    model: rse.SelfEnsemble,
    data: ImageData,
    protocol: Protocol,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The doctor may be stopped or fail after hours of attacks, and is asked again."""
    few = protocol.model_copy(update={"images": 6, "attacks": protocol.attacks[1:2], "checks": True})
    seen: list[Results] = []

    def stopped(*arguments: object, **settings: object) -> list[CheckRecord]:
        seen.append(read_results(tmp_path / "run"))
        raise KeyboardInterrupt

    def fails(*arguments: object, **settings: object) -> list[CheckRecord]:
        raise TypeError("the device has\nno float64")

    def works(*arguments: object, **settings: object) -> list[CheckRecord]:
        seen.append(read_results(tmp_path / "run"))
        return [CheckRecord(name="logits", passed=True, figure="", advice="")]

    def evaluated() -> Results:
        return Evaluation(model, data, few, tmp_path / "run").run()

    monkeypatch.setattr(examination, "doctor", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluated()
    assert seen[0].checks is None
    assert len(seen[0].attacks) == 2
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {
        "run.json",
        "shards",
        "results.json",
        "images.csv",
        "gallery.safetensors",
        "timings.json",
    }
    monkeypatch.setattr(examination, "doctor", fails)
    (check,) = evaluated().checks or ()
    assert check.passed is False
    assert "TypeError: the device has no float64" in check.advice
    monkeypatch.setattr(examination, "doctor", works)
    results = evaluated()
    assert [check.name for check in results.checks or ()] == ["logits"]
    assert results.model_copy(update={"checks": None}) == seen[0] == seen[1]
    timings = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert "checks" in timings["seconds"]
    assert evaluated() == results
    assert len(seen) == 2  # what is known is not asked again
    (tmp_path / "run" / "shards" / "checks.json").write_text("{")
    with pytest.raises(ValueError, match=r"checks\.json .*damaged.* delete it"):
        evaluated()


def test_bad_folders_and_files(
    model: rse.SelfEnsemble, data: ImageData, protocol: Protocol, tmp_path: Path
) -> None:
    few = protocol.model_copy(update={"images": 6, "attacks": protocol.attacks[:1]})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        Evaluation(model, data, few, tmp_path / "file")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        Evaluation(model, data, few, tmp_path / "used")
    Evaluation(model, data, few, tmp_path / "run").run()
    shard = next((tmp_path / "run" / "shards").glob("*cw*.safetensors"))
    shard.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"damaged.*delete it"):
        Evaluation(model, data, few, tmp_path / "run").run()
    empty = ImageData("none", torch.zeros(0, 1, 8, 8, dtype=torch.uint8), data.labels[:0], data.classes)
    with pytest.raises(ValueError, match="no images"):
        Evaluation(model, empty, few, tmp_path / "empty")
    path = tmp_path / "run" / "results.json"
    for text, message in (
        ("{", "damaged"),
        ("[]", "was not written by selfensemble"),
        ('{"format": "selfensemble-evaluation", "format_version": 9}', "version 9"),
        ('{"format": "selfensemble-evaluation", "format_version": 1}', "does not fit: name is missing"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_results(path)
    with pytest.raises(FileNotFoundError, match=r"no results\.json"):
        read_results(tmp_path / "nowhere")
