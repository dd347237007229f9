"""The judge: whether images fool a model is decided here, on fresh noise, never by the attack."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks.budget import spend
from ..attacks.driver import check_batch, device_of, single_draw
from ..attacks.expectation import Forward
from ..attacks.losses import margin
from ..attacks.norms import size
from ..data.labels import class_numbers
from ..ensemble.checks import check_count, floating_dtype
from ..ensemble.draws import Draws
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.randomness import takes_numbers
from ..fast.exact import exact_float32
from ..noise.injection import eval_mode
from ..noise.own_numbers import OwnNumbers
from ..noise.streams import noise_draw, stream_seed
from ..runtime.provenance import binomial_interval


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of B attacked images, each asked Q times, every time with noise of its own.

    Attributes:
        answers: (B, Q) int64, the defender's answers.
        labels: (B,) int64, the true classes, beside the answers.
        lead: (B,) mean over the queries of `max p_j - p_y`, j != y: above 0 the attack has the lead.
        l2: (B,) Euclidean distance to the originals, in the units of the images.
        linf: (B,) largest change of a pixel, in the same units.
    """

    answers: Tensor
    labels: Tensor
    lead: Tensor
    l2: Tensor
    linf: Tensor

    @property
    def wrong(self) -> Tensor:
        """(B, Q) bool, which answers are wrong."""
        return self.answers != self.labels[:, None]

    @property
    def correct(self) -> Tensor:
        """(B,) bool, whether the first query is answered with the true class."""
        return ~self.wrong[:, 0]

    @property
    def accuracy(self) -> float:
        """Share of the images answered correctly at the first query."""
        return int(self.correct.sum()) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper-Pearson interval of the accuracy, 95 %; images and their noise are independent."""
        return binomial_interval(int(self.correct.sum()), len(self.correct))

    @property
    def rms_l2(self) -> float:
        """Root of the mean squared distance, the distortion that the paper reports."""
        return float(self.l2.square().mean().sqrt())

    @property
    def wrong_per_query(self) -> Tensor:
        """(B,) float64 on the CPU, estimated probability p of a wrong answer to one query."""
        return self.wrong.cpu().double().mean(dim=1)

    def persistent(self, queries: int) -> float:
        """Mean over the images of `1 - (1 - p)^k`: at least one of k queries gets a wrong answer.

        Unbiased: of an image with w wrong answers in Q, k of the Q queries drawn without replacement
        miss all of them with probability C(Q - w, k) / C(Q, k). (`1 - (1 - w/Q)^k` is too low.)

        Raises:
            ValueError: k is above Q; then nothing unbiased can be said.
        """
        asked = self.answers.shape[1]
        if not 1 <= queries <= asked:
            raise ValueError(f"{asked} queries were judged: k must be 1 to {asked}, got {queries}")
        right = (asked - self.wrong.sum(dim=1)).cpu().double()
        log_miss = (
            torch.lgamma(right + 1) - torch.lgamma((right - queries).clamp(min=0) + 1)
            - math.lgamma(asked + 1) + math.lgamma(asked - queries + 1)
        )  # fmt: skip
        miss = torch.where(right >= queries, log_miss.exp(), 0.0)
        return float(1 - miss.mean())


@torch.no_grad()
def judge(
    model: nn.Module,
    inputs: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    *,
    draws: int | None = None,
    queries: int = 1,
    seed: int | None = None,
    norm: str = "linf",
    eps: float | None = None,
    max_batch: int | None = None,
) -> Verdict:
    """Query the model on `adversarial` with fresh noise, drawn separately for each image and query.

    Args:
        model: the defender; a `SelfEnsemble` answers by the mean softmax of its draws, and so does any other
            module if `draws` is given.
        inputs: (B, C, H, W) the original images.
        adversarial: (B, C, H, W) the attacked ones.
        labels: (B,) integers, the true classes, also for targeted attacks.
        draws: noise draws per answer; by default the ensemble's, 1 for any other module.
        queries: number of queries per image. A `SelfEnsemble` without noise is queried once, and the answer
            counts for all.
        seed: of the defender's noise; None for fresh entropy. Never the attack's.
        norm, eps: the ball that the attack was bound to; None to leave distances unchecked.
        max_batch: images per forward pass.

    Raises:
        ValueError: shapes differ, or adversarial images leave the model's range or the ball, or hold NaN.
    """
    labels = check_batch(inputs, labels, model)
    check_count("queries", queries)
    if len(inputs) == 0:
        raise ValueError("no images to judge")
    if adversarial.shape != inputs.shape:
        raise ValueError(f"adversarial is {tuple(adversarial.shape)}, inputs {tuple(inputs.shape)}")
    check_batch(adversarial, labels, model)
    change = adversarial.to(wide := torch.promote_types(inputs.dtype, torch.float32)) - inputs.to(wide)
    if eps is not None and (farthest := float(size(change, norm).max())) > eps * (1 + 1e-4) + 1e-6:
        raise ValueError(
            f"an adversarial image is {farthest:g} from its original ({norm}), beyond eps = {eps:g}: "
            "the attack broke its budget"
        )
    fixed = isinstance(model, SelfEnsemble) and not _varies(model, inputs)
    reseed = _takes_numbers(model, inputs)
    answers, leads = [], []
    for query in range(1 if fixed else queries):
        own = None if seed is None else stream_seed(seed, query, 0)
        probabilities = _answer(model, adversarial, draws, own, max_batch, reseed)
        _check_answer(probabilities, labels)
        answers.append(probabilities.argmax(dim=1))
        leads.append(margin(probabilities, labels, False))
    return Verdict(
        torch.stack(answers, dim=1).expand(-1, queries),
        labels,
        torch.stack(leads).mean(dim=0),
        size(change, "l2"),
        size(change, "linf"),
    )


def _varies(model: SelfEnsemble, inputs: Tensor) -> bool:
    with eval_mode(model), exact_float32():
        return Draws(model, inputs).varies()


def _takes_numbers(model: nn.Module, inputs: Tensor) -> bool:
    few = inputs[:2].to(floating_dtype(model) or inputs.dtype).to(device_of(model, inputs))
    with eval_mode(model), exact_float32():
        return takes_numbers(single_draw(model), few)


def _check_answer(probabilities: Tensor, labels: Tensor) -> None:
    if not torch.isfinite(probabilities).all():
        raise ValueError("the model returns NaN or infinite logits: its answers cannot be judged")
    class_numbers(labels, len(labels), device=labels.device, classes=probabilities.shape[1])


def _answer(
    model: nn.Module,
    images: Tensor,
    draws: int | None,
    seed: int | None,
    max_batch: int | None,
    reseed: bool,
) -> Tensor:
    """Mean softmax (B, K) of one query.

    A network that takes numbers from torch's global generators gets its own, whatever the program has seeded.
    """
    numbers = OwnNumbers(seed) if reseed else nullcontext()
    device = device_of(model, images)
    if isinstance(model, SelfEnsemble):
        with numbers, exact_float32():
            return model.predict_proba(
                images, draws=draws, seed=seed, max_batch=max_batch, sampling="per_image"
            )
    forward, dtype = single_draw(model), floating_dtype(model) or images.dtype
    with (
        eval_mode(model),
        numbers,
        noise_draw(seed, sampling="per_image"),
        exact_float32(),
    ):
        parts = [
            _mean_probabilities(forward, part.to(dtype).to(device), draws or 1).to(images.device)
            for part in images.split(max_batch or max(1, len(images)))
        ]
    return torch.cat(parts)


@torch.no_grad()
def _mean_probabilities(forward: Forward, inputs: Tensor, draws: int) -> Tensor:
    """Mean softmax (B, K) over fresh noise draws."""
    spend(forwards=len(inputs) * draws)
    return torch.stack([forward(inputs).float().softmax(dim=-1) for _ in range(draws)]).mean(dim=0)
