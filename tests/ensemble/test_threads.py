"""One ensemble, many threads: what one call wants of it is no other call's."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import selfensemble as rse
from selfensemble import attacks
from selfensemble.evaluation import doctor

THREADS, CALLS = 8, 120


class Peeking(nn.Module):
    """Notes the mode of every pass, and knows which are of a training loop."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net(inputs)
        return out


@pytest.fixture
def ensemble() -> rse.SelfEnsemble:
    torch.manual_seed(1)
    net = Peeking()
    data = rse.load_data("digits", "train")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for step in range(60):
        part = slice(step * 16 % 1280, step * 16 % 1280 + 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data.inputs(part)), data.labels[part]).backward()
        optimizer.step()
    return rse.SelfEnsemble(net.eval(), rse.NoiseConfig(0.3, 0.1), draws=4)


@pytest.fixture
def digits() -> tuple[Tensor, Tensor]:
    data = rse.load_data("digits", "test")
    return data.inputs(slice(16)), data.labels[:16]


def works(ensemble: rse.SelfEnsemble, x: Tensor, y: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    """Calls of every public function that takes a network."""
    few, own = x[:4], y[:4]
    number = iter(range(10_000))
    off = rse.noise_disabled

    def without_noise() -> None:
        with off(ensemble):
            one, other = ensemble.predict(few).probabilities, ensemble.predict(few).probabilities
        assert torch.equal(one, other)

    return {
        "predict": lambda: ensemble.predict(x),
        "seeded": lambda: ensemble.predict(x, seed=3, sampling="per_image"),
        "forward": lambda: ensemble(few),
        "decide": lambda: rse.decide(ensemble, few, max_draws=20),
        "certify": lambda: rse.certify(ensemble, few[:2], n0=10, n=40),
        "judge": lambda: rse.judge(ensemble, few, few, own, queries=2),
        "conformal": lambda: rse.conformal_sets(ensemble, x, y, alpha=0.4),
        "without noise": without_noise,
        "optimize": lambda: rse.optimize(ensemble, few, "float32").predict(few),
        "validate": lambda: rse.validate(ensemble.model, few),
        "save": lambda: rse.save(ensemble, folder / str(next(number))),
        "pgd": lambda: attacks.pgd(ensemble, few, own, steps=2, eot=2),
        "transfer": lambda: attacks.transfer(ensemble, few, own, attack=attacks.pgd, steps=2),
        "cw": lambda: attacks.cw_l2(ensemble, few, own, steps=2, binary_search_steps=1),
        "doctor": lambda: doctor(ensemble, x, y, steps=1, eot=1, images=5),
    }


def in_threads(calls: Iterator[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """What a call must leave as it was."""
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for module in model.modules()
    ]
    tensors = [tensor.clone() for tensor in model.state_dict().values()]
    return hooks, tensors, [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", ["in eval mode", "in train mode", "optimised"])
@pytest.mark.usefixtures("fewer_checks")
def test_every_function_from_eight_threads(
    ensemble: rse.SelfEnsemble, digits: tuple[Tensor, Tensor], tmp_path: Path, kind: str
) -> None:
    ensemble.train(kind == "in train mode")
    if kind == "optimised":
        ensemble = rse.optimize(ensemble, digits[0][:4])
    work = works(ensemble, *digits, tmp_path)
    if kind == "in train mode":
        del work["forward"], work["doctor"]  # a step of training; and the doctor says so
    if kind == "optimised":
        del work["optimize"]  # it is already
    names = [name for name in work if name != "doctor"] * CALLS
    chosen = names[: CALLS - 4] + ["doctor"] * (4 if "doctor" in work else 0)
    before = state_of(ensemble)
    in_threads(work[name] for name in chosen)
    after = state_of(ensemble)
    assert before[0] == after[0]
    assert all(torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]
    assert ensemble.is_random
    answers = [ensemble.predict(digits[0], draws=1).probabilities for _ in range(2)]
    assert not torch.equal(*answers)


def test_answers_beside_others_are_distributed_as_alone(
    ensemble: rse.SelfEnsemble, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """Two-sample Kolmogorov-Smirnov of the answer of single draws to three images, level 1e-4 each."""
    x, _ = digits
    ensemble.train()
    work = works(ensemble, *digits, tmp_path)
    others = ["decide", "without noise", "certify", "validate", "optimize", "transfer", "conformal"]
    ending = threading.Event()

    def disturb(name: str) -> None:
        while not ending.is_set():
            work[name]()

    def single() -> Tensor:
        return torch.stack([ensemble.predict(x[:3], draws=1).probabilities.amax(dim=1) for _ in range(400)])

    alone = single()
    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(disturb, name) for name in others]
        try:
            beside = single()
        finally:
            ending.set()
        for each in running:
            each.result()
    assert len(beside.unique()) > 1000  # no answer without its noise twice
    for one, other in zip(alone.T, beside.T, strict=True):
        assert stats.ks_2samp(one.numpy(), other.numpy()).pvalue > 1e-4


def test_noise_is_off_in_its_own_thread_alone(
    ensemble: rse.SelfEnsemble, digits: tuple[Tensor, Tensor]
) -> None:
    x, _ = digits

    @contextmanager
    def elsewhere() -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(1) as pool:
            yield pool

    with elsewhere() as pool, rse.noise_disabled(ensemble):
        assert not ensemble.is_random
        assert pool.submit(lambda: ensemble.is_random).result()
        assert float(pool.submit(lambda: ensemble.predict(x).spread.max()).result()) > 0
        assert float(ensemble.predict(x).spread.max()) == 0
        with rse.noise_disabled(ensemble):  # once more, and the outer one goes on
            pass
        assert not ensemble.is_random
    assert ensemble.is_random


class Interrupted(nn.Module):
    """In each pass another thread does something."""

    meanwhile: ClassVar[Callable[[], object]] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten())
        self.last = nn.Linear(256, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        thread = threading.Thread(target=type(self).meanwhile)
        thread.start()
        thread.join()
        out: Tensor = self.last(self.net(inputs))
        return out


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_is_set_beside_a_prediction_holds(
    digits: tuple[Tensor, Tensor], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def meanwhile() -> None:
        own.train(training)
        seen.append(own.training)

    monkeypatch.setattr(Interrupted, "meanwhile", staticmethod(meanwhile))
    own = rse.SelfEnsemble(Interrupted(), rse.NoiseConfig(0.3, 0.1), draws=2)
    own.train(not training)
    before = [buffer.clone() for buffer in own.buffers()]
    own.predict(digits[0])
    assert seen.count(training) == len(seen) > 0
    assert all(module.training == training for module in own.modules())
    assert all(torch.equal(one, other) for one, other in zip(before, own.buffers(), strict=True))
    network = own.model
    if training:  # of a network that is no ensemble, train() alone can be seen
        monkeypatch.setattr(Interrupted, "meanwhile", staticmethod(network.train))
        network.eval()
        rse.judge(network, digits[0], digits[0], digits[1], queries=1)
        assert all(module.training for module in network.modules())


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_copies_made_beside_calls_are_in_train_mode_as_their_original(
    digits: tuple[Tensor, Tensor], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[rse.SelfEnsemble] = []

    def meanwhile() -> None:
        as_pickle = kind == "pickle"
        made.append(pickle.loads(pickle.dumps(own)) if as_pickle else copy.deepcopy(own))

    monkeypatch.setattr(Interrupted, "meanwhile", staticmethod(meanwhile))
    own = rse.SelfEnsemble(Interrupted(), rse.NoiseConfig(0.3, 0.1), draws=1)
    frozen = own.get_parameter("model.last.weight").requires_grad_(False)
    own.predict(digits[0])
    attacks.pgd(own, *digits, steps=1, eot=1)
    assert len(made) > 2
    for each in made:
        assert all(module.training for module in each.modules())
        wanted = {name for name, parameter in each.named_parameters() if parameter.requires_grad}
        assert wanted == {name for name, parameter in own.named_parameters() if parameter is not frozen}


class Merging(nn.Conv2d):
    """A low-rank adapter that `eval()` merges into the weights, as loralib's do."""

    def __init__(self) -> None:
        super().__init__(1, 4, 3, padding=1)
        self.weight.requires_grad_(False)
        self.adapter = nn.Parameter(0.1 * torch.ones(4, 9))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if self.merged == mode:
            sign = -1 if mode else 1
            self.weight.data += sign * self.adapter.detach().view_as(self.weight)
            self.merged = not mode
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight if self.merged else self.weight + self.adapter.view_as(self.weight)
        return nn.functional.conv2d(inputs, weight, self.bias, padding=1)


def test_modules_whose_train_acts_come_back_by_it(digits: tuple[Tensor, Tensor]) -> None:
    adapter = Merging()
    ensemble = rse.SelfEnsemble(nn.Sequential(adapter, nn.Flatten(), nn.Linear(256, 10)))
    before = adapter.weight.clone()
    merged: list[bool] = []
    adapter.register_forward_hook(lambda module, args, output: merged.append(adapter.merged))
    ensemble.predict(digits[0])
    assert all(merged)
    assert not adapter.merged
    assert torch.allclose(adapter.weight, before, atol=1e-6)
    nn.functional.cross_entropy(ensemble(digits[0]), digits[1]).backward()
    assert adapter.adapter.grad is not None
    assert adapter.adapter.grad.any()


def test_a_train_of_its_own_has_the_last_word(digits: tuple[Tensor, Tensor]) -> None:
    """Over the modes of what is below it, and none over those of an ensemble there."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ensemble = rse.SelfEnsemble(Interrupted(), draws=1)

        def train(self, mode: bool = True) -> "Whole":
            super().train(mode)
            self.ensemble.model.get_submodule("net.1").eval()  # its batch norm is frozen
            return self

        def forward(self, inputs: Tensor) -> Tensor:
            seen.append([module.training for module in self.ensemble.model.modules()])
            out: Tensor = self.ensemble.draw_logits(inputs)
            return out

    seen: list[list[bool]] = []
    whole = Whole().train()
    before = [module.training for module in whole.modules()]
    assert before.count(False) == 1
    rse.judge(whole, digits[0], digits[0], digits[1], queries=1)
    assert not any(map(any, seen))
    assert [module.training for module in whole.modules()] == before


def test_a_compiled_network_is_switched_off_when_it_runs(
    ensemble: rse.SelfEnsemble, digits: tuple[Tensor, Tensor]
) -> None:
    compiled: Any = torch.compile(ensemble.model, fullgraph=True, backend="eager")
    x, _ = digits
    with torch.no_grad():
        assert not torch.equal(compiled(x), compiled(x))
        with rse.noise_disabled(ensemble):
            assert torch.equal(compiled(x), compiled(x))
        assert not torch.equal(compiled(x), compiled(x))
