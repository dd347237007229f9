"""Labels of any integer type, wherever they lie, are those of int64 beside the images; others are refused."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import selfensemble as rse
from selfensemble.data.labels import class_numbers
from selfensemble.data.sources import load_data
from selfensemble.evaluation.doctor import examination
from selfensemble.noise.streams import noise_draw
from selfensemble.training import batches
from selfensemble.training.defenses import (
    Adversarial,
    CrossEntropy,
    Defense,
    FgsmRetraining,
    Networks,
    Trades,
)  # fmt: skip

from .emulated_device import DEVICE, emulated_device
from .public_calls import ATTACKING, JUDGING, RECIPE, Case, case, plain, usual

LABELLED = ATTACKING | {name: call for name, call in JUDGING.items() if name != "certification"}
CPU = torch.device("cpu")
INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "uint8": lambda labels: labels.to(torch.uint8),
    "int32, elsewhere": lambda labels: labels.to(torch.int32).to(DEVICE),
}
# What is no labels of 12 images of 10 classes.
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda labels: labels > 4,
    "float": lambda labels: labels.float(),
    "complex": lambda labels: labels.to(torch.complex64),
    "a column": lambda labels: labels[:, None],
    "one-hot": lambda labels: torch.nn.functional.one_hot(labels, 10),
    "too few": lambda labels: labels[:4],
    "negative": lambda labels: labels - 10,
    "beyond int64": lambda labels: (labels - 20).to(torch.uint64),
    "too large": lambda labels: labels + 10,
    "no values": lambda labels: labels.to("meta"),
    "a list": lambda labels: labels.tolist(),
}
DEFENSES: dict[str, Defense] = {
    "cross-entropy": CrossEntropy(draws=2, label_smoothing=0.1, consistency=1.0),
    "adversarial": Adversarial(steps=2),
    "trades": Trades(steps=2),
    "fgsm-retraining": FgsmRetraining(),
    "temperature": CrossEntropy(temperature=3.0),
}


@pytest.fixture(autouse=True)
def _few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("input range", "gradients", "frozen noise falls")
    monkeypatch.setattr(examination, "CHECKS", {name: examination.CHECKS[name] for name in names})


@pytest.fixture
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with emulated_device(monkeypatch):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LABELLED)
def test_any_integers_are_labels(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, other = usual(name), case(tmp_path)
    with emulated_device(monkeypatch) if "elsewhere" in kind else nullcontext():
        other.labels = KINDS[kind](other.labels)
        assert plain(LABELLED[name](other)) == expected


@pytest.mark.parametrize("name", LABELLED)
def test_what_is_no_labels_is_refused(name: str, tmp_path: Path) -> None:
    c = case(tmp_path)
    right = c.labels
    for wrong in WRONG.values():
        c.labels = wrong(right)
        with pytest.raises((ValueError, TypeError), match="labels"):
            LABELLED[name](c)
    assert list(tmp_path.iterdir()) == []


def loss_of(defense: Defense, c: Case, labels: Any) -> Tensor:
    ensemble = copy.deepcopy(c.ensemble).train()
    torch.manual_seed(3)
    with noise_draw(3):
        return defense.loss(Networks(ensemble, ensemble), c.inputs, labels)


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("name", DEFENSES)
def test_losses_take_any_integers(name: str, tmp_path: Path) -> None:
    c = case(tmp_path)
    expected = loss_of(DEFENSES[name], c, c.labels)
    assert expected.item() > 0
    for kind in KINDS.values():
        assert torch.equal(loss_of(DEFENSES[name], c, kind(c.labels)), expected)
    for wrong in WRONG.values():
        with pytest.raises((ValueError, TypeError), match="labels"):
            loss_of(DEFENSES[name], c, wrong(c.labels))


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_class_numbers(dtype: torch.dtype) -> None:
    labels = torch.tensor([3, 0, 7])
    for given in (labels.to(dtype), labels.to(dtype)[:0]):
        found = class_numbers(given, len(given), device=CPU, classes=8)
        assert found.dtype == torch.int64
        assert torch.equal(found, labels[: len(given)])
    assert class_numbers(labels.to(dtype), 3, device=CPU).tolist() == [3, 0, 7]
    assert class_numbers(labels.to(dtype), 3, device=DEVICE).device == DEVICE
    with pytest.raises(ValueError, match="labels must be below 7, the number of classes; got 7"):
        class_numbers(labels.to(dtype), 3, device=CPU, classes=7)
    assert class_numbers(labels.to(dtype), 3, device=CPU, classes=7, look=False).tolist() == [3, 0, 7]


def test_one_label_is_not_a_batch_of_them() -> None:
    for labels in (torch.tensor(3), torch.tensor([[3]])):
        with pytest.raises(ValueError, match=r"of shape \(1,\)"):
            class_numbers(labels, 1, device=CPU)


def test_labels_that_are_right_are_not_copied() -> None:
    labels = torch.tensor([1, 0])
    assert class_numbers(labels, 2, device=CPU, classes=2) is labels


@pytest.mark.usefixtures("_device")
def test_image_data_have_labels_beside_the_images() -> None:
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([2, 0, 1])
    for kind in KINDS.values():
        data = rse.ImageData("own", images, kind(labels), ("a", "b", "c"))
        assert data.labels.device == CPU
        assert torch.equal(data.labels, labels)
        assert data.with_classes(("c", "b", "a", "d")).labels.tolist() == [0, 2, 1]
    there = rse.ImageData("own", images.to(DEVICE), labels, ("a", "b", "c"))
    assert there.labels.device == DEVICE
    with pytest.raises(ValueError, match="labels must be below 2, the number of classes; got 2"):
        rse.ImageData("own", images, labels, ("a", "b"))


def test_training_on_labels_of_another_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[dict[str, Tensor]] = []
    for kind in (lambda labels: labels, KINDS["uint8"]):

        def own(source: Any, split: Any, *, kind: Any = kind, **reading: Any) -> rse.ImageData:
            data = load_data(source, split, **reading)
            return rse.ImageData(data.name, data.images, kind(data.labels), data.classes)

        monkeypatch.setattr(batches, "load_data", own)
        trainer = rse.Trainer(rse.Recipe.model_validate(RECIPE), tmp_path / str(len(weights)))
        trainer.run()
        weights.append(dict(trainer.ensemble.state_dict()))
    assert plain(weights[0]) == plain(weights[1])


def test_labels_that_the_network_does_not_know_are_found_at_once(tmp_path: Path) -> None:
    """Before an attack, or a training at each level, not in the shard that has them."""
    c = case(tmp_path)
    twelve = rse.ImageData("own", c.data.images, torch.arange(12) % 12, tuple("abcdefghijkl"))
    with pytest.raises(ValueError, match="labels must be below 10"):
        JUDGING["evaluation"](_With(c, twelve))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
    started: list[object] = []
    with pytest.raises(ValueError, match="labels must be below 10"):
        rse.tune(c.ensemble, c.inputs, twelve.labels, fine_tune=lambda each: started.append(each))
    assert started == []


class _With:
    def __init__(self, c: Case, data: rse.ImageData) -> None:
        self.ensemble, self.data, self.folder = c.ensemble, data, c.folder
