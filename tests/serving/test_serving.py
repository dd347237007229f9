"""Requests and draws that share passes: everybody gets the answer to their own image, nobody is forgotten."""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.ensemble.stopping import Calibrated, Exact, Fixed, Rule
from selfensemble.serving.batching import Answer, Batcher
from selfensemble.serving.turns import BusyError, ClosedError


class Probe(nn.Module):
    """Logits that tell which image was seen; `gate` holds passes back, `broken` makes them fail."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]).view(4, 1, 1, 1))
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.broken = False
        self.sizes: deque[int] = deque()  # a list would be a setting, another one after each pass

    def forward(self, inputs: Tensor) -> Tensor:
        self.started.set()
        self.gate.wait(20)
        self.sizes.append(len(inputs))
        if self.broken:
            raise RuntimeError("out of order")
        logits: Tensor = self.conv(inputs).mean(dim=(2, 3))
        return torch.where(inputs.amax(dim=(1, 2, 3))[:, None] > 5, torch.nan, 4 * logits)


def ensemble(std: float) -> tuple[rse.SelfEnsemble, Probe]:
    probe = Probe()
    return rse.SelfEnsemble(probe, rse.NoiseConfig(std, 0.0), bounds=None).eval(), probe


def images(count: int) -> Tensor:
    return torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()


def answers(batcher: Batcher, inputs: Tensor, rule: Rule) -> list[Answer]:
    return [future.result(20) for future in batcher.submit(inputs, rule)]


def test_everybody_gets_their_own_answer() -> None:
    """400 images of 40 threads, without noise so that answers are known, in requests of 1 to 19."""
    model, _ = ensemble(0.0)
    inputs = images(400)
    expected = model.predict_proba(inputs)
    sizes = [1 + (7 * k) % 19 for k in range(40)]
    parts = list(torch.arange(400).split(10))
    with Batcher(model, inputs[:1], most_waiting=1000) as batcher, ThreadPoolExecutor(40) as pool:

        def ask(part: Tensor, size: int) -> list[tuple[int, Answer]]:
            found: list[tuple[int, Answer]] = []
            for few in part.split(size):
                found += zip(few.tolist(), answers(batcher, inputs[few], Fixed(10)), strict=True)
            return found

        for future in [pool.submit(ask, *each) for each in zip(parts, sizes, strict=True)]:
            for place, answer in future.result(60):
                torch.testing.assert_close(answer.probabilities, expected[place])
                assert answer.draws == 1
    assert batcher.images == 400
    assert batcher.passes < 400


@pytest.mark.parametrize("antithetic", [False, True])
def test_means_of_draws_are_those_of_the_ensemble(antithetic: bool) -> None:
    model, _ = ensemble(0.5)
    rule = Calibrated(
        thresholds=(2.0,) * 9 + (0.0,), epsilon=0.1, delta=0.1, mean_draws=6, disagreement=0.1, images=1,
        reference_draws=100, antithetic=antithetic,
    )  # fmt: skip
    inputs = images(3)
    truth = model.predict_proba(inputs, draws=20_000, seed=0)
    with Batcher(model, inputs[:1]) as batcher:
        found = torch.stack(
            [torch.stack([a.probabilities for a in answers(batcher, inputs, rule)]) for _ in range(300)]
        )
    error = found.std(dim=0) / 300**0.5
    assert ((found.mean(dim=0) - truth).abs() < 4.5 * error + 1e-4).all()
    single = model.predict(inputs, draws=5_000, seed=1).spread
    ratio = float(found.var(dim=0).sum() / (single.square().sum() / 10))
    assert ratio < 0.5 if antithetic else 0.8 < ratio < 1.25


def test_a_rule_of_another_ensemble_is_not_taken() -> None:
    model, _ = ensemble(0.5)
    model.stopping = Calibrated(
        thresholds=(0.0,), epsilon=0.1, delta=0.1, mean_draws=1, disagreement=0.1, images=1, reference_draws=9
    )
    rule = model.stopping
    with Batcher(model, images(1)) as batcher:
        assert answers(batcher, images(2), rule)[1].draws == 1
        next(iter(rse.noise_layers(model.model).values())).std = 0.6
        with pytest.raises(ValueError, match="calibrated on other noise"):
            batcher.submit(images(2), rule)
        assert batcher.waiting == 0


def test_settled_images_leave_and_others_take_their_place() -> None:
    """Clear images are settled after 6 of 10 draws; all share passes though they come one by one."""
    model, probe = ensemble(0.01)
    with Batcher(model, images(1)) as batcher:
        probe.gate.clear()
        probe.started.clear()
        first = batcher.submit(images(2)[1:], Exact(10))
        probe.started.wait(20)
        later = [batcher.submit(images(2)[1:], Exact(10))[0] for _ in range(20)]
        probe.gate.set()
        found = [future.result(20) for future in [*first, *later]]
    assert {answer.draws for answer in found} == {6}
    assert all(int(answer.probabilities.argmax()) == 1 for answer in found)
    assert batcher.passes <= 7  # 21 images of 6 draws each
    assert max(probe.sizes) == 6 * 20  # all draws that are surely wanted in one pass


def test_a_full_queue_refuses_and_loses_nothing() -> None:
    model, probe = ensemble(0.1)
    with Batcher(model, images(1), most_waiting=3) as batcher:
        probe.gate.clear()
        probe.started.clear()
        taken = batcher.submit(images(1), Fixed(10))
        probe.started.wait(20)
        taken += batcher.submit(images(2), Fixed(10))
        with pytest.raises(BusyError, match="2 images wait"):
            batcher.submit(images(2), Fixed(10))
        taken += batcher.submit(images(1), Fixed(10))
        probe.gate.set()
        assert all(future.result(20).draws == 10 for future in taken)


def test_closing_ends_what_was_taken_and_takes_no_more() -> None:
    model, _ = ensemble(0.1)
    batcher = Batcher(model, images(1))
    taken = batcher.submit(images(100), Fixed(10))
    batcher.close()
    assert not wait(taken, timeout=0).not_done
    with pytest.raises(ClosedError):
        batcher.submit(images(1), Fixed(10))
    batcher.close()


def test_failures_are_told_to_those_concerned() -> None:
    model, probe = ensemble(0.1)
    with Batcher(model, images(1)) as batcher:
        spoiled = images(3)
        spoiled[1] = 10
        first, second, third = batcher.submit(spoiled, Fixed(3))
        assert (first.result(20).draws, third.result(20).draws) == (3, 3)
        with pytest.raises(ValueError, match="NaN"):
            second.result(20)
        probe.broken = True
        (failed,) = batcher.submit(images(1), Fixed(3))
        with pytest.raises(RuntimeError, match="out of order"):
            failed.result(20)
        probe.broken = False
        (fine,) = batcher.submit(images(1), Fixed(3))
        assert fine.result(20).draws == 3
        for wrong in (images(1)[:, :, :2], images(1)[0], images(1).long()):
            with pytest.raises((ValueError, TypeError)):
                batcher.submit(wrong, Fixed(3))
