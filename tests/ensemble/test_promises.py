"""Calibrated rules keep to what they were calibrated on, and are refused everywhere else."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import selfensemble as rse
from selfensemble.artefacts import storage
from selfensemble.artefacts.config import Architecture
from selfensemble.ensemble import fingerprint as fingerprints
from selfensemble.ensemble.fingerprint import fingerprint
from selfensemble.ensemble.stopping import Calibrated
from selfensemble.noise.injection import attach_noise_, set_levels_
from selfensemble.noise.learned import learn_noise_, learned_layers
from selfensemble.noise.resize_pad import ResizePadConfig, ResizePadNetwork

RESIZED = ResizePadConfig(smallest=7, largest=8)
SMALL = Architecture(name="small-cnn", classes=10, channels=1, width=0.25)


def early(precision: str = "float32") -> Calibrated:
    """Two draws at most; says nothing of what it was calibrated on."""
    return Calibrated(
        thresholds=(0.5, 0.0), epsilon=0.1, delta=0.05, mean_draws=1.5, disagreement=0.05, images=500,
        reference_draws=200, precision=precision,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def ensemble(tiny: nn.Module) -> rse.SelfEnsemble:
    found = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.3, 0.2), draws=10).eval()
    found.stopping = early()
    return found


def small(draws: int = 10) -> rse.SelfEnsemble:
    """Of the zoo's kind, with batch norm that has seen images; it can be loaded without help."""
    torch.manual_seed(0)
    network = rse.create_model(**SMALL.model_dump())
    with torch.no_grad():
        network.train()(torch.rand(16, 1, 8, 8))
    return rse.SelfEnsemble(network, rse.NoiseConfig(0.3, 0.2), draws=draws).eval()


