"""Networks that are random by other means than our layers; networks with parts of images in the batch."""

import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

import selfensemble as rse
from selfensemble import attacks
from selfensemble.ensemble.stopping import Fixed
from selfensemble.noise.own_numbers import OwnNumbers
from selfensemble.serving.batching import Batcher


class Dropped(nn.Module):
    """Dropout at test time, called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

    def noisy(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, 0.3, training=True)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net[3](self.noisy(self.net[:3](inputs)))
        return out


class Bayesian(Dropped):
    """A weight that is drawn at every pass."""

    def noisy(self, hidden: Tensor) -> Tensor:
        return hidden * (1 + 0.3 * torch.randn(hidden.shape[1]))


class OfNumpy(Dropped):
    numbers = np.random.default_rng(0)

    def noisy(self, hidden: Tensor) -> Tensor:
        return hidden + 0.1 * torch.from_numpy(self.numbers.standard_normal(hidden.shape)).float()


class Flipped(Dropped):
    """A transform that seldom shows: every third pass, by Python's own numbers."""

    def noisy(self, hidden: Tensor) -> Tensor:
        return hidden if random.random() < 0.67 else 0.5 * hidden


class Linear(nn.Module):
    """No convolution that noise could be put in front of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net(functional.dropout(inputs.flatten(1), 0.3, training=True))
        return out


def images() -> tuple[Tensor, Tensor]:
    data = rse.load_data("digits", "test")
    return data.inputs(slice(60)), data.labels[:60]


def trained(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    random.seed(0)
    net, data = kind(), rse.load_data("digits", "train")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(60):
        part = slice(step * 16, step * 16 + 64)
        optimizer.zero_grad()
        functional.cross_entropy(net(data.inputs(part)), data.labels[part]).backward()
        optimizer.step()
    return net.eval()


KINDS = [Dropped, Bayesian, OfNumpy, Flipped, Linear]


@pytest.mark.parametrize("kind", KINDS)
def test_any_stochastic_network_is_an_ensemble(kind: Callable[[], nn.Module]) -> None:
    net, (x, y) = trained(kind), images()
    ensemble = rse.SelfEnsemble(net, rse.NoiseConfig(0, 0), draws=50)
    state = torch.get_rng_state()
    answer = ensemble.predict(x)
    assert answer.spread.max() > 0.01
    assert answer.draws.unique().tolist() == [50]
    assert ensemble.is_random
    assert (answer.label == y).float().mean() > 0.7
    if kind is Flipped:
        assert torch.equal(torch.get_rng_state(), state)
    forward = ensemble(x[:8]).exp()  # the mean of 50 draws, too: five standard errors of a difference
    truth = ensemble.predict(x[:8], draws=1000)
    error = 5 * (1 / 50 + 1 / 1000) ** 0.5 * truth.spread + 5e-3
    assert ((forward - truth.probabilities).abs() < error).all()
    one, other = (rse.judge(ensemble, x[:20], x[:20], y[:20], draws=1, queries=20).lead for _ in range(2))
    assert not torch.equal(one, other)
    decision = rse.decide(ensemble, x[:6], max_draws=60)
    assert (decision.draws > 1).all()
    known = decision.label >= 0
    assert (decision.label[known] == ensemble.predict(x[:6], draws=300).label[known]).all()
    sets = rse.conformal_sets(ensemble, x[:40], y[:40], alpha=0.2)
    assert sets.predict(x[40:]).shape == (20, 10)
    with Batcher(ensemble, x[:1]) as batcher:
        (served,) = batcher.submit(x[:1], Fixed(20))
        assert served.result(timeout=60).draws == 20
        assert served.result().spread.max() > 0
    with pytest.raises(ValueError, match="no noise on the image"):
        rse.certify(ensemble, x[:2], n=100)


@pytest.mark.parametrize("kind", [Dropped, Bayesian, Linear])
def test_a_seed_holds_for_what_torch_draws_as_well(kind: Callable[[], nn.Module]) -> None:
    ensemble, (x, _) = rse.SelfEnsemble(trained(kind), rse.NoiseConfig(0, 0), draws=3), images()
    state = torch.get_rng_state()
    one, same, other = (ensemble.predict(x, seed=seed).probabilities for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_holds_for_a_compiled_network() -> None:
    torch.compiler.reset()
    ran: list[bool] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            ran.append(True)
            return graph(*args)

        return run

    net, (x, _) = trained(Dropped), images()
    ensemble = rse.SelfEnsemble(torch.compile(net, backend=backend), rse.NoiseConfig(0, 0), draws=3)  # type: ignore[arg-type]
    plain = rse.SelfEnsemble(net, draws=3)
    ensemble.predict(x)
    state = torch.get_rng_state()
    one, same = (each.predict(x, seed=1).probabilities for each in (ensemble, plain))
    assert torch.equal(one, same)
    assert torch.equal(torch.get_rng_state(), state)
    ran.clear()
    ensemble.predict(x)
    assert ran  # the graph is there as before


class Multiplied(nn.Module):
    """Noise of numpy that multiplies, and no bias: black images show none."""

    numbers = np.random.default_rng(0)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(512, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.net(inputs)
        numbers = torch.from_numpy(self.numbers.standard_normal(hidden.shape))
        out: Tensor = self.last(hidden * (1 + 0.5 * numbers.float()))
        return out


def test_black_images_do_not_hide_randomness() -> None:
    net, (x, _) = trained(Multiplied), images()
    mixed = torch.cat([torch.zeros(2, 1, 8, 8), x])
    answer = rse.SelfEnsemble(net, rse.NoiseConfig(0, 0), draws=20).predict(mixed)
    assert answer.draws.unique().tolist() == [20]
    assert answer.spread[2:].amax(dim=1).min() > 0
    ensemble = rse.SelfEnsemble(net, draws=20)
    with Batcher(ensemble, torch.zeros(1, 1, 8, 8)) as batcher:
        (served,) = batcher.submit(x[:1], Fixed(20))
        assert served.result(timeout=60).draws == 20


def test_a_server_asks_again() -> None:
    class Late(Dropped):
        on = False

        def noisy(self, hidden: Tensor) -> Tensor:
            return functional.dropout(hidden, 0.3, training=True) if self.on else hidden

    net, (x, _) = trained(Late), images()
    ensemble = rse.SelfEnsemble(net, rse.NoiseConfig(0, 0), draws=20)
    with Batcher(ensemble, x[:1]) as batcher:
        assert batcher.submit(x[:1], Fixed(20))[0].result(timeout=60).draws == 1
        net.on = True  # type: ignore[assignment]
        assert batcher.submit(x[:1], Fixed(20))[0].result(timeout=60).draws == 20


@pytest.mark.parametrize("kind", [Dropped, OfNumpy])
def test_calibration_asks_itself(kind: Callable[[], nn.Module]) -> None:
    ensemble = rse.SelfEnsemble(trained(kind), rse.NoiseConfig(0, 0), draws=8)
    inputs = rse.load_data("digits", "test").inputs(slice(300))
    rule = rse.calibrate(ensemble, inputs, epsilon=0.2, reference_draws=40, most=6, seed=0)
    assert 1 <= rule.mean_draws <= 6
    quiet = rse.SelfEnsemble(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), rse.NoiseConfig(0, 0))
    with pytest.raises(ValueError, match="no noise"):
        rse.calibrate(quiet, inputs)


class Switchable(Dropped):
    """Dropout that a program switches on in a network in eval mode, by its module or one around it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Identity(), nn.Sequential(nn.BatchNorm1d(512)), nn.Dropout(0.3))
        self.other = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.3))

    def noisy(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.other(self.block(hidden))
        return out


def on(net: nn.Module, *names: str) -> nn.Module:
    for name in names:
        net.get_submodule(name).train()
    return net


@pytest.mark.parametrize("names", [("block.2",), ("other",)])
def test_dropout_that_is_switched_on_by_itself_stays_on(names: tuple[str, ...]) -> None:
    """Before the ensemble is made or after it, whatever stands around the network."""
    net, (x, y) = trained(Switchable), images()
    assert rse.SelfEnsemble(net, rse.NoiseConfig(0, 0)).predict(x).draws.unique().tolist() == [1]
    on(net, *names)
    wrapped = nn.Sequential(nn.Identity(), net)  # made in train mode, as modules are
    for model in (net, wrapped):
        ensemble = rse.SelfEnsemble(rse.remove_noise_(model), rse.NoiseConfig(0, 0), draws=20)
        assert ensemble.predict(x).spread.max() > 0.01
        assert ensemble.model.training == (model is wrapped)
        assert torch.equal(*(ensemble.predict(x, seed=1).probabilities for _ in range(2)))
    ensemble = rse.SelfEnsemble(rse.remove_noise_(net), rse.NoiseConfig(0, 0), draws=20)
    assert rse.optimize(ensemble, x, "float32").predict(x).spread.max() > 0.01
    assert rse.judge(net, x, x, y, queries=20).answers.unique(dim=1).shape[1] > 1
    net.train()  # as a whole: a network in training, which predicts in eval mode
    assert ensemble.predict(x).draws.unique().tolist() == [1]
    assert all(module.training for module in net.modules())
    ensemble.eval()
    assert ensemble.predict(x).draws.unique().tolist() == [1]


def test_batch_norm_is_not_switched_on() -> None:
    net, (x, _) = on(trained(Switchable), "block"), images()
    ensemble = rse.SelfEnsemble(net, rse.NoiseConfig(0, 0), draws=20)
    before = net.block[1][0].running_mean.clone()  # type: ignore[union-attr, index]
    assert ensemble.predict(x).draws.unique().tolist() == [1]
    assert torch.equal(before, net.block[1][0].running_mean)  # type: ignore[union-attr, index]
    assert net.block[2].training  # type: ignore[index, union-attr]
    assert [each.rule for each in rse.validate(net, x)] == ["mixed-modes"]


def test_modes_of_the_networks_parts_stay_when_an_ensemble_is_made_of_it() -> None:
    net = trained(Switchable).train()
    net.block.eval()  # type: ignore[union-attr]
    modes = [module.training for module in net.modules()]
    rse.SelfEnsemble(net, rse.NoiseConfig(0, 0))
    rse.remove_noise_(net)
    assert [module.training for module in net.modules()] == modes


def test_mixing_that_is_switched_on_later_is_found() -> None:
    class Mixing(Dropped):
        mixes = False

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.net(inputs)
            return out - 5 * out.mean(dim=0, keepdim=True) if self.mixes else out

    net, (x, _) = trained(Mixing), images()
    ensemble = rse.SelfEnsemble(net, rse.NoiseConfig(0.3, 0.1), draws=8)
    ensemble.predict(x[:2])
    net.mixes = True  # type: ignore[assignment]
    found = ensemble.predict(x[:2], seed=1).probabilities
    assert torch.allclose(found, rse.SelfEnsemble(net, draws=8).predict(x[:2], seed=1).probabilities)


def test_randomness_that_is_switched_on_later_is_found() -> None:
    class Switched(Dropped):
        on = False

        def noisy(self, hidden: Tensor) -> Tensor:
            return functional.dropout(hidden, 0.3, training=True) if self.on else hidden

    net, (x, _) = trained(Switched), images()
    ensemble = rse.SelfEnsemble(net, rse.NoiseConfig(0, 0))
    answer = ensemble.predict(x)
    assert answer.draws.unique().tolist() == [1]
    assert not answer.spread.any()
    net.on = True  # type: ignore[assignment]
    assert ensemble.predict(x).spread.max() > 0


class Switch:
    on = False


def test_a_seed_holds_for_noise_that_is_switched_on_behind_its_back() -> None:
    """By what is no plain value of a module, after a prediction that found no such noise."""

    class Switched(Dropped):
        def __init__(self) -> None:
            super().__init__()
            self.switch = Switch()

        def noisy(self, hidden: Tensor) -> Tensor:
            return functional.dropout(hidden, 0.3, training=True) if self.switch.on else hidden

    net, (x, _) = trained(Switched), images()
    ensemble = rse.SelfEnsemble(net, rse.NoiseConfig(0.05, 0.05), draws=6)
    quiet = ensemble.predict(x, seed=1).probabilities
    net.switch.on = True  # type: ignore[union-attr]
    state = torch.get_rng_state()
    noisy = ensemble.predict(x, seed=1).probabilities
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noisy, quiet)
    torch.rand(3)
    assert torch.equal(ensemble.predict(x, seed=1).probabilities, noisy)


