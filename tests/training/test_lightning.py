"""Checkpoints of Lightning hold the noise, and bring it back or fail."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import selfensemble as rse
from selfensemble.noise.learned import learn_noise_

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
lightning_api = pytest.importorskip("selfensemble.lightning")

# Lightning's own: few workers, no logger, folders that are not empty.
pytestmark = pytest.mark.filterwarnings("ignore")
LEVELS = {"0": 0.31, "3": 0.07, "7": 0.07, "10": 0.07}  # of the small CNN, by module
KEYS = {f"network.{name}.gaussian_noise.std" for name in LEVELS}


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """As a user's; noise comes from the callback, or is put in where it is built."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.network = rse.create_model("small-cnn", channels=1, width=0.125)
        if noisy:
            rse.inject_noise_(self.network)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def loader() -> Iterator[Any]:
    data = rse.load_data("digits", "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield DataLoader(TensorDataset(data.inputs(slice(16)), data.labels[:16]), batch_size=8)


def trainer(*used: Any, epochs: int = 1) -> Any:
    return lightning.Trainer(
        max_epochs=epochs, callbacks=list(used), logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", enable_checkpointing=any(
            isinstance(each, callbacks.Checkpoint) for each in used
        ),
    )  # fmt: skip


def levels(module: Any) -> dict[str, object]:
    return {fqn: layer.std for fqn, layer in rse.noise_layers(module.network).items()}


def trained(loader: Any, *others: Any) -> tuple[Any, Any, Any]:
    module = Classifier()
    defense = lightning_api.RandomSelfEnsemble(module.network, rse.NoiseConfig(0.31, 0.07))
    run = trainer(defense, *others)
    run.fit(module, loader, loader)
    return module, defense, run


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("by", ["ModelCheckpoint", "save_checkpoint", "EMAWeightAveraging"])
def test_a_checkpoint_brings_its_noise_back(loader: Any, tmp_path: Path, by: str, weights_only: bool) -> None:
    """Callbacks are not asked about checkpoints of weights alone; an average replaces the state dict."""
    others = []
    if by == "ModelCheckpoint":
        others = [callbacks.ModelCheckpoint(tmp_path, "run", save_weights_only=weights_only)]
    elif by == "EMAWeightAveraging":
        if not hasattr(callbacks, by):
            pytest.skip("this Lightning has none")
        others = [callbacks.EMAWeightAveraging()]
    keys = list(Classifier().state_dict())
    module, _, run = trained(loader, *others)
    path = tmp_path / "run.ckpt"
    if by != "ModelCheckpoint":
        run.save_checkpoint(path, weights_only=weights_only)
    assert list(module.state_dict()) == keys  # outside of checkpoints it is what it was
    assert torch.load(path, weights_only=False)["state_dict"].keys() == {*keys, *KEYS}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*network\.0\.gaussian_noise\.std"):
        Classifier.load_from_checkpoint(path)
    again = Classifier.load_from_checkpoint(path, noisy=True)
    assert levels(again) == LEVELS
    ensemble, other = (rse.SelfEnsemble(each.network.eval()) for each in (module, again))
    if by != "EMAWeightAveraging":
        images = next(iter(loader))[0]
        torch.testing.assert_close(
            ensemble.predict_proba(images, seed=1), other.predict_proba(images, seed=1)
        )


@pytest.mark.parametrize(
    "wrong",
    [lambda labels: labels[:, None], lambda labels: torch.eye(10)[labels], lambda labels: labels + 10],
)
def test_labels_that_are_no_class_numbers_are_refused(wrong: Any) -> None:
    """(B, 1) would be compared with each image's label, and log about a tenth."""
    data = rse.load_data("digits", "test")
    images, labels = data.inputs(slice(40)), data.labels[:40]
    module = Classifier()

    class InAColumn(lightning_api.RandomSelfEnsemble):  # type: ignore[misc, name-defined]
        def batch_of(self, batch: Any) -> Any:
            return batch[0], batch[1][:, 0]

    def validated(kind: Any, labels: Tensor) -> float:
        run = trainer(kind(module.network))
        loader = DataLoader(TensorDataset(images, labels), batch_size=10)
        run.validate(module, loader, verbose=False)
        return float(run.callback_metrics["val_ensemble_accuracy"])

    with torch.no_grad():  # always class 3
        last: Any = next(each for each in reversed(list(module.network.modules())) if hasattr(each, "bias"))
        last.weight.zero_()
        last.bias.copy_(torch.eye(10)[3])
    expected = float((labels == 3).float().mean())
    assert validated(lightning_api.RandomSelfEnsemble, labels.to(torch.int32)) == pytest.approx(expected)
    assert validated(InAColumn, labels[:, None]) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"labels must be .*override batch_of"):
        validated(lightning_api.RandomSelfEnsemble, wrong(labels))