class Coin(nn.Module):
    """Noise on one pixel x decides, softly, between two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = rse.GaussianNoise(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        value = 4 * self.noise(inputs)
        return torch.cat([value, -value], dim=1)


def test_other_levels_are_refused_and_would_break_the_promise() -> None:
    """2,000 images on both sides of a border, where the infinite ensemble's answer is known.

    At level 1e-3 in both directions, were the share of other answers the promised 5 %.
    """
    generator = torch.Generator().manual_seed(0)
    ensemble = rse.SelfEnsemble(Coin(), bounds=None).eval()
    seen, images = 4 * torch.rand(2, 2000, 1, generator=generator) - 2
    ensemble.stopping = rse.calibrate(ensemble, seen, epsilon=0.05, most=16, seed=0)

    def others() -> int:
        answer = ensemble.predict(images, seed=1, stop="calibrated").label
        return int((answer != (images[:, 0] < 0)).sum())

    assert others() <= stats.binom.ppf(0.999, len(images), 0.05)
    ensemble.model.get_submodule("noise").std = 2.0  # type: ignore[assignment]
    with pytest.raises(ValueError, match="calibrated on other noise than this ensemble has now: calibrate"):
        ensemble.predict(images, stop="calibrated")
    assert ensemble.stopping is not None
    ensemble.stopping = ensemble.stopping.model_copy(update={"fingerprint": None})  # as if nothing were known
    assert others() > stats.binom.ppf(0.999, len(images), 0.05)


def _level(model: nn.Module, std: Any, fqn: str = "3") -> None:
    rse.noise_layers(model)[fqn].std = std


def _weight(ensemble: rse.SelfEnsemble) -> nn.Parameter:
    return ensemble.model.get_parameter("5.weight")


def _step(ensemble: rse.SelfEnsemble) -> None:
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    ensemble.train()(torch.rand(4, 3, 8, 8)).logsumexp(dim=1).sum().backward()
    optimizer.step()
    ensemble.eval()


def _other_network(ensemble: rse.SelfEnsemble) -> None:
    other = copy.deepcopy(ensemble.model)
    nn.init.normal_(other.get_parameter("7.weight"))
    ensemble.model = other


def _statistics(ensemble: rse.SelfEnsemble) -> None:
    with torch.no_grad():
        ensemble.train()(torch.rand(4, 3, 8, 8))
    ensemble.eval()


def _from_file(ensemble: rse.SelfEnsemble) -> None:
    ensemble.load_state_dict({key: value + 1e-3 for key, value in ensemble.state_dict().items()})


def _replaced(ensemble: rse.SelfEnsemble) -> None:
    assert isinstance(ensemble.model, nn.Sequential)
    ensemble.model[2] = nn.GELU()


CHANGES: dict[str, tuple[str, Callable[[rse.SelfEnsemble], object]]] = {
    "levels": ("noise", lambda each: set_levels_(each.model, rse.NoiseConfig(0.3, 0.21))),
    "a level": ("noise", lambda each: _level(each.model, 0.2000001)),
    "a channel": ("noise", lambda each: _level(each.model, (*[0.2] * 7, 0.3))),
    "a level off": ("noise", lambda each: _level(each.model, 0.0)),
    "a layer off": ("noise", lambda each: setattr(rse.noise_layers(each.model)["0"], "enabled", False)),
    "learned": ("noise", lambda each: _level(learn_noise_(each.model, "layer"), 0.3)),
    "no noise": ("noise", lambda each: rse.remove_noise_(each.model)),
    "resize": (
        "noise",
        lambda each: setattr(each, "model", ResizePadNetwork(each.model, RESIZED)),
    ),
    "sampling": ("sampling", lambda each: setattr(each, "sampling", "per_image")),
    "draws": ("ensemble of 10 draws", lambda each: setattr(each, "draws", 5)),
    "training": ("weights", _step),
    "statistics": ("weights", _statistics),
    "state dict": ("weights", _from_file),
    "without torch's notice": ("weights", lambda each: _weight(each).data.mul_(1.01)),
    "by NumPy": ("weights", lambda each: _weight(each).detach().numpy().fill(0.5)),
    "other data": ("weights", lambda each: setattr(_weight(each), "data", _weight(each).data * 1.01)),
    "another network": ("weights", _other_network),
    "another layer": ("weights or layers", _replaced),
    "double precision": ("weights", lambda each: each.double()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fast", [False, True])
def test_what_changed_since_is_refused(
    ensemble: rse.SelfEnsemble, images: Tensor, change: str, fast: bool
) -> None:
    assert ensemble.predict(images, stop="calibrated").draws.max() == 2
    about, change_ = CHANGES[change]
    change_(ensemble)
    images = images.to(_weight(ensemble).dtype) if change == "double precision" else images
    with pytest.raises(ValueError, match=about):
        (rse.optimize(ensemble, images, "float32") if fast else ensemble).predict(images, stop="calibrated")
    assert ensemble.predict(images).label.shape == (6,)
    ensemble.stopping = early()
    assert ensemble.predict(images, stop="calibrated").draws.max() <= 2


def test_it_is_what_an_ensemble_is_that_counts(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    """Copies, other memory, other layouts, and what was changed back are the same ensemble."""
    before = fingerprint(ensemble)
    copies = [
        copy.deepcopy(ensemble),
        pickle.loads(pickle.dumps(ensemble)),
        copy.deepcopy(ensemble).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        rse.optimize(ensemble, images, "float32"),
        copy.deepcopy(rse.optimize(ensemble, images, "float32")),
    ]
    for each in copies:
        assert fingerprint(each) == before
        assert each.predict(images, stop="calibrated").draws.max() <= 2
    weight, value = _weight(ensemble), _weight(ensemble).detach().clone()
    with torch.no_grad():
        weight.zero_()
        assert fingerprint(ensemble) != before
        weight.copy_(value)
    with rse.noise_disabled(ensemble):
        assert fingerprint(ensemble) != before
        with pytest.raises(ValueError, match="other noise"):
            ensemble.predict(images, stop="calibrated")
    rse.noise_layers(ensemble.model)["0"].sampling = "per_image"
    with pytest.raises(ValueError, match="other noise"):
        ensemble.predict(images, stop="calibrated")


class Told(nn.Module):
    """What it computes depends on all kinds of things that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.norm, self.act, self.drop = nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.Dropout(0.5)
        self.scale, self.means = 1.0, [0.5, 0.5, 0.5]
        self.options = {"pool": "mean"}
        self.last: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.act(self.norm(self.early(inputs * self.scale)))
        logits: Tensor = self.last(self.drop(self.late(hidden))).mean(dim=(2, 3))
        return logits


