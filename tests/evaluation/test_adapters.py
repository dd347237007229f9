import importlib.util
import math
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks.budget import count_evaluations
from selfensemble.evaluation.adapters import (
    LibraryAttack,
    adv_lib_attack,
    art_attack,
    autoattack_attack,
    foolbox_attack,
    torchattacks_attack,
)

from ..conftest import LinearClassifier

EPS = 0.05
PIXELS = 3 * 4 * 4
MODULES: dict[str, Callable[..., LibraryAttack]] = {
    "torchattacks": torchattacks_attack,
    "foolbox": foolbox_attack,
    "art": art_attack,
    "adv_lib": adv_lib_attack,
    "autoattack": lambda name, **settings: autoattack_attack(version=name, **settings),
}
NO_TARGETS = {("foolbox", "FGSM"), ("torchattacks", "APGD"), ("autoattack", "rand")}
Make = Callable[[], LibraryAttack]


def case(library: str, name: str, **settings: Any) -> Any:
    """An attack to build in the test; skipped where the library is not installed."""

    def make() -> LibraryAttack:
        # adv-lib where torchvision is missing, which it needs.
        pytest.importorskip("adv_lib.attacks" if library == "adv_lib" else library, exc_type=ImportError)
        return MODULES[library](name, **settings)

    return pytest.param(make, id=f"{library}-{name}")


@pytest.fixture
def linear() -> LinearClassifier:
    return LinearClassifier(PIXELS)


@pytest.fixture
def inner() -> Tensor:
    """Images so far from black and white that no attack here meets the box."""
    return 0.4 + 0.2 * torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def random_states() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy)


def classes_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        labels: Tensor = model(images).argmax(dim=1)
    return labels


@pytest.mark.parametrize(
    "make",
    [
        case("torchattacks", "FGSM", eps=EPS),
        case("torchattacks", "PGD", eps=EPS, alpha=EPS / 4, steps=20),
        case("torchattacks", "APGD", eps=EPS, steps=10),
        case("foolbox", "FGSM", eps=EPS),
        case("foolbox", "LinfPGD", eps=EPS, steps=20, abs_stepsize=EPS / 4),
        case("art", "FastGradientMethod", eps=EPS),
        case("art", "ProjectedGradientDescent", eps=EPS, eps_step=EPS / 4, max_iter=20, num_random_init=1),
        case("adv_lib", "pgd_linf", ε=EPS, steps=40, relative_step_size=0.25),
        case("autoattack", "rand", eps=EPS, steps=10, eot=1),
    ],
)
@pytest.mark.parametrize("targeted", [False, True])
def test_linf_budget(make: Make, linear: LinearClassifier, inner: Tensor, targeted: bool) -> None:
    attack = make()
    labels = classes_of(linear, inner)
    goals = 1 - labels if targeted else labels
    if targeted and (attack.library, attack.name) in NO_TARGETS:
        with pytest.raises(ValueError, match=r"targeted|criterion"):
            attack(linear, inner, goals, targeted=True, seed=0)
        return
    found = attack(linear, inner, goals, targeted=targeted, seed=0)
    sign = torch.where(labels == 0, -1.0, 1.0)
    best = linear.value(inner) + sign * EPS * linear.a.abs().sum()
    # APGD keeps the point that fooled first, which need not be the farthest.
    if attack.name in ("APGD", "rand"):
        assert (found - inner).abs().amax() <= EPS + 1e-6
        reachable = best * sign > 0
        assert (classes_of(linear, found) != labels)[reachable].all()
    else:
        torch.testing.assert_close(linear.value(found), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        case("torchattacks", "DeepFool", overshoot=0.005),
        case("foolbox", "DDNAttack", steps=100, init_epsilon=0.5, gamma=0.1),
        case("foolbox", "L2DeepFoolAttack", overshoot=0.005),
        case("foolbox", "L2CarliniWagnerAttack", steps=100, binary_search_steps=6, initial_const=0.1),
        case("adv_lib", "ddn", steps=100, init_norm=0.5, γ=0.1, levels=None),
        case("adv_lib", "sdf"),
        case("art", "DeepFool", batch_size=8, epsilon=1e-2),
        case("art", "CarliniL2Method", batch_size=8, max_iter=30, initial_const=0.5),
    ],
)
def test_smallest_distance(make: Make, linear: LinearClassifier, inner: Tensor) -> None:
    labels = classes_of(linear, inner)
    found = make()(linear, inner, labels, seed=0)
    assert (classes_of(linear, found) != labels).all()
    with torch.no_grad():
        smallest = linear.value(inner).abs() / linear.a.norm()
    distance = (found - inner).flatten(1).norm(dim=1)
    assert (distance >= smallest * 0.999).all()
    assert (distance <= smallest * 1.1 + 1e-3).all()


