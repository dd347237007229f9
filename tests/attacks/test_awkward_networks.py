"""Networks and inputs that are flat, huge, tiny, broken, or in half precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble import attacks
from selfensemble.attacks.driver import looks_like_probabilities
from selfensemble.attacks.leads import fooled
from selfensemble.attacks.losses import LossName
from selfensemble.attacks.norms import Norm, ascent, size
from selfensemble.attacks.units import rounded_towards

Attack = Callable[..., Tensor]
LABELS = torch.zeros(12, dtype=torch.int64)


class Skewed(nn.Module):
    """A linear network of 64 pixels, which a grey image leaves at an L1 distance of some 3.6."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weights = torch.linspace(1, 2, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        value: Tensor = self.scale * (((inputs.flatten(1) - 0.5) * self.weights).sum(dim=1) - 7)
        return torch.stack([-value, value], dim=1)


def grey(count: int = 12) -> Tensor:
    return torch.full((count, 1, 8, 8), 0.5)


def is_fooled(model: nn.Module, images: Tensor) -> Tensor:
    wrong: Tensor = model(images).argmax(dim=1) != LABELS[: len(images)]
    return wrong


def test_l1_attacks_use_their_radius_where_the_best_pixels_are_at_the_end_of_the_box() -> None:
    nearest = attacks.fmn(Skewed(), grey(2), LABELS[:2], norm="l1", seed=0)
    distance = float(size(nearest - 0.5, "l1").max())
    assert is_fooled(Skewed(), nearest).all()
    for steps in (20, 200):
        found = attacks.pgd(
            Skewed(), grey(2), LABELS[:2], norm="l1", eps=1.1 * distance, steps=steps, loss="margin", seed=0
        )
        assert is_fooled(Skewed(), found).all()
    moved = attacks.fgsm(Skewed(), grey(2), LABELS[:2], norm="l1", eps=8.0, seed=0)
    assert size(moved - 0.5, "l1").tolist() == pytest.approx([8.0, 8.0], rel=1e-4)
    assert is_fooled(Skewed(), moved).all()


@pytest.mark.parametrize("length", [0.01, 0.7, 3.0, 40.0])
def test_an_l1_step_has_its_length_or_all_the_room_there_is(length: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 1, 4, 4, generator=generator)
    images[0] = 1.0
    gradient = torch.randn(images.shape, generator=generator)
    gradient[1, 0, :2] = 0
    step = ascent(gradient, "l1", length, images)
    assert ((images + step >= -1e-6) & (images + step <= 1 + 1e-6)).all()
    assert (step * gradient >= 0).all()
    room = (torch.where(gradient > 0, 1 - images, images) * (gradient != 0)).flatten(1).sum(dim=1)
    torch.testing.assert_close(size(step, "l1"), room.clamp(max=length), atol=1e-4, rtol=0)


def test_fab_in_l1_hands_no_image_of_a_random_network_back() -> None:
    ensemble = rse.load("digits-rse")
    data = rse.load_data("digits", "test")
    x, y = data.inputs(slice(60)), data.labels[:60]
    right = ensemble.predict_proba(x, draws=100, seed=0).argmax(dim=1) == y
    found = attacks.fab(ensemble, x[right], y[right], norm="l1", steps=30, seed=0)
    assert (size(found - x[right], "l1") > 0).all()


class Spoilt(nn.Module):
    """NaN where the first pixel has moved; the root of a black pixel has no gradient."""

    def __init__(self, *, root: bool) -> None:
        super().__init__()
        self.root = root

    def forward(self, inputs: Tensor) -> Tensor:
        if self.root:
            root = (inputs.flatten(1)[:, :1] * 0).sqrt()
            spoilt: Tensor = Skewed()(inputs) + 0 * root
            return spoilt
        moved = (inputs.flatten(1)[:, :1] - 0.5).abs() > 1e-6
        return torch.where(moved, torch.nan, Skewed()(inputs))


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("attack", [attacks.pgd, attacks.ddn, attacks.cw_l2, attacks.fab, attacks.square])
def test_nan_is_an_error_and_no_success(attack: Attack, root: bool) -> None:
    if root and attack is attacks.square:
        pytest.skip("asks for no gradient")
    with pytest.raises(ValueError, match="the model returns NaN"):
        attack(Spoilt(root=root), grey(), LABELS, seed=0)