def _dimmed(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 0.3,)


def _told(network: nn.Module, fqn: str, **settings: object) -> None:
    for name, value in settings.items():
        setattr(network.get_submodule(fqn), name, value)


SETTINGS: dict[str, Callable[[nn.Module], object]] = {
    "slope": lambda each: _told(each, "act", negative_slope=0.9),
    "eps": lambda each: _told(each, "norm", eps=1.0),
    "dilation": lambda each: _told(each, "late", dilation=(2, 2), padding=(2, 2)),
    "padding": lambda each: _told(each, "late", padding_mode="circular"),
    "dropout": lambda each: _told(each, "drop", p=0.9),
    "attribute of the whole": lambda each: _told(each, "", scale=0.3),
    "in a list": lambda each: each.means.__setitem__(0, 0.4),  # type: ignore[operator]
    "in a dict": lambda each: each.options.update(pool="max"),  # type: ignore[union-attr, operator]
    "function": lambda each: _told(each, "", last=torch.sigmoid),
    "forward": lambda each: _told(each, "norm", forward=lambda inputs: inputs),
    "hook": lambda each: each.register_forward_pre_hook(_dimmed),
    "hook on a layer": lambda each: each.get_submodule("act").register_forward_hook(lambda *args: None),
    "hook on noise": lambda each: rse.noise_layers(each)["early"].register_forward_hook(lambda *args: None),
    "the first number, by NumPy": lambda each: (
        each.get_parameter("late.weight").detach().numpy()[0, 0].fill(1)
    ),
    "noise elsewhere": lambda each: rse.inject_noise_(
        rse.remove_noise_(each), rse.NoiseConfig(0.3, 0.2), example_inputs=torch.rand(2, 3, 8, 8)
    ),
    "the same levels elsewhere": lambda each: attach_noise_(
        rse.remove_noise_(each), {"early": 0.3, "late": 0.2}
    ),
}


@pytest.mark.filterwarnings("ignore:.* runs before it")  # on purpose: noise moves to another layer
@pytest.mark.parametrize("change", SETTINGS)
@pytest.mark.parametrize("fast", [False, True])
def test_settings_hooks_and_places_count(images: Tensor, change: str, fast: bool) -> None:
    torch.manual_seed(0)
    ensemble = rse.SelfEnsemble(Told().eval(), rse.NoiseConfig(0.3, 0.2), sampling="per_image")
    ensemble.stopping = early()
    form = rse.optimize(ensemble, images, "float32") if fast else ensemble
    assert form.predict(images, stop="calibrated").draws.max() <= 2
    SETTINGS[change](ensemble.model)
    form = rse.optimize(ensemble, images, "float32") if fast else ensemble
    with pytest.raises(ValueError, match="noise" if "where" in change else "weights or layers|noise"):
        form.predict(images, stop="calibrated")


@pytest.mark.filterwarnings("ignore:.* runs before it")
def test_wrappers_and_passes_change_nothing(images: Tensor, tmp_path: Path) -> None:
    ensemble = rse.SelfEnsemble(Told().eval(), rse.NoiseConfig(0.3, 0.2), draws=10)
    before = fingerprint(ensemble)
    network = ensemble.model
    wrappers: list[Any] = [nn.DataParallel(network), torch.compile(network, backend="eager")]
    for wrapped in wrappers:
        ensemble.model = wrapped
        assert fingerprint(ensemble) == before
        wrapped.register_forward_pre_hook(_dimmed)
        assert fingerprint(ensemble) != before
    ensemble.model = network
    rse.certify(ensemble, images, n0=2, n=4)
    rse.validate(network, images)
    ensemble.predict(images, seed=1)
    network.compile(backend="eager")
    network.train(True).train(False)
    assert fingerprint(ensemble) == before
    ensemble.stopping = early()
    rse.save(ensemble, tmp_path)
    assert rse.load(tmp_path, Told()).predict(images, stop="calibrated").draws.max() <= 2


