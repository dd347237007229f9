"""Models that pass no gradient to their inputs: attacks that need one are not possible, and that is said."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks.masking import NoGradientError
from selfensemble.data.images import ImageData
from selfensemble.evaluation.doctor.examination import doctor
from selfensemble.evaluation.estimate import gradients
from selfensemble.evaluation.protocol import Protocol, expand, load_protocol
from selfensemble.evaluation.results import Results, read_results
from selfensemble.evaluation.runner import Evaluation

from ..command import error, run

SMALL: dict[str, Any] = {"images": 12, "shard": 12, "judge": {"seeds": 3, "queries": 3}}


class Masked(nn.Module):
    """A classifier that answers well, and whose gradients one of the usual steps takes away."""

    def __init__(self, net: nn.Module, mask: str = "threshold") -> None:
        super().__init__()
        self.net, self.mask = net, mask

    def forward(self, x: Tensor) -> Tensor:
        if self.mask == "round":  # whose gradient torch takes for zero
            return self.net((4 * x).round() / 4)  # type: ignore[no-any-return]
        outputs: Tensor = self.net((x > 0.5).float() if self.mask == "threshold" else x.detach())
        if self.mask == "one-hot":
            return nn.functional.one_hot(outputs.argmax(dim=1), 10).float()
        return outputs


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Trained on digits that a threshold left of, for some seconds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    data = rse.load_data("digits", "train")
    x, y = data.inputs(slice(None)), data.labels
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net((x > 0.5).float() if step % 2 else x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return rse.load_data("digits", "test")


def masked(net: nn.Module, mask: str, std: float = 0.0) -> rse.SelfEnsemble:
    return rse.SelfEnsemble(Masked(deepcopy(net), mask), rse.NoiseConfig(std, std), draws=2).eval()


def evaluated(ensemble: rse.SelfEnsemble, digits: ImageData, protocol: Protocol, out: Path) -> Results:
    return Evaluation(ensemble, digits, protocol, out, name="masked").run()


@pytest.mark.parametrize(
    ("mask", "std"), [("threshold", 0.0), ("threshold", 0.1), ("detach", 0.0), ("one-hot", 0.0)]
)
def test_attacks_without_gradients_judge_it(
    net: nn.Module, digits: ImageData, mask: str, std: float, tmp_path: Path
) -> None:
    protocol = load_protocol("demo-honest", SMALL | {"checks": False})
    results = evaluated(masked(net, mask, std), digits, protocol, tmp_path)
    assert read_results(tmp_path) == results
    assert {entry.attack for entry in results.attacks} == {"square", "random-noise"}
    assert sorted(e.eps or 0 for e in results.attacks if e.attack == "square") == [0.1, 0.2]
    assert [each.title for each in results.impossible] == [
        run.title for run in expand(protocol) if run.attack != "random-noise"
    ]
    assert all("passes no gradient" in each.reason for each in results.impossible)
    assert all(len(each.norm or "") and each.eps for each in results.impossible)
    assert results.clean.accuracy > 0.6
    # What is left is that of the attacks that were made; none of the others counts as withstood.
    assert max(entry.accuracy for entry in results.worst_case) < results.clean.accuracy or mask == "one-hot"
    assert evaluated(masked(net, mask, std), digits, protocol, tmp_path) == results  # continued


def test_square_stands_beside_attacks_whose_gradients_are_zero(
    net: nn.Module, digits: ImageData, tmp_path: Path
) -> None:
    attacks = [{"attack": "pgd", "eps": [0.1, 0.3], "steps": 5}]
    protocol = Protocol.model_validate(SMALL | {"name": "some", "attacks": attacks})
    results = evaluated(masked(net, "round"), digits, protocol, tmp_path)
    assert results.impossible == ()
    assert [(e.attack, e.eps) for e in results.attacks if "added" in e.title] == [
        ("square", 0.1),
        ("square", 0.3),
    ]
    found = {(entry.attack, entry.eps): entry.accuracy for entry in results.attacks}
    worst = next(entry.accuracy for entry in results.worst_case if entry.eps == 0.3)
    assert worst <= found["square", 0.3] < found["pgd", 0.3] - 0.3


def test_square_is_added_only_where_there_is_none(net: nn.Module, digits: ImageData, tmp_path: Path) -> None:
    square = {"attack": "square", "eps": 0.2, "queries": 4}
    attacks = [{"attack": "pgd", "eps": [0.1, 0.2], "steps": 2}, square]
    protocol = Protocol.model_validate(SMALL | {"name": "some", "attacks": attacks})
    results = evaluated(masked(net, "detach"), digits, protocol, tmp_path)
    assert [(e.eps, "added" in e.title) for e in results.attacks] == [(0.2, False), (0.1, True)]


def test_a_protocol_without_such_attacks_says_so_before_it_works(
    net: nn.Module, digits: ImageData, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="take a protocol with attacks that need none, --protocol honest"):
        Evaluation(masked(net, "detach"), digits, load_protocol("paper", SMALL), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_models_are_attacked_as_before(net: nn.Module, digits: ImageData, tmp_path: Path) -> None:
    protocol = Protocol.model_validate(SMALL | {"name": "some", "attacks": [{"attack": "pgd", "steps": 2}]})
    results = evaluated(rse.SelfEnsemble(deepcopy(net), draws=2).eval(), digits, protocol, tmp_path)
    assert results.impossible == ()
    assert "impossible" not in (tmp_path / "results.json").read_text()


@pytest.mark.parametrize("mask", ["threshold", "detach", "one-hot"])
def test_the_doctor_asks_square(net: nn.Module, digits: ImageData, mask: str) -> None:
    found = {
        record.name: record
        for record in doctor(
            Masked(net, mask).eval(),
            digits.inputs(slice(80)),
            digits.labels[:80],
            eps=0.2,
            images=15,
            steps=4,
        )
    }
    black_box = found["black box is weaker"]
    assert black_box.passed is False
    assert re.search(r"Square \d+\.\d %", black_box.figure)
    assert "gradients are masked" in black_box.advice
    assert not any(record.figure == "could not be done" for record in found.values())
    if mask == "one-hot":
        assert "argmax" in found["logits"].advice
        assert "softmax" not in found["logits"].advice


def test_an_attack_says_why_it_cannot_follow(net: nn.Module, digits: ImageData) -> None:
    images, labels = digits.inputs(slice(4)), digits.labels[:4]
    for mask in ("threshold", "detach", "one-hot"):
        with pytest.raises(NoGradientError, match="argmax"):
            rse.attacks.pgd(Masked(net, mask), images, labels, steps=1)
    with pytest.raises(ValueError, match="probabilities"):
        rse.attacks.pgd(nn.Sequential(net, nn.Softmax(dim=1)), images, labels, steps=1)


FILE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

    def forward(self, x):
        return self.net((x > 0.5).float())
"""