def test_nan_fools_nobody() -> None:
    answers = torch.tensor([[torch.nan, torch.nan], [0.2, 0.8]])
    assert fooled(answers, torch.tensor([1, 0]), False).tolist() == [False, True]
    assert fooled(answers, torch.tensor([0, 1]), True).tolist() == [False, True]


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e15, 1e20])
@pytest.mark.parametrize("attack", [attacks.cw_l2, attacks.ddn, attacks.fmn, attacks.fab])
def test_the_scale_of_logits_changes_no_distance(attack: Attack, scale: float) -> None:
    """sqrt of the sum of squares of the weights is 12.2 and the value -7: a distance of .573."""
    weights = Skewed().weights
    found = attack(
        Skewed(scale),
        grey(3),
        LABELS[:3],
        seed=0,
        **({"norm": "l2"} if attack in (attacks.fmn, attacks.fab) else {}),
    )
    assert found.isfinite().all()
    assert (Skewed(1.0).double()(found.double()).argmax(dim=1) == 1).all()
    assert size(found - 0.5, "l2").tolist() == pytest.approx([7 / float(weights.norm())] * 3, rel=0.03)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e15])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "probability-margin"])
def test_pgd_finds_its_way_however_sure_the_network_is(loss: LossName, scale: float) -> None:
    """At .573 the class changes; of the softmax nothing shows of that where logits are large."""
    found = attacks.pgd(Skewed(scale), grey(3), LABELS[:3], norm="l2", eps=0.6, steps=20, loss=loss, seed=0)
    assert (Skewed(1.0).double()(found.double()).argmax(dim=1) == 1).all()


class Saturated(nn.Module):
    """The same behind a sigmoid that is flat to the last bit around grey."""

    def forward(self, inputs: Tensor) -> Tensor:
        value = (60 * Skewed()(inputs)[:, 1]).sigmoid()
        return torch.stack([0.5 - value, value - 0.5], dim=1)