def test_a_run_is_resumed_with_the_noise_of_its_checkpoint(loader: Any, tmp_path: Path) -> None:
    module, defense, run = trained(loader)
    rse.noise_layers(module.network)["3"].std = (0.1, 0.2, 0.3, 0.4)
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    fresh = Classifier()
    other = lightning_api.RandomSelfEnsemble(fresh.network)
    trainer(other, epochs=2).fit(fresh, loader, loader, ckpt_path=path)
    assert levels(fresh) == LEVELS | {"3": (0.1, 0.2, 0.3, 0.4)}
    assert other.ensemble.is_random
    # By torch alone, after the callback has put the noise in.
    fresh = Classifier()
    lightning_api.RandomSelfEnsemble(fresh.network)
    fresh.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    assert levels(fresh) == levels(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.on_save_checkpoint.module is twin
    assert defense.ensemble.model is module.network


def test_noise_in_other_places_is_refused(loader: Any, tmp_path: Path) -> None:
    _, _, run = trained(loader)
    run.save_checkpoint(tmp_path / "all.ckpt", weights_only=True)
    module = Classifier()
    rse.inject_noise_(module.network, filter_fn=lambda module, fqn: fqn == "0")
    defense = lightning_api.RandomSelfEnsemble(module.network)
    with pytest.raises(RuntimeError, match=r"Unexpected.*network\.3\.gaussian_noise\.std"):
        trainer(defense).validate(module, loader, ckpt_path=tmp_path / "all.ckpt", verbose=False)
    run = trainer(defense)
    run.validate(module, loader, verbose=False)
    run.save_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    with pytest.raises(RuntimeError, match=r"Missing.*network\.3\.gaussian_noise\.std"):
        Classifier.load_from_checkpoint(tmp_path / "one.ckpt", noisy=True)
    # Weights alone, as torch saves them, say nothing of noise and go into both.
    weights = Classifier().state_dict()
    for noisy in (True, False):
        Classifier(noisy).load_state_dict(weights)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (torch.tensor(-0.1), "finite and >= 0"),
        (torch.tensor(float("nan")), "finite and >= 0"),
        (torch.zeros(0), "got none"),
        (torch.zeros(2, 2), "must be a number"),
    ],
)
def test_levels_that_are_none_are_refused(saved: Tensor, message: str) -> None:
    layer = rse.GaussianNoise(0.2)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({"std": saved})
    assert layer.std == 0.2


def test_learned_levels_are_not_set_by_constants(loader: Any, tmp_path: Path) -> None:
    """They are in every state dict; each kind of checkpoint goes into a network of its kind alone."""
    module, _, run = trained(loader)
    run.save_checkpoint(tmp_path / "fixed.ckpt", weights_only=True)
    learn_noise_(module.network, "layer")
    run.save_checkpoint(tmp_path / "learned.ckpt", weights_only=True)
    fixed, learned = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=False)["state_dict"]
        for name in ("fixed", "learned")
    )
    assert {key for key in learned if "gaussian_noise" in key} == {
        key.replace(".std", ".raw") for key in KEYS
    }
    with pytest.raises(RuntimeError, match=r"gaussian_noise\.raw"):
        module.load_state_dict(fixed)
    with pytest.raises(RuntimeError, match=r"gaussian_noise\.raw"):
        Classifier(noisy=True).load_state_dict(learned)
    module.load_state_dict(learned)


def test_a_network_of_another_module_is_refused(loader: Any) -> None:
    run = trainer(lightning_api.RandomSelfEnsemble(Classifier().network))
    with pytest.raises(ValueError, match=r"not part of Classifier.*module\.network"):
        run.fit(Classifier(), loader)