def test_networks_of_transformers_keep_their_rule(tmp_path: Path) -> None:
    config = ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=4
    )
    ensemble = rse.SelfEnsemble(ResNetForImageClassification(config).eval())
    ensemble.stopping = early()
    inputs = torch.rand(2, 3, 16, 16)
    ensemble.save_pretrained(tmp_path / "ours")
    assert rse.load(tmp_path / "ours").predict(inputs, stop="calibrated").draws.max() <= 2
    ensemble.model.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    again = rse.SelfEnsemble(ResNetForImageClassification.from_pretrained(tmp_path / "theirs"))
    again.stopping = ensemble.stopping
    assert again.eval().predict(inputs, stop="calibrated").draws.max() <= 2


class Counted(nn.Module):
    """Changes an attribute in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.passes = nn.Conv2d(3, 4, 3), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        logits: Tensor = self.conv(inputs).mean(dim=(2, 3))
        return logits


def test_a_network_that_changes_itself_is_not_calibrated() -> None:
    ensemble = rse.SelfEnsemble(Counted(), draws=2).eval()
    inputs = torch.rand(200, 3, 4, 4)
    with pytest.raises(ValueError, match=r"change attributes of its modules \(counters"):
        rse.calibrate(ensemble, inputs, epsilon=0.5, reference_draws=2, most=2)
    with pytest.raises(ValueError, match="another one than when its calibration began"):
        rse.conformal_sets(ensemble, inputs, torch.zeros(200, dtype=torch.int64))


def test_memory_that_was_given_back_is_not_mistaken(ensemble: rse.SelfEnsemble) -> None:
    """A new tensor may lie where an old one lay, with as many writings."""
    before = fingerprint(ensemble)
    for _ in range(20):
        _weight(ensemble).data = torch.rand_like(_weight(ensemble))
        assert fingerprint(ensemble) != before


def test_weights_are_read_once(
    ensemble: rse.SelfEnsemble, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble.predict(images, stop="calibrated")

    def again(parts: object) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(fingerprints, "_digest", again)
    ensemble.predict(images, stop="calibrated")
    with torch.no_grad():
        _weight(ensemble).add_(0)
    with pytest.raises(AssertionError, match="read again"):
        ensemble.predict(images, stop="calibrated")


class Scaled(nn.Module):
    """Constants that no state dict holds, as those of a normalisation in front of a pretrained network."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.conv(inputs * self.get_buffer("scale")).mean(dim=(2, 3))
        return logits


def test_unusual_tensors(tmp_path: Path, images: Tensor) -> None:
    """Constants outside of the state dict, expanded and sparse tensors, NaN, tensors of inference mode."""
    ensemble = rse.SelfEnsemble(Scaled(2.0)).eval()
    ensemble.stopping = early()
    rse.save(ensemble, tmp_path)
    assert rse.load(tmp_path, Scaled(2.0)).predict(images, stop="calibrated").draws.max() <= 2
    with pytest.raises(ValueError, match="other weights"):
        rse.load(tmp_path, Scaled(3.0)).predict(images, stop="calibrated")

    buffers = {
        "expanded": torch.ones(()).expand(1000, 1000), "sparse": torch.eye(3).to_sparse(),
        "unknown": torch.full((3,), torch.nan), "empty": torch.ones(0), "view": torch.arange(9.0)[8:],
    }  # fmt: skip
    for name, value in buffers.items():
        ensemble.model.register_buffer(name, value)
    before = fingerprint(ensemble)
    assert fingerprint(ensemble) == before
    ensemble.model.get_buffer("view").data.add_(1)
    assert fingerprint(ensemble) != before
    ensemble.model.register_buffer("sparse", 2 * torch.eye(3).to_sparse())
    assert fingerprint(ensemble) != before
    with torch.inference_mode():
        within = rse.SelfEnsemble(Scaled(2.0)).eval()
        before = fingerprint(within)
        assert fingerprint(within) == before
        within.model.get_parameter("conv.bias").add_(1)
        assert fingerprint(within) != before