def test_terminal_report_and_card_say_it(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("thresholded.py").write_text(FILE)
    torch.save({f"net.{key}": value for key, value in net.state_dict().items()}, "net.pth")
    Path("short.yaml").write_text(
        "attacks:\n- {attack: pgd, title: PGD, eps: 0.2, steps: 2}\n"
        "- {attack: random-noise, eps: 0.2, tries: 2}\n"
        "judge: {queries: 3}\n"
    )
    network = ("thresholded.py:Net", "--weights", "net.pth", "--noise", "0:0", "--data", "digits")
    shown = run("evaluate", *network, "--protocol", "short.yaml", "--n", 10, "--out", "judged").stdout
    assert "not possible" in shown
    assert "Gradients are masked" in shown
    assert "no sign of robustness" in " ".join(shown.split())
    run("report", "judged", "-o", "report.html")
    page = Path("report.html").read_text()
    assert "not sure: gradients are masked" in page
    assert "These attacks were not possible: PGD (L" in page
    run("pack", *network, "packed")
    named = ("--network", "thresholded.py:Net")
    short = ("--data", "digits", "--protocol", "short.yaml", "--n", 10, "--out", "again")
    run("evaluate", "packed", *named, *short)
    run("card", "packed", *named, "--evaluation", "again")
    assert "| PGD | linf 0.2 | not possible" in Path("packed/README.md").read_text()
    assert "needs gradients" in error("evaluate", *network, "--protocol", "paper", "--out", "other")


def test_the_time_left_counts_what_attacks_cost() -> None:
    attacks = [
        {"attack": "pgd", "steps": 100, "eot": 4, "restarts": 2}, {"attack": "square", "queries": 300},
        {"attack": "autoattack-rand", "steps": 10, "eot": 20},
    ]  # fmt: skip
    runs = expand(Protocol.model_validate({"name": "some", "attacks": attacks}))
    assert [gradients(each) for each in runs] == [800, pytest.approx(100), 400]
