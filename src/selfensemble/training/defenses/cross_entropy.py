"""Plain training, RSE's noisy SGD, and Gaussian-augmented training: which one, the noise levels say.

Without noise it is plain training. With noise before every convolution it minimises, by Jensen's
inequality, an upper bound on the loss of the ensemble (Liu et al., ECCV 2018, algorithm 1). With noise
on the input alone it trains a network for randomized smoothing (Cohen et al., ICML 2019, section 3.3).
"""

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from ...runtime.schema import Count, NonNegative
from .base import Defense, Networks, logits_in_train_mode, targets

Temperature = Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)]


class CrossEntropy(Defense):
    """Cross-entropy of noisy forward passes.

    Attributes:
        label_smoothing: share of the label that is spread over all classes.
        draws: noise draws of an image in one step; the method has 1.
        consistency: weight of the mean Kullback-Leibler divergence of the draws from their mean, which
            needs two draws or more (Jeong & Shin, NeurIPS 2020, equation 6).
        entropy: weight of the entropy of that mean (same source), so that draws agree on something; it does
            not make single draws sure enough for certificates of the mean, see `temperature`.
        temperature: the loss is that of the logits divided by it, times it, so that those of the trained
            network are larger by about as much: single draws are nearly votes, and what certificates of the
            mean lose to those of votes is gained.
        input_std: Gaussian noise on the images only in training, as Zantedeschi et al. (AISec 2017)
            augment; a defense that answers without noise.
    """

    name: Literal["cross-entropy"] = "cross-entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    draws: Count = 1
    consistency: NonNegative = 0.0
    entropy: NonNegative = 0.0
    temperature: Temperature = 1.0
    input_std: NonNegative = 0.0

    @model_validator(mode="after")
    def _compares_draws(self) -> Self:
        if (self.consistency or self.entropy) and self.draws < 2:
            raise ValueError("consistency and entropy compare draws: set draws to 2 or more")
        return self

    @property
    def shows_images_once(self) -> bool:
        return self.draws == 1

    def loss(self, networks: Networks, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.input_std:
            noise = torch.randn(inputs.shape, dtype=inputs.dtype, device=inputs.device)
            inputs = inputs + self.input_std * noise
        logits = logits_in_train_mode(networks, torch.cat([inputs] * self.draws)) / self.temperature
        return self.temperature * self._loss(logits, labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of the logits (draws * B, K) of an image's draws, one draw of all images after the other."""
        count = len(logits) // self.draws
        labels = targets(labels, logits[:count])
        loss = functional.cross_entropy(
            logits, labels.repeat(self.draws), label_smoothing=self.label_smoothing
        )
        if not self.consistency and not self.entropy:
            return loss
        each = logits.log_softmax(dim=1).reshape(self.draws, count, -1)
        mean = each.logsumexp(dim=0) - math.log(self.draws)
        divergence = (mean.exp() * (mean - each)).sum(dim=2).mean()
        entropy = -(mean.exp() * mean).sum(dim=1).mean()
        return loss + self.consistency * divergence + self.entropy * entropy
