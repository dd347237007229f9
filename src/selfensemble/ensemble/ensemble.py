"""The ensemble: one set of weights, as many models as there are noise draws."""

import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..noise.calls import in_eval_mode_now
from ..noise.filters import Filter, filter_named, matching
from ..noise.graphs import is_recording
from ..noise.injection import FilterFn, eval_mode, inject_noise_, is_convolution, noise_layers, random_layers
from ..noise.layer import NoiseConfig
from ..noise.streams import Sampling
from ..runtime.remarks import Remark
from .checks import check_bounds, check_call, check_count, check_images
from .draws import Draws, moments
from .observation import check_answer
from .order import is_by_registration
from .promises import Promising, rule_for
from .stopping import Calibrated, Fixed, Stop


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


class SelfEnsemble(Promising):
    """A classifier with noise before every convolution, averaged over noise draws.

    `train()`: `forward` returns the logits of one draw, so that any loop that minimises the
    cross-entropy of the output is the method's noisy SGD. `eval()`: `forward` returns the logarithm of
    the mean softmax over `draws` draws. Those are valid logits of the ensemble, differentiable, and
    what any tool that expects a classifier should see.

    Args:
        model: a classifier that returns logits (B, K); it gets its noise in place.
        config: noise levels; None keeps existing randomness, or injects the published levels if there is
            none.
        draws: noise draws per prediction, >= 1.
        sampling: how draws are sampled in eval mode, see `GaussianNoise`.
        filter_fn, example_inputs: see `inject_noise_`; the output for an example is checked, and whether
            parts of an input would share noise is said in a `Remark`. Without an example, the first pass
            says in one if another layer runs first than the one that got `init_std`.
        bounds: the valid range of inputs, checked by `predict_proba`; None for no range, or for tokens.

    Attributes:
        stopping: margins at which images stop drawing, see `calibrate`; None if there are none.
        sets: which labels belong to the set of an image, see `conformal_sets`; None if there is no rule.

    Rules are valid for the weights, noise, sampling and precision that they were calibrated on, and are
    refused after one of these changed.

    Source: Liu et al. 2018, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        config: NoiseConfig | None = None,
        *,
        draws: int = 10,
        sampling: Sampling = "shared",
        filter_fn: FilterFn | Filter = is_convolution,
        example_inputs: Any = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        check_call(model)
        filter_fn = filter_named(filter_fn)
        quiet = config is not None and config.init_std == config.inner_std == 0
        if example_inputs is not None:
            sharing = sampling == "shared" and not quiet
            noisy = [*noise_layers(model)] or matching(model, filter_fn) if sharing else ()
            if said := check_answer(model, example_inputs, noisy):
                warnings.warn(said, Remark, stacklevel=2)
        if quiet and not any(filter_fn(module, fqn) for fqn, module in model.named_modules()):
            pass  # no place for noise that is not wanted
        elif config is not None or not random_layers(model):
            inject_noise_(model, config, filter_fn=filter_fn, example_inputs=example_inputs)
        super().__init__(model, sampling)
        self.watches_order = is_by_registration(model)
        self.draws = check_count("draws", draws)
        self.bounds = check_bounds(bounds)
        self.training = model.training
        for layer in random_layers(model):  # wherever in the network they are, and whatever its parts' modes
            layer.training = model.training

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and (is_recording() or not in_eval_mode_now(self)):
            if not (torch.compiler.is_compiling() or is_recording()):
                self._lead_layers(True)  # parts may have been put into eval mode since
            return self.draw_logits(inputs)
        draws = self.draws if self.is_random or self._asks(inputs) else 1
        each = [self.draw_logits(inputs).float().log_softmax(dim=-1) for _ in range(draws)]
        return torch.stack(each).logsumexp(dim=0) - math.log(draws)

    def _asks(self, inputs: Tensor) -> bool:
        """Whether the network proves random when it is asked, where it can be: not while it is traced."""
        traced = (
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or torch._C._functorch.peek_interpreter_stack() is not None
        )
        return not traced and self.has_other_noise(inputs.detach())

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

        Always in eval mode; the previous mode is restored afterwards.

        Args:
            inputs: (B, ...), floating point, within `bounds`; chunks go to the model's device and dtype.
            draws: by default `self.draws`; 1 if two passes do not differ.
            max_batch: images per forward pass; by default half of the batch, which with its noisy copies
                needs no more memory than one plain pass over the whole batch; on a CPU at most 32 images of
                32x32 or the same number of pixels, on the fast path in bfloat16 128.
            seed: None for fresh noise (what a defense needs), an integer for noise that repeats: with shared
                sampling, the same for any batch and `max_batch`; in another memory format (channels_last) a
                seed gives different noise.
            sampling: overrides the ensemble's.
            stop: when an image stops drawing. None takes all draws. "exact" stops when the remaining draws
                cannot change the label: it is the label of all draws, while probabilities are means of fewer.
                "calibrated" stops by the margins in `stopping`, which also set the maximum number of draws.
            antithetic: draw in pairs of opposite noise: the mean is closer to that of infinitely many draws;
                the spread is that of dependent draws. Off by default; with "calibrated", as it was
                calibrated.

        Returns:
            (B, K) float32 probabilities, on the device of `inputs`.

        Raises:
            TypeError, ValueError: inputs of a wrong dtype, shape or range, counts below 1, or a rule that was
                calibrated before the ensemble changed.
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
        rule = rule_for(stop, most, draws is not None, self, sampling)
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
            if not (varies := drawn.varies()):
                rule = Fixed(1)
            found = [moments(drawn, group, rule, k) for k, group in enumerate(drawn.groups(inputs))]
        mean, spread, used = (torch.cat(each).to(inputs.device) for each in zip(*found, strict=True))
        if not varies:
            spread = torch.zeros_like(mean)
        return Prediction(mean.argmax(dim=-1), mean, spread, used)

    def save_pretrained(self, folder: str | Path, *, licence: str | None = None, **about: Any) -> None:
        """Write weights, noise levels and a model card to `folder`.

        Args:
            folder: files of an earlier save are replaced.
            licence: of the weights, for the card; None omits it.
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
        model: nn.Module | str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        trust_network: bool = False,
    ) -> "SelfEnsemble":
        """Load what `save_pretrained` wrote: a folder, or "owner/name" on the Hugging Face Hub.

        Args:
            name: a folder of this name takes precedence.
            model, trust_network: see `load`.
            revision, token: of the Hub.

        Raises:
            FileNotFoundError, ValueError: nothing there, or nothing that can be read.
        """
        from ..artefacts.download import fetch
        from ..artefacts.storage import load
        from ..artefacts.zoo import zoo

        here = Path(name).exists() or str(name) in zoo()
        folder = name if here else fetch(str(name), revision=revision, token=token)
        return load(folder, model, trust_network=trust_network)

    def push_to_hub(
        self, name: str, *, private: bool | None = None, token: str | None = None, **about: Any
    ) -> str:
        """Upload weights, noise levels and a model card as "owner/name"; the address of the commit.

        A card with measured accuracies needs the evaluation of a saved ensemble: see `upload.push`.
        """
        from ..artefacts.upload import push

        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name.rpartition("/")[2]
            self.save_pretrained(folder, **about)
            return push(folder, name, private=private, token=token)