def own_numbers(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + torch.randn_like(output)


def own_numbers_put_back(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    with torch.random.fork_rng():
        return output + torch.randn_like(output)


@pytest.mark.parametrize("noise", [own_numbers, own_numbers_put_back])
def test_a_seed_holds_for_hooks_that_came_later(tiny: nn.Sequential, images: Tensor, noise: Any) -> None:
    """Also where a calculation has torch's numbers for itself, as a judge does; errors change no state."""
    ensemble = rse.SelfEnsemble(tiny, draws=4).eval()
    quiet = ensemble.predict(images, seed=1).probabilities
    tiny[-1].register_forward_hook(noise)
    found = []
    for seed in (5, 6):
        with OwnNumbers(seed):
            found.append(ensemble.predict(images, seed=1).probabilities)
    found.append(ensemble.predict(images, seed=1).probabilities)
    assert all(torch.equal(each, found[0]) for each in found)
    assert not torch.equal(found[0], quiet)

    def fail(*_: Any) -> None:
        raise RuntimeError

    tiny[-1].register_forward_hook(fail)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        ensemble.predict(images, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_of_other_threads_stay_theirs(tiny: nn.Sequential, images: Tensor) -> None:
    """Even where the network was once found random by mistake, because its weights moved meanwhile."""
    ensemble = rse.SelfEnsemble(tiny, draws=4).eval()
    ensemble.predict(images, seed=1)

    def move(layer: nn.Linear, *_: Any) -> None:
        layer.bias.data.add_(1e-3)

    moving = tiny[-1].register_forward_hook(move)
    ensemble.has_other_noise(images)
    moving.remove()
    drawn: list[float] = []

    def draw(*_: Any) -> None:
        thread = threading.Thread(target=lambda: drawn.append(torch.rand(1).item()))
        thread.start()
        thread.join()

    tiny[-1].register_forward_hook(draw)
    for _ in range(3):
        ensemble.predict(images, seed=1)
    assert len(set(drawn)) == len(drawn) >= 3


def test_a_pickled_ensemble_keeps_its_noise_in_a_new_process(
    tiny: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch counts hooks from the number on that the noise has."""
    ensemble = rse.SelfEnsemble(tiny, draws=4).eval()
    pickled = pickle.dumps(ensemble)
    wanted = ensemble.predict(images, seed=1).probabilities
    first = min(number for module in tiny.modules() for number in module._forward_pre_hooks)
    monkeypatch.setattr(RemovableHandle, "next_id", first)
    found = pickle.loads(pickled)
    for _ in range(2):
        assert torch.equal(found.predict(images, seed=1).probabilities, wanted)


def test_a_network_that_did_not_change_is_not_asked_again(tiny: nn.Module, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny, draws=6).eval()
    seen: list[int] = []
    tiny.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    first = ensemble.predict(images[:1], seed=1).probabilities
    seen.clear()
    assert torch.equal(ensemble.predict(images[:1], seed=1).probabilities, first)
    assert sum(seen) == 6


def test_a_network_that_returns_nan_is_not_random_for_that() -> None:
    class Broken(Dropped):
        def noisy(self, hidden: Tensor) -> Tensor:
            return hidden * float("nan")

    ensemble = rse.SelfEnsemble(Broken().eval(), rse.NoiseConfig(0, 0), draws=7)
    assert ensemble.predict(images()[0]).draws.unique().tolist() == [1]


class Frames(nn.Module):
    """Clips (B, T, 1, 8, 8): a 2-d network for each frame, whose answers are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
        self.front = rse.GaussianNoise(1.0, layer=9)

    def forward(self, clips: Tensor) -> Tensor:
        clips = self.front(clips)
        out: Tensor = self.net(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).square().mean(dim=1)
        return out


def frames(sampling: Any) -> tuple[rse.SelfEnsemble, Tensor]:
    torch.manual_seed(3)
    net = Frames().eval()
    with torch.no_grad():
        net.net[-1].weight.mul_(6)  # type: ignore[operator]
    rse.inject_noise_(net, rse.NoiseConfig(1.5, 1.5))
    return rse.SelfEnsemble(net, sampling=sampling), torch.rand(4, 6, 1, 8, 8)


def test_with_frames_in_the_batch_all_functions_agree_with_predict() -> None:
    """Of an answer's two likeliest classes; four standard errors of 1,500 and more draws."""
    ensemble, x = frames("per_image")
    truth = ensemble.predict(x, draws=3000)
    wrong = ensemble.predict(x, draws=3000, sampling="shared")
    far = (truth.probabilities - wrong.probabilities).abs().amax(dim=1)
    assert far.max() > 0.05  # the two are not the same here
    decision = rse.decide(ensemble, x, max_draws=400, alpha=0.01)
    assert (decision.label >= 0).any()
    assert (decision.label[decision.label >= 0] == truth.label[decision.label >= 0]).all()
    certificate = rse.certify(ensemble, x, method="mean", n0=100, n=1500)
    known = certificate.label >= 0
    assert (certificate.label[known] == truth.label[known]).all()
    best = truth.probabilities.amax(dim=1)
    assert (certificate.lower <= best + 0.02).all()
    assert (certificate.lower > best - 0.12).all()
    seen: list[Tensor] = []

    def note(estimate: Tensor) -> Tensor:
        seen.append(estimate.detach())
        return estimate.sum(dim=1)

    from selfensemble.attacks.averaging import Noise
    from selfensemble.attacks.driver import run_attack

    def run(oracle: Any, images: Tensor, labels: Tensor) -> Tensor:
        draws = [oracle.evaluate(images, note).draws for _ in range(20)]
        seen.append(torch.cat(draws).mean(dim=0))
        return images

    run_attack(ensemble, x, truth.label, run, Noise(eot=75, seed=0))
    error = 4 * truth.spread / 1500**0.5 + 4 * truth.spread / 3000**0.5
    assert ((seen[-1] - truth.probabilities).abs() < error).all()
    with Batcher(ensemble, x[:1]) as batcher:
        served = [each.result(timeout=60) for each in batcher.submit(x, Fixed(1500))]
    assert ((torch.stack([each.probabilities for each in served]) - truth.probabilities).abs() < error).all()


def test_a_bare_network_with_frames_is_attacked_as_it_answers() -> None:
    ensemble, x = frames("per_image")
    truth = ensemble.predict(x, draws=2000)
    bare = ensemble.model
    seen: list[Tensor] = []
    handle = bare.register_forward_hook(
        lambda module, args, output: seen.append(output.detach().softmax(dim=1))
    )
    attacks.random_noise(bare, x, truth.label, eps=1e-6, tries=1, eot=100, confirm_draws=100, seed=0)
    handle.remove()
    each = torch.stack([answer for answer in seen if len(answer) == len(x)])
    error = 4.5 * truth.spread * (1 / len(each) + 1 / 2000) ** 0.5
    assert ((each.mean(dim=0) - truth.probabilities).abs() < error + 1e-3).all()


def test_sampling_can_be_changed_afterwards(tiny: nn.Module) -> None:
    ensemble = rse.SelfEnsemble(tiny, draws=1)
    layers = rse.noise_layers(ensemble.model).values()
    assert {layer.sampling for layer in layers} == {"shared"}
    ensemble.sampling = "per_image"
    assert {layer.sampling for layer in layers} == {"per_image"}
    same = torch.rand(1, 3, 8, 8).expand(5, -1, -1, -1)
    assert len(ensemble.predict(same).probabilities.unique(dim=0)) == 5
    assert len(ensemble.eval()(same).unique(dim=0)) == 5
    ensemble.sampling = "shared"
    assert torch.allclose(*ensemble.predict(same).probabilities[:2])
    with pytest.raises(ValueError, match="per_image"):
        ensemble.sampling = "each"  # type: ignore[assignment]
