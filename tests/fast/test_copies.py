"""An optimised copy and its original stay one: saved, moved, made static, examined and attacked together."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from selfensemble.attacks import pgd
from selfensemble.attacks.driver import attacked
from selfensemble.ensemble.stopping import Calibrated
from selfensemble.evaluation.doctor.noise_checks import nothing_hidden
from selfensemble.evaluation.doctor.subject import Subject
from selfensemble.evaluation.identity import model_record
from selfensemble.evaluation.protocol import load_protocol
from selfensemble.evaluation.results import CheckRecord
from selfensemble.evaluation.runner import Evaluation
from selfensemble.fast.optimize import FastEnsemble, original_of
from selfensemble.noise.injection import make_static_, set_levels_
from selfensemble.report.card import model_card

PRECISIONS = ("float32", "bf16")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = rse.load_data("digits", "test")
    return data.inputs(slice(40)), data.labels[:40]


def copied(images: Tensor, precision: str = "bf16") -> FastEnsemble:
    return rse.optimize(rse.load("digits-rse"), images, precision)  # type: ignore[arg-type]


def answers(ensemble: rse.SelfEnsemble, images: Tensor) -> Tensor:
    return ensemble.predict(images, draws=4, seed=3).probabilities


def _train(ensemble: rse.SelfEnsemble) -> None:
    with torch.no_grad():
        next(ensemble.parameters()).add_(0.05)


def _hook(ensemble: rse.SelfEnsemble) -> None:
    ensemble.model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


PARTED: dict[str, Callable[[FastEnsemble], object]] = {
    "trained on": lambda fast: _train(fast.original),
    "copy changed": _train,
    "a hook": lambda fast: _hook(fast.original),
    "without noise": lambda fast: rse.remove_noise_(fast.original.model),
}


@pytest.mark.parametrize("how", PARTED)
def test_a_copy_of_what_its_original_is_no_more(
    digits: tuple[Tensor, Tensor], tmp_path: Path, how: str
) -> None:
    """What is saved, exported or attacked is the original; what answers is the copy."""
    images, labels = digits[0][:4], digits[1][:4]
    fast = copied(images, "float32")
    assert rse.validate(fast, images) == rse.validate(fast.model, images) == []
    pgd(fast, images, labels, eps=0.1, steps=1)
    PARTED[how](fast)
    uses: list[Callable[[], object]] = [
        lambda: rse.save(fast, tmp_path / "saved"),
        lambda: fast.save_pretrained(tmp_path / "saved"),
        lambda: rse.export_onnx(fast, tmp_path / "saved", images),
        lambda: pgd(fast, images, labels, eps=0.1, steps=1),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="an optimised copy and its original differ in their"):
            use()
    assert not (tmp_path / "saved").exists()
    assert "other-original" in {issue.rule for issue in rse.validate(fast, images)}
    again = rse.optimize(fast.original, images, "float32")
    rse.save(again, tmp_path / "saved")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", [False, True])
def test_a_saved_copy_is_its_original(
    digits: tuple[Tensor, Tensor], tmp_path: Path, precision: str, method: bool
) -> None:
    """With the draws and the rule of the copy, to which they may have been given."""
    fast = copied(digits[0], precision)
    rule = Calibrated(
        thresholds=(0.9, 0.5), epsilon=0.1, delta=0.05, mean_draws=1.5, disagreement=0.01, images=200,
        reference_draws=200, precision=fast.precision, antithetic=False,
    )  # fmt: skip
    fast.draws, fast.stopping = 7, rule
    fast.save_pretrained(tmp_path) if method else rse.save(fast, tmp_path)
    loaded = rse.SelfEnsemble.from_pretrained(tmp_path) if method else rse.load(tmp_path)
    assert torch.equal(answers(loaded, digits[0]), answers(fast.original, digits[0]))
    assert (loaded.draws, loaded.stopping) == (7, fast.stopping)
    assert fast.original.draws == 20
    again = rse.optimize(loaded, digits[0], precision)  # type: ignore[arg-type]
    torch.testing.assert_close(answers(again, digits[0]), answers(fast, digits[0]))


def test_a_copy_of_your_own_network_loads_into_yours(
    tiny: nn.Sequential, images: Tensor, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(tiny)
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.3, 0.1))
    rse.save(rse.optimize(ensemble, images, "float32"), tmp_path)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(answers(rse.load(tmp_path, fresh), images), answers(ensemble, images))


def test_a_pushed_copy_is_its_original(
    digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, seen = copied(digits[0]), []

    def push(folder: Path, name: str, **options: object) -> str:
        seen.append(answers(rse.load(folder), digits[0]))
        return name

    monkeypatch.setattr("selfensemble.artefacts.upload.push", push)
    fast.push_to_hub("me/copy")
    assert torch.equal(seen[0], answers(fast.original, digits[0]))


def test_a_network_with_a_copy_inside_is_not_saved(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    fast = copied(digits[0])
    for model in (fast.model, nn.Sequential(fast)):
        with pytest.raises(ValueError, match="part of this network is an optimised copy"):
            rse.save(rse.SelfEnsemble(model), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_networks_of_ours_are_known_by_what_they_were_made_of(tmp_path: Path) -> None:
    """And no longer, once anything but noise was changed in them."""
    made = rse.create_model("small-cnn", channels=1, width=0.25, activation="brelu")
    rse.save(rse.SelfEnsemble(copy.deepcopy(made)), tmp_path)
    architecture = read_config(tmp_path).architecture
    assert architecture is not None
    expected = {"name": "small-cnn", "classes": 10, "channels": 1, "width": 0.25, "activation": "brelu"}
    assert architecture.model_dump() == expected
    assert isinstance(made, nn.Sequential)
    made[2] = nn.GELU()  # of which no weight tells
    rse.save(rse.SelfEnsemble(made), tmp_path)
    assert read_config(tmp_path).architecture is None


def whole(fast: FastEnsemble) -> nn.Module:
    return fast


def network(fast: FastEnsemble) -> nn.Module:
    return fast.model


def wrapped(fast: FastEnsemble) -> nn.Module:
    return nn.Sequential(nn.Identity(), fast)


@pytest.mark.parametrize("part", [whole, network, wrapped])
def test_noise_is_changed_in_both(
    digits: tuple[Tensor, Tensor], part: Callable[[FastEnsemble], nn.Module]
) -> None:
    fast = copied(digits[0])
    both = (fast, fast.original)
    with rse.noise_disabled(part(fast)):
        assert not any(each.is_random for each in both)
    assert all(each.is_random for each in both)
    set_levels_(part(fast), rse.NoiseConfig(0.3, 0.05))
    for each in both:
        assert [layer.std for layer in rse.noise_layers(each).values()] == [0.3, 0.05, 0.05, 0.05]
    torch.testing.assert_close(*(answers(each, digits[0]) for each in both), atol=0.05, rtol=0)
    other = copy.deepcopy(fast)
    make_static_(part(fast))
    assert not any(each.is_random for each in both)
    assert all(each.is_random for each in (other, other.original))
    rse.remove_noise_(part(other))
    assert not any(each.is_random for each in (other, other.original))
    assert rse.noise_layers(other.original) == {}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attacks_on_a_static_copy_meet_no_noise(digits: tuple[Tensor, Tensor], precision: str) -> None:
    images, labels = digits
    static = make_static_(copied(images, precision))
    with attacked(static) as (decide, follow):
        assert follow is not None
        for forward in (decide, follow):
            assert torch.equal(forward(images), forward(images))
    base = make_static_(rse.load("digits-rse"))
    found = pgd(static, images, labels, eps=0.2, steps=10, seed=1)
    assert isinstance(static, rse.SelfEnsemble)
    assert isinstance(base, rse.SelfEnsemble)
    fooled = [base.predict(each).label != labels for each in (images, found)]
    assert fooled[1].sum() > fooled[0].sum() + 10
    # Half precision may see images on the boundary otherwise.
    assert (fooled[1] != (static.predict(found).label != labels)).sum() <= 2 * (precision == "bf16")


def noisy_alone(fast: FastEnsemble) -> None:
    make_static_(fast.original)


def static_alone(fast: FastEnsemble) -> None:
    for layer in rse.noise_layers(fast).values():
        layer.std = 0.0


def other_levels(fast: FastEnsemble) -> None:
    next(iter(rse.noise_layers(fast).values())).std = 0.1


@pytest.mark.parametrize("change", [noisy_alone, static_alone, other_levels])
def test_noise_of_one_alone_is_an_error(
    digits: tuple[Tensor, Tensor], tmp_path: Path, change: Callable[[FastEnsemble], None]
) -> None:
    """Which levels an attack or a file would be of could only be guessed."""
    fast = copied(digits[0])
    change(fast)
    with pytest.raises(ValueError, match="differ in their noise"):
        pgd(fast, *digits, steps=1)
    with pytest.raises(ValueError, match="differ in their noise"):
        rse.save(fast, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def subject(model: nn.Module, digits: tuple[Tensor, Tensor]) -> Subject:
    return Subject(
        model, *digits, norm="linf", eps=0.1, steps=2, eot=2, images=10, expect_random=True, max_batch=40,
        seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_doctor_sees_what_a_copy_is_of(digits: tuple[Tensor, Tensor], precision: str) -> None:
    """Nothing is hidden in it; but an original that has learned since, or lost its noise, is found."""
    fast = copied(digits[0], precision)

    def found(model: nn.Module = fast) -> CheckRecord:
        with rse.noise_draw(0):
            return nothing_hidden(subject(model, digits))

    assert found().passed
    assert found(nn.Sequential(fast).eval()).passed
    before = copy.deepcopy(fast)
    weight = fast.original.get_parameter("model.16.weight")
    few = weight.data.view(-1)[1:20]  # written where nobody looks, without a word to torch
    few *= -50
    record = found()
    assert record.passed is False
    assert "logits differ" in record.figure
    with torch.no_grad():
        weight.mul_(-1)
    record = found()
    assert record.passed is False
    assert "differ in their weights" in record.advice
    noisy_alone(before)
    record = found(before)
    assert record.passed is False
    assert "differ in their noise" in record.advice


def test_moving_a_copy_moves_its_original(digits: tuple[Tensor, Tensor]) -> None:
    fast = copied(digits[0])
    nn.Sequential(fast).to("meta")
    for each in (fast, fast.original):
        assert {tensor.device.type for tensor in each.parameters()} == {"meta"}
    fast = copied(digits[0])
    fast.original.to("meta")
    with pytest.raises(ValueError, match="is on cpu and its original on meta"):
        pgd(fast, *digits, steps=1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_copy_keeps_its_precision(digits: tuple[Tensor, Tensor], precision: str) -> None:
    fast = copied(digits[0], precision)
    before, dtypes = answers(fast, digits[0]), [tensor.dtype for tensor in fast.parameters()]
    for convert in (fast.double, fast.half, lambda: fast.to(torch.float64)):
        with pytest.raises(ValueError, match="convert its original"):
            convert()
    if precision == "bf16":
        with pytest.raises(ValueError, match="convert its original"):
            fast.float()
    assert [tensor.dtype for tensor in fast.parameters()] == dtypes
    assert fast.original.input_dtype == torch.float32
    assert torch.equal(answers(fast.to("cpu"), digits[0]), before)


def test_a_copy_takes_no_other_weights(digits: tuple[Tensor, Tensor]) -> None:
    fast, before = copied(digits[0]), rse.load("digits-rse")
    state = copy.deepcopy(fast.state_dict())
    fast.load_state_dict(state)  # its own
    state["model.network.16.weight"] *= 2
    for wrong in (state, before.state_dict()):
        with pytest.raises(ValueError, match="load them into the original"):
            fast.load_state_dict(wrong)
    outer = nn.Sequential(fast)
    with pytest.raises(ValueError, match="load them into the original"):
        outer.load_state_dict({f"0.{key}": value for key, value in state.items()})
    torch.testing.assert_close(answers(fast, digits[0]), answers(before, digits[0]), atol=0.02, rtol=0)


def test_a_copy_of_a_copy_is_of_the_original(digits: tuple[Tensor, Tensor]) -> None:
    first = copied(digits[0])
    first.draws = 3
    second = rse.optimize(first, digits[0], "float32")
    assert original_of(second) is first.original
    assert second.draws == 3
    torch.testing.assert_close(answers(second, digits[0]), answers(first.original, digits[0]))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_of_both_are_independent(
    digits: tuple[Tensor, Tensor], again: Callable[[FastEnsemble], FastEnsemble]
) -> None:
    fast = copied(digits[0])
    other = again(fast)
    assert torch.equal(answers(other, digits[0]), answers(fast, digits[0]))
    make_static_(other)
    assert all(each.is_random for each in (fast, fast.original))
    assert not any(each.is_random for each in (other, other.original))
    state = fast.state_dict()
    state["model.network.16.weight"] = state["model.network.16.weight"] + 1
    with pytest.raises(ValueError, match="load them into the original"):
        other.load_state_dict(state)


def test_a_record_is_of_the_original_and_says_the_precision(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """And a folder with answers of the one takes none of the other."""
    data = rse.load_data("digits", "test")
    ensemble = rse.load("digits-rse")
    fast = rse.optimize(ensemble, digits[0], "bf16")
    ours, theirs = (model_record(each, "x", None) for each in (fast, ensemble))
    assert theirs.precision == "float32"
    assert ours == theirs.model_copy(update={"precision": "bf16"})
    attacks = [{"attack": "fgsm", "title": "FGSM", "eps": 0.1}]
    protocol = load_protocol("paper", {"images": 20, "attacks": attacks, "judge": {"seeds": 3, "queries": 3}})
    results = Evaluation(fast, data, protocol, tmp_path / "run", name="digits-rse").run()
    assert "answered by its optimised copy in bf16" in model_card(
        "digits-rse", read_config("digits-rse"), [results]
    )
    with pytest.raises(ValueError, match=r"differs in model\.precision"):
        Evaluation(ensemble, data, protocol, tmp_path / "run", name="digits-rse")


def test_validate_looks_at_the_original(tiny: nn.Sequential, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.3, 0.1))
    assert (
        rse.validate(rse.optimize(ensemble, images, "bf16"), images) == rse.validate(ensemble, images) == []
    )
