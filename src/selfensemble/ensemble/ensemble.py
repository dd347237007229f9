"""The ensemble: one set of weights, as many models as there are noise draws."""

import math
import numbers
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..noise.injection import FilterFn, eval_mode, inject_noise_, is_convolution, noise_layers, random_layers
from ..noise.layer import NoiseConfig
from ..noise.streams import Sampling, check_sampling
from .draws import Draws, moments
from .stopping import Calibrated, Fixed, Stop, rule_for


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the ensemble answers for a batch of B images and K classes.

    Attributes:
        label: (B,) int64, the class of the largest mean probability.
        probabilities: (B, K), softmax outputs averaged over the draws.
        spread: (B, K), standard deviation of the softmax outputs over the draws (of single draws,
            not of their mean); 0 for a model without noise, NaN for a single draw.
    """

    label: Tensor
    probabilities: Tensor
    spread: Tensor
    draws: Tensor


class OutputError(ValueError):
    """The model returns something that is not a batch of logits."""


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, or an object with `.logits` (transformers)."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.dim() == 2:
        return logits
    what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise OutputError(
        f"the model must return logits of shape (batch, classes), got {what}; wrap it in a module "
        "whose forward returns them"
    )


def floating_dtype(model: nn.Module) -> torch.dtype | None:
    """That of a model's first floating-point parameter; None where it has none."""
    return next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)


def check_images(inputs: Tensor, bounds: tuple[float, float] | None = (0.0, 1.0)) -> None:
    """Raise a ValueError (TypeError for a wrong dtype) unless `inputs` is a finite batch in bounds."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch.Tensor, got {type(inputs).__name__}")
    tokens = bounds is None and inputs.dtype in (torch.int64, torch.int32)  # for networks that look them up
    if not (inputs.is_floating_point() or tokens):
        raise TypeError(f"inputs must be floating point, got {inputs.dtype}; for uint8: x.float() / 255")
    if inputs.dim() < 2:
        raise ValueError(f"inputs must be a batch (B, ...), got shape {tuple(inputs.shape)}")
    if inputs.numel() == 0 or tokens:
        return
    low, high = (bound.item() for bound in inputs.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("inputs hold NaN or infinite values")
    if bounds is not None and (low < bounds[0] - 1e-6 or high > bounds[1] + 1e-6):
        raise ValueError(
            f"inputs must lie in [{bounds[0]:g}, {bounds[1]:g}], got [{low:g}, {high:g}]; scale images "
            "by 1/255 and put mean and std into the model, or set SelfEnsemble(..., bounds=None)"
        )


@contextmanager
def explain_shape(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Turn torch's error about inputs of a wrong shape into one that names what was expected."""
    try:
        yield
    except (torch.OutOfMemoryError, OutputError):
        raise
    except (RuntimeError, ValueError) as error:
        expected = ""
        if (fqn := next(iter(noise_layers(model)), None)) is not None:
            layer = model.get_submodule(fqn)
            expected = f"; its first layer is {type(layer).__name__}({layer.extra_repr()})"
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the model cannot take inputs of shape {tuple(inputs.shape)} ({reason}){expected}"
        ) from error


