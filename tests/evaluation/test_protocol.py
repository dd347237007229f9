"""Protocols: what is read, what is refused, and how lists of settings are crossed."""

import inspect
from pathlib import Path

import pytest

from selfensemble.evaluation.protocol import expand, load_protocol, shipped_protocols


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", shipped_protocols())
def test_shipped_protocols_are_valid(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.description
    runs = expand(protocol)
    assert len({run.key for run in runs}) == len(runs)


def test_published_settings() -> None:
    """Croce & Hein 2020: rand is APGD-CE and -DLR with 100 steps and EOT 20; standard adds FAB and Square."""
    from selfensemble.attacks import autoattack_rand, autoattack_standard

    for run in expand(load_protocol("autoattack-rand")):
        assert run.call() is autoattack_rand
        assert run.settings["eot"] == 20
    assert inspect.signature(autoattack_rand).parameters["steps"].default == 100
    assert inspect.signature(autoattack_standard).parameters["queries"].default == 5000
    paper = expand(load_protocol("paper"))
    assert [run.settings["c"] for run in paper] == [0.01, 0.03, 0.06, 0.1, 0.2, 0.4]
    assert {(run.settings["steps"], run.settings["lr"]) for run in paper} == {(300, 0.001)}


def test_lists_are_crossed_and_fractions_read(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        "attacks:\n"
        "  - {attack: pgd, eps: [2/255, 8/255], loss: [ce, dlr], steps: 3}\n"
        "  - {attack: cw, eps: [0.25, 1/2]}\n"
        "  - {attack: fmn, norm: l1}\n"
        "  - {attack: apgd, surrogate: base, norm: l2, eps: .5, title: from afar}\n",
    )
    protocol = load_protocol(source)
    assert protocol.name == "mine"
    runs = expand(protocol)
    assert [run.attack for run in runs] == ["pgd"] * 4 + ["cw", "fmn", "apgd"]
    assert [run.radii for run in runs[:4]] == [(2 / 255,), (2 / 255,), (8 / 255,), (8 / 255,)]
    assert [run.settings["loss"] for run in runs[:4]] == ["ce", "dlr"] * 2
    assert runs[0].norm == "linf"
    assert (runs[4].radii, runs[4].norm, runs[4].settings) == ((0.25, 0.5), "l2", {})
    assert (runs[5].radii, runs[5].norm) == ((), "l1")
    assert (runs[6].title, runs[6].surrogate) == ("from afar", "base")


def test_overrides(tmp_path: Path) -> None:
    source = write(tmp_path, "attacks: [{attack: fgsm}]")
    assert load_protocol(source, {"images": 7, "seed": 3}).images == 7
    with pytest.raises(ValueError, match="images"):
        load_protocol(source, {"images": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attacks: [{attack: gpd}]", "unknown attack 'gpd'; known: .*pgd"),
        ("attacks: [{attack: pgd, stepz: 3}]", "pgd has no setting 'stepz'; known: .*steps"),
        ("attacks: [{attack: pgd, frozen: true}]", "no setting 'frozen'"),
        ("attacks: [{attack: pgd, steps: many}]", "attacks.0.steps"),
        ("attacks: [{attack: pgd, norm: l7}]", "attacks.0.norm"),
        ("attacks: [{attack: pgd, eps: -1}]", "eps must be a number above 0"),
        ("attacks: [{attack: pgd, eps: 8/0}]", "eps"),
        ("attacks: [{attack: cw, eps: [0.5, .nan]}]", "eps must be a number above 0"),
        ("attacks: []", "attacks is empty"),
        ("attacks: [{attack: cw, eps: []}]", "attacks.0.eps is an empty list"),
        ("attack: pgd", "unknown key attack; known here: name, description"),
        ("attacks: [{attack: pgd}]\njudge: {seedz: 3}", "known here: seeds, queries"),
        ("attacks: [{attack: pgd}]\nimages: 0", "images"),
        ("[1, 2]", "must hold keys and values"),
        ("attacks: [", "not valid YAML"),
    ],
)
def test_bad_protocols(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_protocol(write(tmp_path, text))


def test_unknown_protocol() -> None:
    with pytest.raises(FileNotFoundError, match=r"autoattack-rand.*honest.*paper"):
        load_protocol("onest")
