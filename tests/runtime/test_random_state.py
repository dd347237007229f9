"""The program's global random states, of the CPU and of every device, stand as they did."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import selfensemble as rse
from selfensemble import attacks
from selfensemble.evaluation import doctor
from selfensemble.evaluation.doctor import examination
from selfensemble.noise.own_numbers import OwnNumbers
from selfensemble.runtime.random_state import kept_random_state

from ..public_calls import CALLS, case, trained

SOURCE = Path(__file__).parents[2] / "src" / "selfensemble"
CALLED = (
    "certify", "validate", "inject", "optimize", "pgd", "judge", "judge, a network", "doctor", "of a library",
)  # fmt: skip


class Accelerator:
    """Two devices, which `torch.manual_seed` seeds as it does those that it knows."""

    def __init__(self) -> None:
        self.states = [torch.tensor([number]) for number in (1, 2)]
        self.module = SimpleNamespace(
            device_count=lambda: len(self.states),
            get_rng_state=lambda number: self.states[number],
            set_rng_state=self.put,
            is_available=lambda: False,  # for Accelerate
        )

    def put(self, state: torch.Tensor, number: int) -> None:
        self.states[number] = state


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    fake, seed_cpu = Accelerator(), torch.manual_seed

    def manual_seed(seed: int) -> torch.Generator:
        fake.states = [torch.tensor([seed % 1000])] * 2
        return seed_cpu(seed)

    monkeypatch.setattr(torch, "lazy", fake.module, raising=False)
    monkeypatch.setattr(torch, "manual_seed", manual_seed)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("lazy")
    )
    torch.get_device_module.cache_clear()  # it remembers
    yield fake
    torch.get_device_module.cache_clear()
    assert [int(state) for state in fake.states] == [1, 2]


def test_seeds_within_are_forgotten(accelerator: Accelerator) -> None:
    for device in (None, torch.device("cpu"), torch.device("lazy", 1)):
        before = torch.get_rng_state()
        with kept_random_state(device):
            torch.manual_seed(5)
            assert [int(state) for state in accelerator.states] == [5, 5]
        assert torch.equal(torch.get_rng_state(), before)
        assert [int(state) for state in accelerator.states] == [1, 2]


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("name", CALLED)
def test_calls_leave_the_states_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {key: examination.CHECKS[key] for key in ("logits", "frozen noise falls")}
    monkeypatch.setattr(examination, "CHECKS", checks)
    c = case(tmp_path)
    before = torch.get_rng_state()
    CALLS[name](c)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("accelerator")
def test_training_leaves_the_states_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    trained("plain", tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_nobody_keeps_them_in_another_way() -> None:
    keepers = [path for path in SOURCE.rglob("*.py") if "fork_rng(" in path.read_text()]
    assert keepers == [SOURCE / "runtime" / "random_state.py"]


X = torch.linspace(0.1, 2, 24).view(2, 3, 4)
OPERATORS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3),
    "randn_like": lambda: torch.randn_like(X),
    "randint": lambda: torch.randint(2, 90, (3,)),
    "randint_like": lambda: torch.randint_like(X, 90),
    "randperm": lambda: torch.randperm(20),
    "normal": lambda: torch.normal(X, 2.0),
    "multinomial": lambda: torch.multinomial(X[0], 2),
    "exponential_": lambda: functional.gumbel_softmax(X),
    "dropout": lambda: functional.dropout(X, 0.3),
    "native_dropout": lambda: torch.cat([each.float() for each in torch.native_dropout(X, 0.3, True)]),
    "feature_dropout": lambda: functional.dropout1d(X, 0.3),
    "alpha_dropout": lambda: functional.alpha_dropout(X, 0.3, training=True),
    "rrelu": lambda: functional.rrelu(-X, training=True),
    "fractional_max_pool2d": lambda: functional.fractional_max_pool2d(
        X.view(1, 2, 12), (1, 2), output_size=(1, 4)
    ),
    "attention": lambda: functional.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "lstm": lambda: nn.LSTM(4, 2, num_layers=2, dropout=0.5, batch_first=True)(X)[0],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_own_numbers_are_those_of_a_seed(name: str) -> None:
    with kept_random_state():
        torch.manual_seed(11)
        expected = [OPERATORS[name]().detach() for _ in range(2)]
    before = torch.get_rng_state()
    with OwnNumbers(11) as numbers:
        found = [OPERATORS[name]().detach() for _ in range(2)]
    assert all(torch.allclose(one, other) for one, other in zip(expected, found, strict=True))
    assert not torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers.drew


def test_operators_that_draw_nothing_take_no_numbers() -> None:
    with OwnNumbers() as numbers:
        functional.rrelu(-X)
        functional.scaled_dot_product_attention(X, X, X)
        functional.dropout(X, training=False)
        torch.rand(3, generator=torch.Generator().manual_seed(1))
    assert not numbers.drew


class Beside(nn.Module):
    """While it computes, another thread draws from torch's global generator."""

    drawn: ClassVar[list[Tensor]] = []

    def __init__(self, p: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: self.drawn.append(torch.rand(3)))
        thread.start()
        thread.join()
        hidden = (
            functional.dropout(self.net[:3](inputs), self.p, training=True)
            if self.p
            else self.net[:3](inputs)
        )
        out: Tensor = self.net[3](hidden)
        return out


BESIDE: dict[str, tuple[float, Callable[[rse.SelfEnsemble, Tensor, Tensor], object]]] = {
    "seeded": (0.3, lambda e, x, y: e.predict(x, seed=1)),
    "decide": (0.3, lambda e, x, y: rse.decide(e, x, max_draws=20, seed=1)),
    "judge": (0.3, lambda e, x, y: rse.judge(e, x, x, y, queries=3)),
    "judge, a network": (0.3, lambda e, x, y: rse.judge(e.model, x, x, y, queries=3, seed=1)),
    "doctor": (0.3, lambda e, x, y: doctor(e, x, y, steps=1, eot=1, images=5)),
    "predict": (0.0, lambda e, x, y: e.predict(x)),
    "optimize": (0.0, lambda e, x, y: rse.optimize(e, x, "float32")),
    "validate": (0.0, lambda e, x, y: rse.validate(e.model, x)),
    "certify": (0.0, lambda e, x, y: rse.certify(e, x[:1], n0=5, n=20)),
    "pgd": (0.3, lambda e, x, y: attacks.pgd(e, x, y, steps=1, eot=2)),
    "pgd, a network": (0.0, lambda e, x, y: attacks.pgd(e.model, x, y, steps=1, eot=2)),
    "inject": (0.0, lambda e, x, y: rse.inject_noise_(rse.remove_noise_(e.model), example_inputs=x)),
}


@pytest.mark.parametrize("name", BESIDE)
def test_other_threads_never_get_the_same_numbers_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {key: examination.CHECKS[key] for key in ("logits", "randomness")}
    monkeypatch.setattr(examination, "CHECKS", checks)
    (p, call), data = BESIDE[name], rse.load_data("digits", "test")
    Beside.drawn.clear()
    ensemble = rse.SelfEnsemble(Beside(p).eval(), rse.NoiseConfig(0, 0) if p else rse.NoiseConfig(0.3, 0.1))
    for _ in range(2):
        call(ensemble, data.inputs(slice(40)), data.labels[:40])
    drawn = torch.stack(Beside.drawn)
    assert len(drawn) > 1
    assert len(drawn.unique(dim=0)) == len(drawn)
