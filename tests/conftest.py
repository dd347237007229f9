"""Networks with known answers, and awkward ones."""

import importlib.util
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfensemble.evaluation.doctor import examination
from selfensemble.noise import entropy, own_numbers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell's background job ignores Ctrl-C, and so would every process that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _isolated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fixed numbers, noise without a seed included, and no file outside the test's own folders."""
    torch.manual_seed(0)
    own, numbers = os.getpid(), random.Random(request.node.nodeid)

    def urandom(count: int) -> bytes:  # a forked child has the system's
        return numbers.randbytes(count) if os.getpid() == own else os.urandom(count)

    for module in (entropy, own_numbers):
        monkeypatch.setattr(module, "urandom", urandom)
    entropy.entropy.forget()
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra `browser`")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


_of_torchvision: list[torch.library.Library] = []


@pytest.fixture
def torchvision() -> None:
    """Where it is installed, of whichever build, it can be imported: it asks for two of its operators."""
    found = importlib.util.find_spec("torchvision")
    known = "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms")
    if known or found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(str(next(Path(found.origin).parent.glob("_C*.so"))))
    except (OSError, StopIteration):  # it is for another build of PyTorch
        _of_torchvision.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _of_torchvision[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture
def fewer_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor without checks that only attack for longer, or by attacks that have tests of their own."""
    left = ("twice the steps", "twice the restarts", "twice the draws", "black box is weaker")
    fewer = {name: check for name, check in examination.CHECKS.items() if name not in left}
    monkeypatch.setattr(examination, "CHECKS", fewer)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: PICTURES keeps them, docs/assets those of the documentation."""
    return Path(os.environ.get("PICTURES", tmp_path))


def serious_faults(page: Any) -> list[str]:
    """What axe finds on a page that keeps people out."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {each['nodes'][0]['html'][:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


@pytest.fixture
def tiny() -> nn.Sequential:
    """Three convolutions of 8x8 colour images, grouped and strided ones among them; eval mode."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 5),
    ).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Aliased(nn.Module):
    """One convolution under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = self.first
        self.head = nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(inputs)).mean(dim=(2, 3)))
        return out


class RootConv(nn.Conv2d):
    """A convolution that is the whole model: logits are its outputs averaged over space."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).mean(dim=(2, 3))


class OutOfOrder(nn.Module):
    """Registers the layer that sees the image last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 5, 1)
        self.stem = nn.Conv2d(3, 4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.inner(self.stem(inputs)).mean(dim=(2, 3))
        return out


class Functional(nn.Module):
    """Calls a convolution as a function, which no hook can see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.conv2d(self.stem(inputs), self.weight).mean(dim=(2, 3))


class LinearClassifier(nn.Module):
    """Two classes; logits (a.x + b, 0). The L2 distance to the boundary is |a.x + b| / ||a||."""

    def __init__(self, features: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(features, generator=generator))
        self.b = nn.Parameter(-self.a.detach().sum() / 2)

    def value(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1) @ self.a + self.b

    def forward(self, inputs: Tensor) -> Tensor:
        value = self.value(inputs)
        return torch.stack([value, torch.zeros_like(value)], dim=1)


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parent / "golden"