@pytest.mark.parametrize("attack", [attacks.ddn, attacks.fmn, attacks.fab, attacks.cw_l2])
def test_where_there_is_no_gradient_the_search_leaves_at_random(attack: Attack) -> None:
    assert not Saturated()(grey(1)).diff().item() > 0
    settings = {"norm": "l2"} if attack in (attacks.fmn, attacks.fab) else {}
    found = attack(Saturated(), grey(), LABELS, seed=0, **settings)
    assert is_fooled(Saturated(), found).double().mean() >= 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_half_precision_stays_in_the_ball(
    tiny: nn.Module, images: Tensor, dtype: torch.dtype, bounds: tuple[float, float], norm: Norm
) -> None:
    low, high = bounds
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.05 * (high - low), 0), draws=2, bounds=bounds).eval()
    x, labels = (low + (high - low) * images).to(dtype), torch.arange(6) % 5
    eps = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}[norm] * (high - low)
    found = attacks.pgd(ensemble, x, labels, norm=norm, eps=eps, steps=4, seed=0)
    assert found.dtype == dtype
    rse.judge(ensemble, x, found, labels, norm=norm, eps=eps, queries=2)
    length = torch.linalg.vector_norm(
        (found.double() - x.double()).flatten(1), {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1
    )
    assert (length <= eps * (1 + 1e-5)).all()


class Partly(nn.Module):
    """Answers some images with noise from a generator of its own: those with a first pixel above .5."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.generator = Skewed(), torch.Generator().manual_seed(0)

    def forward(self, inputs: Tensor) -> Tensor:
        noise = torch.randn(inputs.shape, generator=self.generator)
        on = (inputs.flatten(1)[:, 0] > 0.55).view(-1, 1, 1, 1)
        found: Tensor = self.inner(inputs + noise * on)
        return found


@pytest.mark.parametrize("max_batch", [None, 2])
def test_noise_of_some_images_is_seen_wherever_they_stand(max_batch: int | None) -> None:
    """Or lucky draws would count: the first two images, or a first batch, may have none."""
    images = grey(6)
    images[3:, :, 0, 0] = 0.6
    spent = []
    for batch in (images, images.flip(0)):
        with attacks.count_evaluations() as budget:
            attacks.pgd(Partly(), batch, LABELS[:6], eps=0.01, steps=3, seed=0, max_batch=max_batch)
        spent.append(budget.forwards)
    with attacks.count_evaluations() as quiet:
        attacks.pgd(Skewed(), images, LABELS[:6], eps=0.01, steps=3, seed=0, max_batch=max_batch)
    assert spent[0] == spent[1] > quiet.forwards  # by fresh draws, which confirm what was found


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    ("bounds", "eps"), [((1000.0, 1001.0), 0.01), ((0.0, 65535.0), 8.0), ((-9.0, 255.0), 0.01)]
)
def test_changes_that_are_small_beside_the_inputs_stay_within_eps(
    tiny: nn.Sequential, images: Tensor, norm: Norm, bounds: tuple[float, float], eps: float
) -> None:
    """Where float32 holds only few numbers between an input and the end of its ball."""
    low, high = bounds
    network = rse.Normalized(tiny, (low,) * 3, (high - low,) * 3)
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0, 0), bounds=bounds).eval()
    x, labels = low + (high - low) * images, torch.arange(6) % 5
    found = attacks.pgd(ensemble, x, labels, norm=norm, eps=eps, steps=4, seed=0)
    rse.judge(ensemble, x, found, labels, norm=norm, eps=eps)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    length = torch.linalg.vector_norm((found.double() - x.double()).flatten(1), order, dim=1)
    assert (length <= eps * (1 + 1e-6)).all()
    assert (length > 0).all()


def test_rounding_goes_towards_the_original() -> None:
    law = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        for low in (0.0, -1.0, -300.0):
            origin = (low + (1 - low) * torch.rand(4, 500, generator=law)).to(dtype)
            found = (origin.float() + 0.1 * torch.randn(4, 500, generator=law)).clamp(low, 1)
            rounded = rounded_towards(origin, found)
            assert ((rounded.float() - origin.float()).abs() <= (found - origin.float()).abs()).all()
            assert (rounded.float() - found).abs().max() <= 2 * torch.finfo(dtype).eps * max(1, -low)
    whole = torch.rand(4, 5, generator=law)
    assert torch.equal(rounded_towards(whole, whole + 0.1), whole + 0.1)


class Constant(nn.Module):
    """Answers alike for all images: confident probabilities in half precision, or logits that add up to 1."""

    def __init__(self, answers: list[float], *, softmax: bool, depends: float = 0.0) -> None:
        super().__init__()
        self.answers = nn.Parameter(torch.tensor(answers))
        self.softmax, self.depends = softmax, depends

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.answers + self.depends * inputs.flatten(1).mean(dim=1, keepdim=True)
        return logits.softmax(dim=1).bfloat16() if self.softmax else logits


@pytest.mark.parametrize("count", [1, 2, 8])
def test_probabilities_in_half_precision_are_refused_and_logits_are_not(count: int) -> None:
    x, labels = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)), LABELS[:count]
    sure = Constant([12.0, 0.3, 1.1, 0.2, 0.5], softmax=True, depends=0.1)
    with pytest.raises(ValueError, match="returns probabilities"):
        attacks.pgd(sure, x, labels, steps=1, seed=0)
    unsure = Constant([0.001 * k for k in range(1000)], softmax=True, depends=0.1)
    with pytest.raises(ValueError, match="returns probabilities"):
        attacks.pgd(unsure, x, labels, steps=1, seed=0)
    chance = Constant([0.25, 0.75 - float(x[0].mean()) * 0.2], softmax=False, depends=0.1)
    attacks.pgd(chance, x, labels, steps=1, seed=0)


def test_half_precision_is_told_by_what_outputs_hold() -> None:
    rounded = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)).softmax(dim=1).bfloat16()
    assert looks_like_probabilities(rounded)
    assert looks_like_probabilities(rounded.float())


def test_errors_are_in_the_units_of_the_caller(tiny: nn.Module, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny, bounds=(0.0, 255.0)).eval()
    labels = torch.arange(6) % 5
    with pytest.raises(ValueError, match=r"at most 255, the linf diameter of \[0, 255\] .* got 300"):
        attacks.pgd(ensemble, 255 * images, labels, eps=300.0)
    with pytest.raises(TypeError, match="eps must be a number, got '8/255'"):
        attacks.pgd(tiny, images, labels, eps="8/255")  # type: ignore[arg-type]
    for seed in (1.5, "a", True):
        with pytest.raises(TypeError, match="seed must be an integer or None"):
            attacks.pgd(tiny, images, labels, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bounds", [(1, -1), (0, 0), (float("nan"), 1), (-float("inf"), 1), (0,), "01", ([0], [1])]
)
def test_bounds_that_are_none_are_refused(tiny: nn.Module, bounds: object) -> None:
    with pytest.raises(ValueError, match="bounds must be"):
        rse.SelfEnsemble(tiny, bounds=bounds)  # type: ignore[arg-type]
