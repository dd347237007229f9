"""The program's global random states, of the CPU and of every device, stand as they did."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from selfensemble.evaluation.doctor import examination
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
