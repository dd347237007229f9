"""The judge: whether images fool a model is decided here, on fresh noise, never by the attack."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks.expectation import check_batch, device_of, mean_probabilities, single_draw
from ..ensemble import SelfEnsemble
from ..inject import eval_mode
from ..noise import noise_draw
from ..provenance import binomial_interval


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of B attacked images.

    Attributes:
        correct: (B,) bool, whether the defender still answers with the true class.
        l2: (B,) Euclidean distance to the originals, in [0, 1] pixels.
        linf: (B,) largest change of a pixel.
    """

    correct: Tensor
    l2: Tensor
    linf: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images answered correctly."""
        return int(self.correct.sum()) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper-Pearson interval of the accuracy, 95 %; images and their noise are independent."""
        return binomial_interval(int(self.correct.sum()), len(self.correct))

    @property
    def rms_l2(self) -> float:
        """Root of the mean squared distance, the distortion that the paper reports."""
        return float(self.l2.square().mean().sqrt())


@torch.no_grad()
def judge(
    model: nn.Module,
    inputs: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    *,
    draws: int | None = None,
    seed: int | None = None,
    max_batch: int | None = None,
) -> Verdict:
    """Answer `adversarial` with fresh noise, drawn for each image on its own.

    Args:
        model: the defender; a `SelfEnsemble` answers by the mean softmax of its draws, any other
            module likewise if `draws` is given.
        inputs: (B, C, H, W) the original images.
        adversarial: (B, C, H, W) the attacked ones.
        labels: (B,) int64, the true classes, also for targeted attacks.
        draws: noise draws an answer; by default the ensemble's own, 1 for any other module.
        seed: of the defender's noise; None for fresh entropy. Never the attack's.
        max_batch: images a forward pass.

    Raises:
        ValueError: shapes differ, or adversarial images leave [0, 1] or hold NaN.
    """
    check_batch(inputs, labels)
    if len(inputs) == 0:
        raise ValueError("no images to judge")
    if adversarial.shape != inputs.shape:
        raise ValueError(f"adversarial is {tuple(adversarial.shape)}, inputs {tuple(inputs.shape)}")
    check_batch(adversarial, labels)
    if isinstance(model, SelfEnsemble):
        answers = model.predict(
            adversarial, draws=draws, seed=seed, max_batch=max_batch, sampling="per_image"
        ).label
    else:
        device, forward = device_of(model, inputs), single_draw(model)
        with eval_mode(model), noise_draw(seed, sampling="per_image"):
            parts = [
                mean_probabilities(forward, part.to(device), draws or 1).argmax(dim=1)
                for part in adversarial.split(max_batch or max(1, len(adversarial)))
            ]
        answers = torch.cat(parts).to(labels.device)
    change = (adversarial - inputs).flatten(1)
    return Verdict(answers == labels, change.norm(dim=1), change.abs().amax(dim=1))