class SelfEnsemble(nn.Module):
    """A classifier with noise in front of every convolution, averaged over noise draws.

    `train()`: `forward` returns the logits of one draw, so that any loop that minimises the
    cross-entropy of the output is the method's noisy SGD. `eval()`: `forward` returns the logarithm of
    the mean softmax over `draws` draws. Those are valid logits of the ensemble, differentiable, and
    what any tool that expects a classifier should see.

    Args:
        model: a classifier that returns logits (B, K); it gets its noise in place.
        config: noise levels; None keeps the randomness that is there, or injects the published levels.
        draws: noise draws a prediction, >= 1.
        sampling: how draws are sampled in eval mode, see `GaussianNoise`.
        filter_fn, example_inputs: see `inject_noise_`.
        bounds: the valid range of inputs, checked by `predict_proba`; None for no range, or for tokens.

    Attributes:
        stopping: margins at which images stop drawing, see `calibrate`; None where there are none.
        folds: by shape of an image, whether one pass can hold several draws; found out when it is wanted.

    Source: Liu et al. 2018, algorithm 1.
    """

    # Input elements of a forward pass on a CPU: 32 images of 32x32.
    chunk = 32 * 3 * 32 * 32
    # Whether noisy copies of activations fit where a plain pass has its activations in float32.
    has_half_activations = False

    def __init__(
        self,
        model: nn.Module,
        config: NoiseConfig | None = None,
        *,
        draws: int = 10,
        sampling: Sampling = "shared",
        filter_fn: FilterFn = is_convolution,
        example_inputs: Any = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if config is not None or not random_layers(model):
            inject_noise_(model, config, filter_fn=filter_fn, example_inputs=example_inputs)
        self.model = model
        self.draws = check_count("draws", draws)
        self.sampling: Sampling = check_sampling(sampling)
        self.bounds = bounds
        self.stopping: Calibrated | None = None
        self.folds: dict[tuple[int, ...], bool] = {}
        for layer in random_layers(model):
            layer.sampling = self.sampling
        self.train(model.training)

    @property
    def is_random(self) -> bool:
        """Whether two forward passes can differ: any random layer is on, with a level above 0."""
        return any(layer.is_active for layer in random_layers(self.model))

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What inputs are converted to."""
        return floating_dtype(self)

    def draw_logits(self, inputs: Tensor) -> Tensor:
        """Logits (B, K) of one noise draw."""
        return logits_of(self.model(inputs))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            return self.draw_logits(inputs)
        draws = self.draws if self.is_random else 1
        each = [self.draw_logits(inputs).float().log_softmax(dim=-1) for _ in range(draws)]
        return torch.stack(each).logsumexp(dim=0) - math.log(draws)

    def predict_proba(
        self,
        inputs: Tensor,
        *,
        draws: int | None = None,
        max_batch: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: Stop | None = None,
        antithetic: bool | None = None,
    ) -> Tensor:
        """Softmax averaged over noise draws, without gradients, in constant memory.

        Always in eval mode, which is put back afterwards.

        Args:
            inputs: (B, ...), floating point, within `bounds`; chunks go to the model's device and dtype.
            draws: by default `self.draws`; 1 where there is no noise.
            max_batch: images a forward pass; by default half of the batch, which together with its noisy
                copies needs no more memory than one plain pass over the whole; on a CPU at most 32
                images of 32x32 or the same in pixels, on the fast path in bfloat16 128.
            seed: None for fresh noise (what a defense needs), an integer for noise that repeats: with
                shared sampling, the same whatever the batch and `max_batch`; in another memory format
                (channels_last) a seed stands for other noise.
            sampling: overrides the ensemble's.
            stop: when an image stops drawing. None takes all draws. "exact" stops when the draws that are
                left cannot change the label: it is that of all draws, while probabilities are means of
                fewer. "calibrated" stops by the margins in `stopping`, which also set the most draws.
            antithetic: draw in pairs of opposite noise: the mean is nearer to that of infinitely many
                draws, the spread is that of draws that are not independent. By default not, but with
                "calibrated" as it was calibrated.

        Returns:
            (B, K) float32 probabilities, on the device of `inputs`.

        Raises:
            TypeError, ValueError: inputs of a wrong dtype, shape or range, or counts below 1.
        """
        return self.predict(
            inputs, draws=draws, max_batch=max_batch, seed=seed, sampling=sampling, stop=stop,
            antithetic=antithetic,
        ).probabilities  # fmt: skip

    @torch.no_grad()
    def predict(
        self,
        inputs: Tensor,
        *,
        draws: int | None = None,
        max_batch: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: Stop | None = None,
        antithetic: bool | None = None,
    ) -> Prediction:
        """Label, mean probabilities and their spread over the draws; arguments of `predict_proba`."""
        check_images(inputs, self.bounds)
        most = self.draws if draws is None else check_count("draws", draws)
        rule = rule_for(stop, most, draws is not None, self.stopping)
        if not self.is_random:
            rule = Fixed(1)
        size = None if max_batch is None else check_count("max_batch", max_batch)
        if antithetic is None:
            antithetic = isinstance(rule, Calibrated) and rule.antithetic
        elif isinstance(rule, Calibrated) and antithetic != rule.antithetic:
            raise ValueError(
                f"the stopping rule was calibrated with antithetic={rule.antithetic}: leave antithetic out, "
                "or calibrate again"
            )
        with eval_mode(self):
            drawn = Draws(self, inputs, size, seed, sampling, antithetic)
            found = [moments(drawn, group, rule, k) for k, group in enumerate(drawn.groups(inputs))]
        mean, spread, used = (torch.cat(each).to(inputs.device) for each in zip(*found, strict=True))
        if not self.is_random:
            spread = torch.zeros_like(mean)
        return Prediction(mean.argmax(dim=-1), mean, spread, used)

    def save_pretrained(self, folder: str | Path, *, licence: str | None = None, **about: Any) -> None:
        """Write weights, noise levels and a model card to `folder`.

        Args:
            folder: what is there of an earlier one is replaced.
            licence: of the weights, for the card; None says nothing of it.
            about: see `save`.
        """
        from ..artefacts.storage import save
        from ..report.packing import write_card

        save(self, folder, **about)
        write_card(Path(folder), ensemble=self, licence=licence)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        model: nn.Module | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> "SelfEnsemble":
        """What `save_pretrained` wrote: a folder, or "owner/name" on the Hugging Face Hub.

        Args:
            name: a folder is taken where there is one.
            model: see `load`.
            revision, token: of the Hub.

        Raises:
            FileNotFoundError, ValueError: nothing there, or nothing that can be read.
        """
        from ..artefacts.hub import fetch
        from ..artefacts.storage import load
        from ..artefacts.zoo import zoo

        here = Path(name).exists() or str(name) in zoo()
        return load(name if here else fetch(str(name), revision=revision, token=token), model)

    def push_to_hub(
        self, name: str, *, private: bool | None = None, token: str | None = None, **about: Any
    ) -> str:
        """Upload weights, noise levels and a model card as "owner/name"; the address of the commit.

        A card with measured accuracies needs the evaluation of a saved ensemble: see `remote.push`.
        """
        from ..artefacts.hub import push

        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name.rpartition("/")[2]
            self.save_pretrained(folder, **about)
            return push(folder, name, private=private, token=token)


def check_count(name: str, value: object) -> int:
    """Return `value` as an int, or raise a ValueError unless it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)