@pytest.mark.parametrize(
    ("make", "gradients", "forwards"),
    [
        (*case("torchattacks", "PGD", steps=3).values, 3, 0),
        (*case("torchattacks", "Square", n_queries=4, p_init=0.5).values, 0, None),
        (*case("foolbox", "LinfPGD", eps=EPS, steps=3).values, 3, 1),
        (*case("foolbox", "L2CarliniWagnerAttack", steps=2, binary_search_steps=1).values, 2, 1),
        (*case("art", "ProjectedGradientDescent", eps=EPS, eps_step=EPS, max_iter=3).values, 3, None),
        (*case("art", "SquareAttack", eps=EPS, max_iter=2).values, 0, None),
        (*case("adv_lib", "fmn", norm=2, steps=3).values, 3, 0),
    ],
)
def test_ensemble(
    make: Make, gradients: int, forwards: int | None, tiny: nn.Sequential, images: Tensor
) -> None:
    attack = make()
    ensemble = rse.SelfEnsemble(tiny, draws=3).train()
    next(tiny.parameters()).requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in ensemble.parameters()]
    buffers = {name: value.clone() for name, value in ensemble.state_dict().items()}
    labels = classes_of(ensemble.eval(), images)
    ensemble.train()
    seed_everything(5)
    before = random_states()
    with count_evaluations() as spent:
        first = attack(ensemble, images, labels, eot=2, seed=1)
    assert random_states() == before
    assert spent.gradients == gradients * 2 * len(images)
    if forwards is not None:
        assert spent.forwards == forwards * 2 * len(images)
    assert spent.forwards % 2 == 0

    assert ensemble.training
    assert [parameter.requires_grad for parameter in ensemble.parameters()] == trainable
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in ensemble.state_dict().items())
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert 0 <= first.min() <= first.max() <= 1

    seed_everything(6)
    assert torch.equal(attack(ensemble, images, labels, eot=2, seed=1), first)


@pytest.mark.parametrize(
    "make",
    [
        case("torchattacks", "PGD"),
        case("foolbox", "LinfPGD", eps=EPS),
        case("art", "ProjectedGradientDescent", eps=EPS, max_iter=3, num_random_init=1),
    ],
)
def test_other_seed_and_batches(make: Make, tiny: nn.Sequential, images: Tensor) -> None:
    attack, labels = make(), torch.zeros(len(images), dtype=torch.int64)
    first = attack(tiny, images, labels, seed=1)
    assert not torch.equal(attack(tiny, images, labels, seed=2), first)
    assert attack(tiny, images, labels, seed=1, max_batch=4).shape == images.shape
    assert attack(tiny, images[:0], labels[:0]).shape == images[:0].shape
    assert attack(tiny, images.double(), labels, seed=1).dtype == torch.float64
    with pytest.raises(ValueError, match="number of classes"):
        attack(tiny, images, labels + 5)


NAMES = {"torchattacks": "PGD", "foolbox": "LinfPGD", "art": "ProjectedGradientDescent", "adv_lib": "fmn"}


@pytest.mark.parametrize("library", NAMES)
def test_unknown_names_and_settings(library: str) -> None:
    pytest.importorskip("adv_lib.attacks" if library == "adv_lib" else library, exc_type=ImportError)
    make, name = MODULES[library], NAMES[library]
    with pytest.raises(ValueError, match=rf"no attack 'Nothing'.*known: .*{name}"):
        make("Nothing")
    with pytest.raises(ValueError, match=r"no setting nothing; known: .*(steps|max_iter)"):
        make(name, nothing=1)
    wrong = {"torchattacks": "model", "foolbox": "epsilon", "art": "targeted", "adv_lib": "targeted"}[library]
    with pytest.raises(ValueError, match=f"no setting {wrong}"):
        make(name, **{wrong: True})


