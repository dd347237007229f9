"""Sound, volumes and text: trained through the noise, predicted, optimised, decided."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import selfensemble as rse


class Text(nn.Module):
    """A convolution over embedded tokens, the largest answer of each filter, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.convolution = nn.Conv1d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.convolution(self.embedding(tokens).transpose(1, 2)).relu().amax(dim=2)
        logits: Tensor = self.head(found)
        return logits


def sound() -> tuple[nn.Module, Tensor, Tensor]:
    """Low and high tones in [-1, 1]."""
    labels = torch.arange(128) % 2
    phase, time = torch.rand(128, 1), torch.arange(64)
    inputs = (2 * torch.pi * (phase + time * (0.05 + 0.15 * labels[:, None]))).sin().unsqueeze(1)
    layers = [nn.Conv1d(1, 8, 9, padding=4), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2)), inputs, labels


def volumes() -> tuple[nn.Module, Tensor, Tensor]:
    """A bright ball or a bright shell in noise."""
    labels = torch.arange(128) % 2
    axis = torch.linspace(-1, 1, 8)
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    shapes = torch.stack([(radius < 0.7).float(), ((radius > 0.7) & (radius < 1.0)).float()])
    inputs = (0.2 * torch.rand(128, 8, 8, 8) + 0.8 * shapes[labels]).unsqueeze(1)
    layers = [
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, stride=2),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 27, 2)), inputs, labels


def text() -> tuple[nn.Module, Tensor, Tensor]:
    """Whether the word 3 follows the word 2 anywhere."""
    labels = torch.arange(128) % 2
    tokens = torch.randint(4, 20, (128, 12))
    tokens[:, 5] = 2
    tokens[:, 6] = torch.where(labels == 1, 3, tokens[:, 6])
    return Text(), tokens, labels


@pytest.mark.parametrize(("make", "bounds"), [(sound, (-1.0, 1.0)), (volumes, (0.0, 1.0)), (text, None)])
def test_a_classifier_of_it(
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]], bounds: tuple[float, float] | None
) -> None:
    model, inputs, labels = make()
    ensemble = rse.SelfEnsemble(model, rse.NoiseConfig(0.2, 0.1), bounds=bounds, example_inputs=inputs)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.02)
    for step in range(40):
        optimizer.zero_grad()
        with rse.noise_draw(step):
            functional.cross_entropy(ensemble(inputs), labels).backward()
        optimizer.step()
    ensemble.eval()
    answer = ensemble.predict(inputs, seed=1)
    assert (answer.label == labels).float().mean() > 0.95
    assert answer.spread.max() > 0
    for precision, tolerance in (("float32", 1e-4), ("bf16", 0.05)):
        fast = rse.optimize(ensemble, inputs, precision)  # type: ignore[arg-type]
        found = fast.predict(inputs, seed=1).probabilities
        torch.testing.assert_close(found, answer.probabilities, rtol=0, atol=tolerance)
    assert (rse.decide(ensemble, inputs, max_draws=60).label == labels).float().mean() > 0.8
    if make is text:
        with pytest.raises(ValueError, match="floating-point"):
            rse.certify(ensemble, inputs, n=100)
        with pytest.raises(TypeError, match="floating point"):
            rse.attacks.pgd(ensemble, inputs, labels)
    elif make is volumes:
        assert rse.certify(ensemble, inputs[:8], n=400).radius.min() > 0.1
        attacked = rse.attacks.pgd(ensemble, inputs, labels, norm="l2", eps=1.0, steps=5, eot=2, seed=0)
        margin = [
            rse.judge(ensemble, inputs, each, labels, seed=1).lead.mean() for each in (inputs, attacked)
        ]
        assert margin[1] > margin[0]