# precisions


def test_a_rule_of_one_precision_is_refused_in_another(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    half = rse.optimize(ensemble, images, "bf16")
    with pytest.raises(
        ValueError, match=r"in float32, and this ensemble computes in bf16: predict with the ens"
    ):
        half.predict(images, stop="calibrated")
    half.stopping = early("bf16")
    assert half.predict(images, stop="calibrated").draws.max() <= 2
    ensemble.stopping = half.stopping  # as `selfensemble calibrate` leaves it with the weights
    with pytest.raises(ValueError, match=r"computes in float32: predict with rse.optimize\(\.\.\., 'bf16'\)"):
        ensemble.predict(images, stop="calibrated")
    assert rse.optimize(ensemble, images, "bf16").predict(images, stop="calibrated").draws.max() <= 2


def test_autocast_is_another_precision(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    half = rse.optimize(ensemble, images, "bf16")
    half.stopping = early("bf16")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="computes in bfloat16 by autocast"):
            ensemble.predict(images, stop="calibrated")
        assert half.predict(images, stop="calibrated").draws.max() <= 2
        with pytest.raises(ValueError, match=r"calibrate outside of torch\.autocast"):
            rse.calibrate(ensemble, torch.rand(200, 3, 8, 8))


def test_an_optimised_copy_is_of_the_weights_it_was_made_of(
    ensemble: rse.SelfEnsemble, images: Tensor
) -> None:
    fast = rse.optimize(ensemble, images, "float32")
    with torch.no_grad():
        _weight(ensemble).mul_(2)
    assert fast.predict(images, stop="calibrated").draws.max() <= 2
    set_levels_(fast.model, rse.NoiseConfig(0.5, 0.2))
    with pytest.raises(ValueError, match="other noise"):
        fast.predict(images, stop="calibrated")
    set_levels_(fast.model, rse.NoiseConfig(0.3, 0.2))
    assert fast.predict(images, stop="calibrated").draws.max() <= 2
    with torch.no_grad():
        next(fast.parameters()).mul_(2)
    with pytest.raises(ValueError, match="other weights"):
        fast.predict(images, stop="calibrated")


def test_sampling_of_one_prediction(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    """Calibration draws noise of each image's own, so that a prediction may."""
    for sampling in ("shared", "per_image"):
        assert ensemble.predict(images, stop="calibrated", sampling=sampling).draws.max() <= 2
    own = rse.SelfEnsemble(ensemble.model, draws=10, sampling="per_image").eval()
    own.stopping = early()
    assert own.predict(images, stop="calibrated").draws.max() <= 2
    with pytest.raises(ValueError, match="sampling='per_image': leave sampling out"):
        own.predict(images, stop="calibrated", sampling="shared")


def test_what_is_no_rule(ensemble: rse.SelfEnsemble) -> None:
    for wrong in ("exact", 0.5, {"thresholds": [0.0]}):
        with pytest.raises(TypeError, match=r"what rse.calibrate returns"):
            ensemble.stopping = wrong  # type: ignore[assignment]
        with pytest.raises(TypeError, match=r"attribute `rule`"):
            ensemble.sets = wrong  # type: ignore[assignment]
    assert ensemble.stopping is not None


# on disk


def _widened(folder: Path) -> Path:
    """A saved ensemble of the architecture of digits-rse with weights of its own."""
    architecture = SMALL.model_copy(update={"width": 1.0})
    other = rse.SelfEnsemble(rse.create_model(**architecture.model_dump()))
    rse.save(other, folder, architecture=architecture)
    return folder


def test_a_rule_is_saved_with_what_it_is_about(tmp_path: Path, images: Tensor) -> None:
    ensemble = small()
    ensemble.stopping = early()
    rse.save(ensemble, tmp_path, architecture=SMALL)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = rse.load(tmp_path)
    assert loaded.stopping == ensemble.stopping
    grey = images[:, :1]
    assert loaded.predict(grey, stop="calibrated").draws.max() <= 2
    set_levels_(ensemble.model, rse.NoiseConfig(0.4, 0.2))
    with pytest.raises(ValueError, match=r"other noise than would be saved .* ensemble.stopping = None"):
        rse.save(ensemble, tmp_path, architecture=SMALL)
    with pytest.raises(ValueError, match="other noise"):
        ensemble.save_pretrained(tmp_path, architecture=SMALL)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    with pytest.raises(ValueError, match=r"dtype= rounds the weights.*ensemble.stopping = None"):
        rse.save(loaded, tmp_path, architecture=SMALL, dtype=torch.bfloat16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    storage.copy_weights_("digits-rse", trained := rse.load("digits-rse"))
    trained.stopping = early()
    with torch.no_grad():
        next(trained.parameters()).mul_(2)
    for source, allowed in (("digits-rse", True), (_widened(tmp_path / "wide"), False)):
        storage.copy_weights_(source, trained)
        if allowed:
            assert trained.predict(grey, stop="calibrated").draws.max() <= 2
        else:
            with pytest.raises(ValueError, match="other weights"):
                trained.predict(grey, stop="calibrated")


def test_learned_levels_are_those_that_are_saved(tmp_path: Path) -> None:
    ensemble, grey = small(), torch.rand(4, 1, 8, 8)
    learn_noise_(ensemble.model, "channel")
    ensemble.stopping = early()
    assert ensemble.predict(grey, stop="calibrated").draws.max() <= 2
    rse.save(ensemble, tmp_path, architecture=SMALL)
    assert rse.load(tmp_path).predict(grey, stop="calibrated").draws.max() <= 2
    with torch.no_grad():
        learned_layers(ensemble.model)[1].raw[0].add_(0.01)
    with pytest.raises(ValueError, match="other noise"):
        ensemble.predict(grey, stop="calibrated")


def test_rounded_weights_round_to_themselves(tmp_path: Path) -> None:
    ensemble = small()
    rse.save(ensemble, tmp_path, architecture=SMALL, dtype=torch.bfloat16)
    rounded = rse.load(tmp_path)
    rounded.stopping = early()
    rse.save(rounded, tmp_path, architecture=SMALL, dtype=torch.bfloat16)
    assert rse.load(tmp_path).predict(torch.rand(2, 1, 8, 8), stop="calibrated").draws.max() <= 2


def test_early_folders_are_bound_to_what_they_hold(tmp_path: Path) -> None:
    """A rule without a fingerprint, as it was saved before there were any."""
    ensemble, grey = small(), torch.rand(4, 1, 8, 8)
    rse.save(ensemble, tmp_path, architecture=SMALL)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("sets")
    rule = early().model_dump(mode="json")
    config["stopping"] = {key: rule[key] for key in rule if key not in ("fingerprint", "draws")}
    path.write_text(json.dumps(config))
    loaded = rse.load(tmp_path)
    assert loaded.stopping is not None
    assert loaded.stopping.fingerprint == fingerprint(ensemble)
    assert loaded.predict(grey, stop="calibrated").draws.max() <= 2
    set_levels_(loaded.model, rse.NoiseConfig(0.3, 0.3))
    with pytest.raises(ValueError, match="other noise"):
        loaded.predict(grey, stop="calibrated")


def test_a_folder_takes_no_rule_of_another(tmp_path: Path) -> None:
    ensemble = small()
    rse.save(ensemble, tmp_path, architecture=SMALL)
    before = (tmp_path / "config.json").read_bytes()
    with torch.no_grad():
        next(ensemble.parameters()).mul_(2)
    ensemble.stopping = early()
    assert ensemble.stopping is not None
    with pytest.raises(ValueError, match="other weights or layers than"):
        storage.save_stopping(tmp_path, ensemble.stopping)
    assert (tmp_path / "config.json").read_bytes() == before
    # A configuration that was copied to other weights.
    config = json.loads(before)
    config["stopping"] = ensemble.stopping.model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other weights"):
        rse.load(tmp_path).predict(torch.rand(2, 1, 8, 8), stop="calibrated")
