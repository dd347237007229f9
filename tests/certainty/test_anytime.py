"""Bets on a wanted radius: rarely wrong whenever one looks, and soon over."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import selfensemble as rse
from selfensemble.certainty.anytime import OutOfReach, Reached, border, most_of_a_rival
from selfensemble.certainty.certification import Method, _certify, _looks, certify
from selfensemble.certainty.search import Aims
from selfensemble.certainty.statistics import Means, Votes
from tests.certainty.test_certification import STD, Linear, at_distances

GAP, ALPHA, IMAGES, HORIZON = 1.3, 0.05, 10_000, 160


def on_the_border(rival: float) -> list[float]:
    """Probabilities of the answer, of the rival that stands just against the radius, and of all others."""
    answer = float(stats.norm.cdf(stats.norm.ppf(rival) + GAP))
    return [answer, rival, 1 - answer - rival]


def sides(pilot: torch.Tensor, slack: float, horizon: int) -> dict[str, Reached | OutOfReach]:
    """Bets of every kind, on images of which `pilot` has the rivals."""
    images, rivals = pilot.shape
    return {
        "reached": Reached(pilot, GAP, slack, horizon),
        "all together": Reached(pilot.sum(dim=1, keepdim=True), GAP, slack, horizon, "all"),
        "out of reach": OutOfReach(images, rivals, GAP, slack, horizon),
        "of all together": OutOfReach(images, rivals, GAP, slack, horizon, "all"),
        "of others": OutOfReach(images, rivals, GAP, slack, horizon, "others"),
    }


@pytest.mark.parametrize("kind", ["reached", "out of reach", "of others"])
@pytest.mark.parametrize("rival", [most_of_a_rival(GAP), 0.15, 0.02])
@pytest.mark.parametrize("hard", [True, False], ids=["votes", "means"])
def test_on_the_border_bets_are_won_as_rarely_as_promised(kind: str, rival: float, hard: bool) -> None:
    """At the border all claims are wrong, whenever one stops; of others, where selection chose the rival."""
    law = np.random.default_rng(int(1000 * rival) + hard)
    pilot = torch.from_numpy(law.beta(100 * rival + 0.5, 100 * (1 - rival) + 0.5, size=(IMAGES, 1)))
    bets = sides(pilot, 0.0, HORIZON)[kind]
    order = [1, 0, 2] if kind == "of others" else [0, 1, 2]
    ever = torch.zeros(IMAGES, dtype=torch.bool)
    for _ in range(HORIZON // 8):
        if hard:
            counts = law.multinomial(8, on_the_border(rival), size=IMAGES)
            bets.add_votes(8, torch.from_numpy(counts[:, order]).double())
        else:
            soft = law.dirichlet(np.array(on_the_border(rival)) * 3 + 1e-9, size=(8, IMAGES))
            bets.add(torch.from_numpy(soft[:, :, order]))
        ever |= bets.sure(ALPHA)
    limit = ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / IMAGES)
    assert float(ever.double().mean()) <= limit


def test_votes_are_counted_as_they_would_be_one_by_one() -> None:
    law = np.random.default_rng(0)
    pilot = torch.from_numpy(law.uniform(0.01, 0.3, size=(20, 3)))
    votes = torch.from_numpy(law.multinomial(1, [0.6, 0.2, 0.1, 0.05, 0.05], size=(30, 20))).double()
    singles, counts = sides(pilot, 0.01, 100), sides(pilot, 0.01, 100)
    for kind, counted in counts.items():
        single = singles[kind]
        single.add(votes)
        counted.add_votes(30, votes.sum(dim=0))
        torch.testing.assert_close(single.money(), counted.money())


def test_the_border_is_concave_and_its_slope_is_its_derivative() -> None:
    m = torch.linspace(1e-4, 0.4, 2000, dtype=torch.float64)
    value, slope = border(m, GAP)
    assert (slope.diff() < 0).all()
    middle = (value[2:] - value[:-2]) / (m[2:] - m[:-2])
    torch.testing.assert_close(middle[50:], slope[1:-1][50:], rtol=1e-3, atol=0)
    top = most_of_a_rival(GAP)
    assert float(border(torch.tensor(top).double(), GAP)[0]) == pytest.approx(1 - top)


def test_slack_moves_the_border_against_both_claims() -> None:
    law = np.random.default_rng(1)
    pilot = torch.full((4000, 1), 0.05, dtype=torch.float64)
    values = torch.from_numpy(law.multinomial(1, [0.9, 0.05, 0.05], size=(60, 4000))).double()
    poor = torch.from_numpy(law.multinomial(1, [0.5, 0.3, 0.2], size=(60, 4000))).double()
    for kind, seen in (("reached", values), ("out of reach", poor), ("of others", poor)):
        without, some = (sides(pilot, slack, 100)[kind] for slack in (0.0, 0.02))
        for bets in (without, some):
            bets.add(seen)
        assert float(some.sure(0.01).double().mean()) < float(without.sure(0.01).double().mean())


def test_out_of_reach_counts_several_rivals_without_dividing_by_all() -> None:
    """Two rivals stand against it; the money on both is looked at, and on the border it is rarely won."""
    law = np.random.default_rng(2)
    answer = on_the_border(0.1)[0]
    mean = [answer, 0.1, 0.1, *[(0.8 - answer) / 6] * 6]
    bets = OutOfReach(IMAGES, 8, GAP, 0.0, 200)
    ever = torch.zeros(IMAGES, dtype=torch.bool)
    for _ in range(25):
        counts = torch.from_numpy(law.multinomial(8, mean, size=IMAGES)).double()
        bets.add_votes(8, counts)
        ever |= bets.sure(ALPHA)
    assert float(ever.double().mean()) <= ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / IMAGES)


def test_looks_grow_and_end_at_the_last_draw() -> None:
    assert list(_looks(5000, ())) == [5000]
    looks = list(_looks(5000, (0.25,)))
    assert looks[:4] == [16, 32, 48, 64]
    assert looks[-1] == 5000
    assert len(looks) < 60
    assert list(_looks(10, (0.25,))) == [10]


def test_several_radii_at_once() -> None:
    model = Linear()
    ensemble = rse.SelfEnsemble(model, bounds=None).eval()
    inputs = at_distances(model, [1.2, 0.4, 0.02])
    methods: tuple[Method, ...] = ("vote", "mean")
    for method in methods:
        found = certify(
            ensemble, inputs, n=6_400, radius=[0.6, 0.2], seed=0, give_up=0, method=method, rivals="all"
        )
        truth = [[1, 1], [1, -1], [-1, -1]] if method == "vote" else None
        if truth is not None:
            assert found.verdict.tolist() == truth
            assert found.radius.tolist()[:2] == [0.6, 0.2]
        # Nested: what is reached is reached at smaller radii, what is not is not at larger ones.
        assert ((found.verdict[:, 1:] == 1) <= (found.verdict[:, :1] == 1)).all()
        assert ((found.verdict[:, :1] == -1) <= (found.verdict[:, 1:] == -1)).all()
        assert (found.draws < 2000).all() or method == "mean"


def test_giving_up_saves_draws_and_costs_few_certificates() -> None:
    """Images around the wanted radius, of which n draws certify some."""
    model = Linear()
    ensemble = rse.SelfEnsemble(model, bounds=None).eval()
    distances = np.linspace(0.2, 0.4, 60)
    inputs = at_distances(model, distances.tolist())
    settings: dict[str, Any] = {"n": 3000, "radius": 0.3, "seed": 1, "method": "vote", "rivals": "all"}
    never, some = (certify(ensemble, inputs, give_up=give_up, **settings) for give_up in (0.0, 0.05))
    assert float(some.draws.double().mean()) < 0.8 * float(never.draws.double().mean())
    assert int((never.verdict == 1).sum() - (some.verdict == 1).sum()) <= 2
    assert (some.verdict[torch.from_numpy(distances < 0.3)] != 1).all()
    assert (never.verdict[torch.from_numpy(distances > 0.3)] != -1).all()


@pytest.mark.parametrize("radius", [[], [0.1, -1], [float("nan")], 0])
def test_radii_that_are_none_are_refused(radius: object) -> None:
    ensemble = rse.SelfEnsemble(Linear(), bounds=None).eval()
    with pytest.raises(ValueError, match="radius must be > 0"):
        certify(ensemble, at_distances(Linear(), [1.0]), n=100, radius=radius)  # type: ignore[arg-type]


@pytest.mark.parametrize("give_up", [-0.1, 1.0, float("nan")])
def test_shares_that_are_none_are_refused(give_up: float) -> None:
    ensemble = rse.SelfEnsemble(Linear(), bounds=None).eval()
    with pytest.raises(ValueError, match=r"give_up must be in \[0, 1\)"):
        certify(ensemble, at_distances(Linear(), [1.0]), n=100, radius=0.1, give_up=give_up)


def test_votes_keep_their_rivals_apart() -> None:
    selection = torch.eye(12).repeat(3, 1)[:, None, :].transpose(0, 1).reshape(36, 1, 12)
    seen = Votes(selection, "runner_up", ALPHA, 100)
    assert seen.reached(GAP, 0.0, 100)._slope.shape[:2] == (1, 9)  # 8 rivals, and the other 3 together
    mine, others = seen.out_of_reach(GAP, 0.0, 100)
    assert mine._slope.shape[:2] == (1, 3)
    assert others._slope.shape[:2] == (1, 4)  # 3 rivals, and the other 8 together
    assert Aims(STD, ALPHA, 100).wanted == ()


@pytest.mark.parametrize("method", ["vote", "mean"])
def test_out_of_reach_is_about_all_classes_and_not_the_one_that_few_draws_chose(method: Method) -> None:
    """Near the boundary three draws often choose the wrong answer; the other one is certain within .05."""
    model = Linear()
    ensemble = rse.SelfEnsemble(model, bounds=None).eval()
    inputs = at_distances(model, [0.05] * 80)
    settings: dict[str, Any] = {"n0": 3, "n": 10_000, "seed": 3, "method": method, "give_up": 0}
    found = certify(ensemble, inputs, radius=0.01, **settings)
    assert float((found.label != 0).double().mean()) > 0.2  # the wrong one cannot be certified
    assert int((found.verdict == -1).sum()) <= 2
    assert int((found.draws > 10_000).sum()) < 60


def test_out_of_reach_is_about_every_rival_by_itself() -> None:
    """.5 against two of .25: certain, though not by the bound that takes the two for one."""
    law = np.random.default_rng(8)
    outputs = torch.from_numpy(law.multinomial(1, [0.5, 0.25, 0.25], size=(4100, 40))).float()

    def passes(kept: torch.Tensor, index: int, count: int) -> Iterator[torch.Tensor]:
        yield outputs[index : index + count, kept]

    aims = Aims(1.0, 0.001, 4000, (0.05,))
    seen = Votes(outputs[:100], "all", 0.001, 4000)
    ((label, *_, verdict),) = _certify(torch.arange(40), passes, [seen], 100, aims)
    assert (label == -1).all()
    assert (verdict == 0).all()


@pytest.mark.parametrize(("concentration", "part"), [(2.0, 0.9), (50.0, 0.4), (50.0, 0.9)])
def test_few_images_are_given_up_whose_means_hardly_vary(concentration: float, part: float) -> None:
    """As many as votes would need are too many; `part` of the way to where half of all are certified."""
    law, images, n, std = np.random.default_rng(7), 80, 1000, 1.0
    least = float(stats.norm.cdf(GAP / 2))
    varying = np.sqrt(least * (1 - least) / (concentration + 1))
    mean = least + part * -stats.norm.ppf(0.001 / 4) * varying / np.sqrt(n)
    soft = law.beta(mean * concentration, (1 - mean) * concentration, size=(100 + n, images))
    outputs = torch.from_numpy(np.stack([soft, 1 - soft], axis=2)).float()

    def passes(kept: torch.Tensor, index: int, count: int) -> Iterator[torch.Tensor]:
        yield outputs[index : index + count, kept]

    certified = []
    for give_up in (0.0, 0.05):
        seen = Means(outputs[:100], "runner_up", 0.001, n, None, seed=0)
        aims = Aims(std, 0.001, n, (GAP / 2,), give_up=give_up)
        ((_, radius, *_),) = _certify(torch.arange(images), passes, [seen], 100, aims)
        certified.append(int((radius >= GAP / 2).sum()))
    never, some = certified
    assert never - some <= 0.05 * never + 3 * np.sqrt(0.05 * 0.95 * max(never, 1))


def test_a_radius_that_no_draw_can_reach_changes_nothing_for_the_others() -> None:
    model = Linear()
    ensemble = rse.SelfEnsemble(model, bounds=None).eval()
    inputs = at_distances(model, [0.8, 0.02, 3.0])
    settings: dict[str, Any] = {"n": 4000, "seed": 0, "method": "vote"}
    alone = certify(ensemble, inputs, radius=0.3, **settings)
    for far in (4.5 * STD, 9.0 * STD, 50 * STD, 1e6):
        both = certify(ensemble, inputs, radius=[0.3, far], **settings)
        assert both.verdict[:, 0].tolist() == alone.verdict[:, 0].tolist()
        assert (both.verdict[:, 1] != 1).all()
        assert (both.draws <= 2 * alone.draws).all()
    with pytest.raises(
        ValueError, match=r"no image can be certified within 1e\+06: .* draws certify .* at most"
    ):
        certify(ensemble, inputs, radius=1e6, **settings)


@pytest.mark.parametrize("ratio", [0.05, 1.0, 4.0, 6.0, 8.5, 40.0])
def test_bets_on_any_radius_are_finite(ratio: float) -> None:
    pilot = torch.tensor([[1e-9], [0.3]], dtype=torch.float64)
    votes = torch.eye(2, dtype=torch.float64).repeat(20, 1)[:, None].expand(40, 2, 2)
    for against in ("each", "all", "others"):
        for slack in (0.0, 2e-8):
            bets = OutOfReach(2, 1, 2 * ratio, slack, 1000, against)
            bets.add(votes)
            assert bets.money().isfinite().all()
            certain = OutOfReach(2, 1, 2 * ratio, slack, 1000, against)
            certain.add_votes(5000, torch.tensor([[5000.0, 0.0]] * 2, dtype=torch.float64))
            assert not certain.sure(0.05).any() or against == "others"
    reached = Reached(pilot, 2 * ratio, 0.0, 1000)
    reached.add(votes)
    assert reached.money().isfinite().all()
    assert not reached.sure(0.05).any()
