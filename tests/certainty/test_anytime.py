"""Bets on a wanted radius: rarely wrong whenever one looks, and soon over."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import selfensemble as rse
from selfensemble.certainty.anytime import Bets, OutOfReach, Reached, border, most_of_a_rival
from selfensemble.certainty.certification import Method, _looks, certify
from selfensemble.certainty.search import Aims
from selfensemble.certainty.statistics import Votes
from tests.certainty.test_certification import STD, Linear, at_distances

GAP, ALPHA, IMAGES, HORIZON = 1.3, 0.05, 10_000, 160


def on_the_border(rival: float) -> list[float]:
    """Probabilities of the answer, of the rival that stands just against the radius, and of all others."""
    answer = float(stats.norm.cdf(stats.norm.ppf(rival) + GAP))
    return [answer, rival, 1 - answer - rival]


@pytest.mark.parametrize("kind", [Reached, OutOfReach])
@pytest.mark.parametrize("rival", [most_of_a_rival(GAP), 0.15, 0.02])
@pytest.mark.parametrize("hard", [True, False], ids=["votes", "means"])
def test_on_the_border_bets_are_won_as_rarely_as_promised(
    kind: type[Reached] | type[OutOfReach], rival: float, hard: bool
) -> None:
    """At the border both claims are wrong, whenever one stops."""
    law = np.random.default_rng(int(1000 * rival) + hard)
    pilot = torch.from_numpy(law.beta(100 * rival + 0.5, 100 * (1 - rival) + 0.5, size=(IMAGES, 1)))
    bets = kind(pilot, GAP, 0.0, HORIZON)
    ever = torch.zeros(IMAGES, dtype=torch.bool)
    for _ in range(HORIZON // 8):
        if hard:
            counts = law.multinomial(8, on_the_border(rival), size=IMAGES)
            bets.add_votes(8, torch.from_numpy(counts[:, :2]).double())
        else:
            soft = law.dirichlet(np.array(on_the_border(rival)) * 3 + 1e-9, size=(8, IMAGES))
            bets.add(torch.from_numpy(soft[:, :, :2]))
        ever |= bets.sure(ALPHA)
    limit = ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / IMAGES)
    assert float(ever.double().mean()) <= limit


def test_votes_are_counted_as_they_would_be_one_by_one() -> None:
    law = np.random.default_rng(0)
    pilot = torch.from_numpy(law.uniform(0.01, 0.3, size=(20, 3)))
    votes = torch.from_numpy(law.multinomial(1, [0.6, 0.2, 0.1, 0.05, 0.05], size=(30, 20))).double()
    for kind in (Reached, OutOfReach):
        single: Bets = kind(pilot, GAP, 0.01, 100)
        counted: Bets = kind(pilot, GAP, 0.01, 100)
        single.add(votes[:, :, :4])
        counted.add_votes(30, votes.sum(dim=0)[:, :4])
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
    for kind, seen in ((Reached, values), (OutOfReach, poor)):
        without, some = (kind(pilot, GAP, slack, 100) for slack in (0.0, 0.02))
        for bets in (without, some):
            bets.add(seen[:, :, :2])
        assert float(some.sure(0.01).double().mean()) < float(without.sure(0.01).double().mean())


def test_out_of_reach_counts_several_rivals_without_dividing_by_all() -> None:
    """Two rivals stand against it; the money on both is looked at, and on the border it is rarely won."""
    law = np.random.default_rng(2)
    answer = on_the_border(0.1)[0]
    mean = [answer, 0.1, 0.1, *[(0.8 - answer) / 6] * 6]
    pilot = torch.full((IMAGES, 2), 0.1, dtype=torch.float64)
    bets = OutOfReach(pilot, GAP, 0.0, 200)
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
    assert seen.out_of_reach(GAP, 0.0, 100)._slope.shape[:2] == (1, 3)
    assert Aims(STD, ALPHA, 100).wanted == ()
