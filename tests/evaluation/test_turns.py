"""Attacks in turn, AutoAttack's own rule, and editions of protocols."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import selfensemble as rse
from selfensemble.attacks import ATTACKS, autoattack_rand, published_rule
from selfensemble.data.images import ImageData
from selfensemble.evaluation.protocol import Protocol, expand, load_protocol
from selfensemble.evaluation.results import Results
from selfensemble.evaluation.runner import Evaluation
from selfensemble.evaluation.shards import CLEAN, Judged, plans_of
from selfensemble.evaluation.turns import SURE, earlier, left_over


def judged(lead: list[float], answers: list[list[int]], value: float) -> Judged:
    count = len(lead)
    images = torch.full((count, 1), value)
    zero = torch.zeros(count)
    return Judged(torch.tensor(answers), torch.tensor(lead), zero, zero, lambda: images)


def test_sure_are_images_that_lead_clearly_and_are_wrong_each_time() -> None:
    labels = torch.zeros(5, dtype=torch.int64)
    first = judged([-0.5, SURE, SURE, 0.1, -0.9], [[0, 0], [1, 1], [1, 0], [1, 1], [0, 0]], 1.0)
    second = judged([-0.6, 0.0, 0.0, SURE - 0.01, 0.9], [[0, 0], [0, 0], [0, 1], [1, 1], [1, 1]], 2.0)
    left = left_over([first, second], labels, 2)
    assert left.open.tolist() == [True, False, True, True, False]
    assert left.best.flatten().tolist() == [1, 1, 1, 2, 2]
    # Later queries, of the clean images, do not count.
    more = judged([0.5], [[1, 1, 0]], 1.0)
    assert left_over([more], labels[:1], 2).open.tolist() == [False]


def test_earlier_are_the_entries_of_balls_within() -> None:
    attacks = [
        {"attack": "pgd", "norm": "l2", "eps": [0.25, 0.5]},
        {"attack": "pgd", "norm": "linf", "eps": [2 / 255]},
        {"attack": "fmn", "norm": "l2", "eps": [0.25, 0.5]},
        {"attack": "square", "norm": "l2", "eps": [0.5]},
        {"attack": "cw"},
    ]
    runs = expand(Protocol.model_validate({"name": "a", "attacks": attacks}))
    plans = list(plans_of(runs, 3072))
    keys = {run.key: earlier(plans, runs, run, 3072) for run in runs}
    first, second, linf, near, square, cw = (run.key for run in runs)
    assert keys[first] == [CLEAN]
    assert keys[second] == [CLEAN, f"{first}-0"]
    # 2/255 in every pixel are .43 in L2; nothing in L2 lies within.
    assert keys[linf] == [CLEAN]
    # For several radii at once: within the smallest.
    assert keys[near] == [CLEAN, f"{first}-0"]
    assert keys[square] == [CLEAN, *(f"{key}-0" for key in (first, second, linf, near)), f"{near}-1"]
    assert keys[cw] == [CLEAN]


@pytest.fixture
def defender(tiny: nn.Module, images: torch.Tensor) -> tuple[rse.SelfEnsemble, ImageData]:
    with torch.no_grad():
        for parameter in list(tiny.parameters())[-2:]:
            parameter.mul_(30)  # answers that are sure of themselves
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.05, 0.05), draws=4).eval()
    labels = ensemble.predict(images, seed=0).label
    labels[0] = (labels[0] + 1) % 5  # wrong without attack
    data = ImageData("six", (images * 255).round().to(torch.uint8), labels, tuple("abcde"))
    return ensemble, data


def protocol(**values: Any) -> Protocol:
    attacks = [
        {"attack": "pgd", "norm": "l2", "eps": [4.0], "steps": 10},
        {"attack": "pgd", "norm": "l2", "eps": [4.0], "steps": 12, "loss": "margin"},
    ]
    return Protocol.model_validate(
        {"name": "turns", "images": 6, "shard": 4, "judge": {"seeds": 3, "queries": 3}, "attacks": attacks}
        | values
    )


def test_in_turn_only_the_images_that_are_left_cost_gradients(
    defender: tuple[rse.SelfEnsemble, ImageData], tmp_path: Path
) -> None:
    ensemble, data = defender

    def results(name: str, **values: Any) -> tuple[Results, Evaluation]:
        evaluation = Evaluation(ensemble, data, protocol(**values), tmp_path / name)
        return evaluation.run(), evaluation

    all_images, _ = results("all")
    assert [entry.gradients for entry in all_images.attacks] == [10, 12]
    turns, evaluation = results("turns", in_turn=True)
    first, second = turns.attacks
    shards = evaluation.shards
    open_first, open_second = 0, 0
    for start in shards.starts:
        labels = evaluation.labels[shards.part(start)]
        clean, one = shards.read(start, CLEAN), shards.read(start, first.key)
        two = shards.read(start, second.key)
        before = left_over([clean], labels, 3)
        after = left_over([clean, one], labels, 3)
        open_first, open_second = open_first + int(before.open.sum()), open_second + int(after.open.sum())
        # What is not attacked is taken over as it was.
        assert torch.equal(one.adversarial[~before.open], clean.adversarial[~before.open])
        assert torch.equal(two.adversarial[~after.open], after.best[~after.open])
    assert 0 < open_first < 6
    assert first.gradients == pytest.approx(10 * open_first / 6)
    assert second.gradients == pytest.approx(12 * open_second / 6)
    assert open_second < open_first
    (worst,) = turns.worst_case
    assert worst.accuracy <= first.accuracy + 0.2

    everywhere = [spec.model_copy(update={"everywhere": True}) for spec in protocol().attacks]
    forced, _ = results("everywhere", in_turn=True, attacks=everywhere)
    assert [entry.gradients for entry in forced.attacks] == [10, 12]


def test_interrupted_turns_end_as_if_they_had_not_been(
    defender: tuple[rse.SelfEnsemble, ImageData], tmp_path: Path
) -> None:
    ensemble, data = defender
    whole = Evaluation(ensemble, data, protocol(in_turn=True), tmp_path / "whole")
    whole.run()
    cut = Evaluation(ensemble, data, protocol(in_turn=True), tmp_path / "cut")
    cut.run()
    for path in (tmp_path / "cut" / "shards").glob("*-01-*.safetensors"):
        path.unlink()
    for path in (tmp_path / "cut" / "shards").glob("*worst*.safetensors"):
        path.unlink()
    Evaluation(ensemble, data, protocol(in_turn=True), tmp_path / "cut").run()
    for name in ("results.json", "images.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Coin(nn.Module):
    """Answers rightly (class 0) with probability `p`, whatever the image; a gradient that says nothing."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = torch.where(torch.rand(len(x)) < self.p, 1.0, -1.0)
        level = side + 0 * x.flatten(1).sum(dim=1)
        return torch.stack([level, -level], dim=1)


