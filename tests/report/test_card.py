"""Cards of any network: how to load it, and what its noise is worth on the image."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.report.packing import write_card


class Own(nn.Module):
    """Standardises its images itself, which no configuration says."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.more = nn.Conv2d(4, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.more(self.features((inputs - 0.5) / 0.25)).mean(dim=(2, 3))
        return logits


class Resizing(Own):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(nn.functional.interpolate(inputs, size=9, mode="bilinear"))


class Smoothed(nn.Sequential):
    """One convolution, and no other."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def front(network: nn.Module) -> rse.SelfEnsemble:
    normalised = rse.Normalized(network, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return rse.SelfEnsemble(normalised, rse.NoiseConfig(0.2, 0.1), filter_fn=lambda module, fqn: fqn == "")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: rse.SelfEnsemble(rse.create_model("small-cnn", width=0.125)),
            ["- noise: std 0.2 on the image, 0.1 inside", 'rse.load("net")\n', "small images of few classes"],
        ),
        (
            lambda: rse.SelfEnsemble(
                rse.Normalized(rse.create_model("small-cnn", width=0.125), 0.5, (0.2, 0.3, 0.4))
            ),
            [
                "std 0.2 behind mean and std, which is 0.04 to 0.08 on the image, 0.1 inside",
                "- standardised by its first layer: mean 0.5, 0.5, 0.5, std 0.2, 0.3, 0.4",
                'rse.load("net")\n',
            ],
        ),
        (
            lambda: front(rse.create_model("small-cnn", width=0.125)),
            ["- noise: std 0.2 on the image\n", "smoothing by one Gaussian rather than a self-ensemble"],
        ),
        (
            lambda: rse.SelfEnsemble(Own()),
            [
                "std 0.2 before the first layer, which is 0.05 on the image, 0.1 inside",
                'rse.load("net", model="tests.report.test_card:Own")  # imports that code',
                "what it was trained on is not recorded",
                "Nothing is known about data other than those named here",
            ],
        ),
        (
            lambda: rse.SelfEnsemble(Resizing()),
            ["its size in pixels is not known"],
        ),
        (
            lambda: rse.SelfEnsemble(Smoothed(), bounds=(-1, 1)),
            ["smoothing by one Gaussian", "pixels in [-1, 1]", "images (B, C, H, W) in [-1, 1]"],
        ),
        (
            lambda: rse.SelfEnsemble(nn.Sequential(*Smoothed())),
            ['rse.load("net", model=network)  # a fresh network', "a network of its author's own"],
        ),
    ],
)  # fmt: skip
def test_cards_of_any_network(tmp_path: Path, make: object, says: list[str]) -> None:
    assert callable(make)
    torch.manual_seed(0)
    ensemble = make().eval()
    rse.save(ensemble, tmp_path / "net", input_shape=(3, 8, 8))
    card = write_card(tmp_path / "net", ensemble=ensemble).read_text()
    for text in says:
        assert text in card