def test_the_published_autoattack_says_what_it_has() -> None:
    pytest.importorskip("autoattack")
    with pytest.raises(ValueError, match="a norm of linf, l2, l1 and a version of rand"):
        autoattack_attack(norm="l7", eps=EPS)
    with pytest.raises(ValueError, match="not 'linf' and 'quick'"):
        autoattack_attack(version="quick", eps=EPS)
    with pytest.raises(ValueError, match="eps must be"):
        autoattack_attack(eps=-1)


def test_the_published_autoattack_averages_over_passes(tiny: nn.Sequential, images: Tensor) -> None:
    pytest.importorskip("autoattack")
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.1, 0.1), draws=3).eval()
    labels = ensemble.predict(images, seed=0).label
    attack = autoattack_attack(norm="l2", eps=1.5, steps=3, eot=4)
    with count_evaluations() as spent:
        found = attack(ensemble, images, labels, seed=0)
    assert spent.gradients % 4 == 0
    # Both parts begin with a gradient and take 3 steps, on the images that are left.
    assert 0 < spent.gradients <= 2 * 4 * 4 * len(images)
    assert (found - images).flatten(1).norm(dim=1).max() <= 1.5 * (1 + 1e-5)
    assert torch.equal(attack(ensemble, images, labels, seed=0), found)


def test_foolbox_eps() -> None:
    pytest.importorskip("foolbox")
    with pytest.raises(ValueError, match="fixed budget: give eps"):
        foolbox_attack("LinfPGD")
    with pytest.raises(ValueError, match="eps must be"):
        foolbox_attack("DDNAttack", eps=math.nan)


def test_foolbox_failure_is_the_original(linear: LinearClassifier, inner: Tensor) -> None:
    pytest.importorskip("foolbox")
    labels = classes_of(linear, inner)
    with torch.no_grad():
        smallest = float((linear.value(inner).abs() / linear.a.norm()).min())
    found = foolbox_attack("DDNAttack", eps=smallest / 2, steps=10)(linear, inner, labels)
    assert torch.equal(found, inner)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 2, 2)])
def test_foolbox_takes_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    pytest.importorskip("foolbox")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    inputs = torch.rand(5, *shape)
    labels = classes_of(model, inputs)
    found = foolbox_attack("DDNAttack", steps=20)(model, inputs, labels)
    assert found.shape == inputs.shape
    assert (classes_of(model, found) != labels).all()


def test_attacks_without_targets(tiny: nn.Sequential, images: Tensor) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    for library, name in (("torchattacks", "DeepFool"), ("art", "SquareAttack")):
        if importlib.util.find_spec(library):
            with pytest.raises(ValueError, match=f"{name} has no targeted mode"):
                MODULES[library](name)(tiny, images, labels, targeted=True)


def test_probabilities_where_asked(tiny: nn.Sequential, images: Tensor) -> None:
    pytest.importorskip("art")
    attack = art_attack("SimBA", attack="px", max_iter=3, epsilon=0.1)
    assert attack(tiny, images[:2], classes_of(tiny, images[:2]), seed=0).shape == images[:2].shape


@pytest.mark.parametrize("library", MODULES)
def test_missing_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [each for each in sys.modules if each.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"{library} cannot be imported.*pip install"):
        MODULES[library]("PGD", eps=EPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * math.nan, "returned NaN"),
        (lambda x: x + 1, "outside"),
        (lambda x: x[:1], "returned shape"),
    ],
)
def test_images_are_checked(
    change: Callable[[Tensor], Tensor], message: str, tiny: nn.Sequential, images: Tensor
) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    attack = LibraryAttack("art", "Fake", {}, lambda model, x, *others: change(x))
    with pytest.raises(ValueError, match=message):
        attack(tiny, images, labels)


def test_rounding_is_clamped_and_passes_are_counted(tiny: nn.Sequential, images: Tensor) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)

    def run(model: nn.Module, x: Tensor, *others: object) -> Tensor:
        leaf = x.clone().requires_grad_()
        model(leaf)  # a graph that nobody uses
        logits = model(leaf)
        for k in range(3):
            torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)
        warnings.warn_explicit("old", DeprecationWarning, "file", 1, module="foolbox.attacks.blur")
        return x + 1e-5

    with count_evaluations() as spent:
        found = LibraryAttack("foolbox", "Fake", {}, run)(tiny, images, labels)
    assert found.max() <= 1
    assert (spent.gradients, spent.forwards) == (3 * len(images), len(images))