def test_the_published_rule_counts_lucky_draws() -> None:
    # Of images that one draw answers rightly 9 times of 10 three passes leave .9^3 = .729; judged again,
    # none is fooled: the attack finds nothing.
    count = 600
    x, y = torch.rand(count, 1, 4, 4), torch.zeros(count, dtype=torch.int64)
    with published_rule() as verdicts:
        autoattack_rand(Coin(0.9), x, y, eps=0.1, steps=2, eot=2, seed=0, confirm_draws=10, max_batch=200)
    robust = torch.cat(verdicts)
    assert [len(part) for part in verdicts] == [200, 200, 200]
    expected, error = 0.9**3, 5 * (0.9**3 * (1 - 0.9**3) / count) ** 0.5
    assert abs(float(robust.double().mean()) - expected) < error


def test_the_rule_stands_in_the_results(defender: tuple[rse.SelfEnsemble, ImageData], tmp_path: Path) -> None:
    ensemble, data = defender
    attacks = [
        {"attack": "pgd", "norm": "l2", "eps": [0.5], "steps": 3},
        {"attack": "autoattack-rand", "norm": "l2", "eps": [0.5], "steps": 3, "eot": 2, "everywhere": True},
    ]
    results = Evaluation(
        ensemble, data, protocol(in_turn=True, version=2, attacks=attacks), tmp_path / "run"
    ).run()
    assert results.attacks[0].published is None
    assert results.attacks[1].published is not None
    assert 0 <= results.attacks[1].published <= 5 / 6 + 1e-9
    assert results.protocol["version"] == 2


def test_editions_of_the_honest_protocol() -> None:
    first, second = load_protocol("honest-1"), load_protocol("honest")
    assert (first.version, second.version) == (1, 2)
    assert second.in_turn
    assert second.bits == 8
    assert not first.in_turn
    assert {spec.attack for spec in second.attacks} <= set(ATTACKS)
    # What first editions recorded stays their record: unfinished runs go on.
    assert not {"version", "in_turn", "bits"} & set(first.record())
