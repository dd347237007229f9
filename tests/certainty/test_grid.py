"""Certificates by noise on the grid of 8-bit images, which no network that reads the last bits can break."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.certainty.certification import Method, certify
from selfensemble.certainty.grid import grid_noise
from selfensemble.noise.learned import learn_noise_


class LastBits(nn.Module):
    """Answers 1 where a noisy pixel next to 0 has bits below 2^-31: sums of 2 / 255 and noise have none."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = rse.GaussianNoise(0.25)

    def forward(self, inputs: Tensor) -> Tensor:
        noisy = self.noise(inputs).flatten(1)
        fine = (noisy.abs() < 2.0**-9) & ((noisy * 2.0**31).frac() != 0)
        told = 20.0 * fine.any(dim=1)
        return torch.stack([torch.full_like(told, 10), told], dim=1)


@pytest.mark.parametrize("method", ["vote", "mean"])
def test_a_network_that_reads_the_last_bits(method: Method) -> None:
    """Both images are certified beyond their distance, with answers that differ; on the grid they agree."""
    ensemble = rse.SelfEnsemble(LastBits()).eval()
    black = torch.zeros(1, 3, 32, 32)
    images = torch.cat([black, black + 2 / 255])
    distance = float((images[1] - images[0]).norm())
    broken = certify(ensemble, images, n=1000, method=method, seed=0)
    assert broken.label.tolist() == [1, 0]
    assert (broken.radius > distance).all()
    sound = certify(ensemble, images, n=1000, method=method, seed=0, grid=True)
    assert sound.label[0] == sound.label[1] >= 0
    assert (sound.radius > distance).all()


class Ramp(nn.Module):
    """Two classes on both sides of a hyperplane, far from soft; noise in front."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.noise = rse.GaussianNoise(std)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(64, generator=generator)
        self.register_buffer("direction", direction / direction.norm())

    def value(self, inputs: Tensor) -> Tensor:
        return (inputs.flatten(1) - 0.5) @ self.get_buffer("direction")

    def forward(self, inputs: Tensor) -> Tensor:
        value = 1e3 * self.value(self.noise(inputs))
        return torch.stack([value, -value], dim=1)


def test_radii_are_those_of_the_geometry() -> None:
    """Of 60 images at most one radius beyond its distance, at risk .001 each (level 2e-3)."""
    network = Ramp(0.25)
    ensemble = rse.SelfEnsemble(network).eval()
    images = torch.randint(256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(1)) / 255
    distance = network.value(images)
    found = certify(ensemble, images, n=2000, seed=0, grid=True, method="vote")
    certified = found.label >= 0
    assert torch.equal(found.label[certified], (distance < 0).long()[certified])
    assert int((found.radius > distance.abs()).sum()) <= 1
    usual = certify(ensemble, images, n=2000, seed=0, method="vote")
    assert float((found.radius - usual.radius).abs().mean()) < 0.02
    assert float(certified.double().mean()) > 0.8


def steps_of(ensemble: rse.SelfEnsemble, name: str, images: Tensor) -> float:
    """How far what a convolution gets is from multiples of 1/4080, in those."""
    seen: list[Tensor] = []
    handle = ensemble.model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach() * 4080)
    )
    ensemble.predict(images, draws=1)
    handle.remove()
    return max(float((each - each.round()).abs().max()) for each in seen)


def test_the_layer_is_put_back(tiny: nn.Module) -> None:
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.25, 0.1), draws=10).eval()
    images = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(1)) / 255
    layers = list(ensemble.modules())
    before = ensemble.predict(images, seed=3)
    with grid_noise(ensemble, images) as distance:
        assert 0 < distance < 1e-8
        inside = [steps_of(ensemble, name, images) for name in ("0", "3")]
        assert inside[0] < 1e-3 < 0.1 < inside[1]  # the first noise alone is on the grid
        within = ensemble.predict(images, seed=3)
        assert not torch.equal(within.probabilities, before.probabilities)
        torch.testing.assert_close(within.probabilities, before.probabilities, rtol=0, atol=0.2)
        with grid_noise(ensemble, images):
            pass
    with pytest.raises(RuntimeError, match="stop"), grid_noise(ensemble, images):
        raise RuntimeError("stop")
    assert list(ensemble.modules()) == layers
    assert steps_of(ensemble, "0", images) > 0.1
    assert torch.equal(ensemble.predict(images, seed=3).probabilities, before.probabilities)
    for precision in ("float32", "bf16"):
        fast = rse.optimize(ensemble, images, precision)
        assert certify(fast, images, n=20, n0=5, grid=True).label.shape == (4,)
    learn_noise_(ensemble.model, "layer")
    assert certify(ensemble, images, n=20, n0=5, grid=True).label.shape == (4,)


class Normalised(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.network((inputs - 0.5) / 0.25)
        return output


def test_what_has_no_grid_is_refused(tiny: nn.Module) -> None:
    images = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1)) / 255
    config = rse.NoiseConfig(0.25, 0.1)
    plain = copy.deepcopy(tiny)
    ensemble = rse.SelfEnsemble(tiny, config).eval()
    compiled: Any = torch.compile(tiny, backend="eager")
    cases = [
        (ensemble, images * 0.99, "other values: certify images that were read from files"),
        (rse.SelfEnsemble(Normalised(plain), config).eval(), images, "a normalisation, say"),
        (rse.SelfEnsemble(tiny, bounds=None).eval(), images, "images in .0, 1., this ensemble's are in None"),
        (rse.SelfEnsemble(compiled).eval(), images, "the network is compiled"),
    ]
    for network, few, reason in cases:
        with pytest.raises(ValueError, match=reason):
            certify(network, few, n=20, n0=5, grid=True)
        if "compiled" not in reason:
            assert certify(network, few, n=20, n0=5).label.shape == (2,)
    assert certify(ensemble, images[:0], grid=True).label.shape == (0,)
    assert certify(ensemble, images * (1 + 1e-6), n=20, n0=5, grid=True).label.shape == (
        2,
    )  # rounding of others
