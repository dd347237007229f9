"""A model under examination by `doctor`: its images, and what several checks want to know of it."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...attacks.driver import attacked, check_batch, device_of, looks_like_probabilities, single_draw
from ...attacks.masking import are_labels
from ...attacks.pgd import pgd
from ...attacks.units import bounds_of
from ...ensemble.checks import floating_dtype
from ...ensemble.ensemble import SelfEnsemble
from ...ensemble.randomness import draws_numbers, takes_numbers
from ...fast.optimize import original_of
from ...noise.injection import eval_mode, random_layers
from ...noise.layer import GaussianNoise, RandomLayer
from ...noise.streams import Sampling, stream_seed
from ..judge import judge

_JUDGE_QUERIES = 3


class Subject:
    """The model as it was handed over, the images of the trials, and cached findings."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        norm: str,
        eps: float,
        steps: int,
        eot: int,
        images: int,
        expect_random: bool | None,
        max_batch: int,
        seed: int,
    ) -> None:
        labels = check_batch(inputs, labels, model)
        if len(inputs) == 0:
            raise ValueError("no images to examine the model with")
        self.model, self.norm, self.eps, self.steps, self.eot = model, norm, eps, steps, eot
        self.max_batch, self.seed, self.images = max_batch, seed, images
        self.expect_random = expect_random
        self.bounds = bounds_of(model)
        self.device = device_of(model, inputs)
        self.dtype = floating_dtype(original_of(model)) or torch.float32
        # In float32, in which attacks compute: not every device has float64.
        self.all_inputs, self.all_labels = inputs[: 4 * images].float(), labels[: 4 * images]

    @property
    def width(self) -> float:
        """From black to white, in the units of the inputs and of `eps`."""
        low, high = self.bounds
        return high - low

    def once(self, inputs: Tensor) -> Tensor:
        """Outputs of one pass in eval mode, one noise draw of an ensemble, fresh noise."""
        with torch.no_grad(), eval_mode(self.model):
            return self._forward(inputs)

    def _forward(self, inputs: Tensor) -> Tensor:
        return single_draw(self.model)(inputs.to(self.device))

    @cached_property
    def few(self) -> Tensor:
        """Up to 8 images, for checks of single outputs."""
        return self.all_inputs[:8]

    @cached_property
    def outputs(self) -> list[Tensor]:
        """Outputs (B, K) of 32 passes over the same images, without gradients."""
        return [self.once(self.few) for _ in range(32)]

    @cached_property
    def is_random(self) -> bool:
        """Whether those differ."""
        return any(not torch.equal(self.outputs[0], other) for other in self.outputs[1:])

    @cached_property
    def takes_numbers(self) -> bool:
        """Whether it takes numbers from torch's global generators, in eval mode."""
        return takes_numbers(self.once, self.few)

    @cached_property
    def random_ops(self) -> set[str]:
        """Operators of one pass in eval mode that draw random numbers."""
        return draws_numbers(self.once, self.few)

    @cached_property
    def noise_layers(self) -> list[GaussianNoise]:
        """All noise layers within the model."""
        return [layer for layer in self.random_layers if isinstance(layer, GaussianNoise)]

    @cached_property
    def random_layers(self) -> list[RandomLayer]:
        """All random layers of this package within the model."""
        return random_layers(self.model)

    @cached_property
    def clean(self) -> tuple[Tensor, Tensor]:
        """The first images that the model gets right in each of three queries, and their labels."""
        verdict = judge(
            self.model, self.all_inputs, self.all_inputs, self.all_labels, queries=_JUDGE_QUERIES,
            draws=self.judge_draws, seed=stream_seed(self.seed, 0, 8), max_batch=self.max_batch,
        )  # fmt: skip
        right = (~verdict.wrong).all(dim=1).nonzero().squeeze(1)[: self.images]
        if len(right) < 5:
            raise ValueError(
                f"the model gets only {len(right)} of {len(self.all_labels)} images right, and the trials "
                "need 5: pass images of its task, in its range, with its labels"
            )
        return self.all_inputs[right], self.all_labels[right]

    @property
    def sampling(self) -> Sampling:
        """How an ensemble samples its draws; shared by the images of a batch where nothing is said."""
        original = original_of(self.model)
        return original.sampling if isinstance(original, SelfEnsemble) else "shared"

    @property
    def judge_draws(self) -> int | None:
        """Noise draws of an answer."""
        if isinstance(self.model, SelfEnsemble):
            return None
        return 10 if self.is_random else 1

    @property
    def answer_draws(self) -> int:
        """The same as a number."""
        if not self.is_random:
            return 1
        return int(self.model.draws) if isinstance(self.model, SelfEnsemble) else 10

    @property
    def draws(self) -> int:
        """Noise draws of a step of the trial attacks."""
        return self.eot if self.is_random else 1

    def accuracy(self, images: Tensor, number: int) -> Tensor:
        """(B,) share of right answers to three queries on `images`, made from those of `clean`."""
        inputs, labels = self.clean
        verdict = judge(
            self.model, inputs, images, labels, queries=_JUDGE_QUERIES, draws=self.judge_draws,
            seed=stream_seed(self.seed, number, 9), max_batch=self.max_batch,
        )  # fmt: skip
        return 1 - verdict.wrong_per_query  # on the CPU

    def attack(self, attack: Callable[..., Tensor], **settings: Any) -> Tensor:
        """(B,) share of right answers under an attack of the trial's threat model."""
        inputs, labels = self.clean
        options = {"norm": self.norm, "eps": self.eps, "seed": self.seed, "max_batch": self.max_batch}
        images = attack(self.model, inputs, labels, **(options | settings))
        return self.accuracy(images, len(settings))

    def white_box(self, **settings: Any) -> Tensor:
        """(B,) share of right answers under PGD on the ensemble's loss, two restarts."""
        standard: dict[str, Any] = {
            "steps": self.steps, "restarts": 2, "eot": self.draws, "average": "probabilities",
            "early_stop": True,
        }  # fmt: skip
        return self.attack(pgd, **(standard | settings))

    @cached_property
    def base_line(self) -> Tensor:
        """`white_box` with the standard budget."""
        return self.white_box()

    @cached_property
    def gives_probabilities(self) -> bool:
        """Whether outputs are distributions rather than logits."""
        return looks_like_probabilities(self.outputs[0])

    @cached_property
    def gives_labels(self) -> bool:
        """Whether outputs are answers, 0 and 1, rather than logits."""
        return are_labels(self.outputs[0])

    def with_gradient(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, K) of one pass, and the images as the leaf of their graph."""
        with attacked(self.model):
            leaf = inputs.detach().to(self.device, torch.float32, copy=True).requires_grad_()
            return self._forward(leaf), leaf
