"""Noise draws of a batch, and their mean and spread; images leave as they are settled."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from ..data.images import Inputs
from ..noise.injection import eval_mode
from ..noise.streams import Sampling, derived_seed, fresh_seed, noise_draw
from ..runtime.errors import UnevenBatchError
from .checks import explain_shape
from .classifier import RandomClassifier
from .randomness import global_noise, other_seed
from .stopping import Fixed, Rule, worth_taking

_ON_ACCELERATORS = 64  # times the elements of a pass on a CPU
_PHOTOS, _LARGE = 8, 2**21  # images a pass, if they hold so many numbers at most
_PASSES = 64  # of which the images are on the device at a time
_around: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar("around", default=nullcontext)


@contextmanager
def passes_within(context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Within this, `Draws` of this thread make each pass within a `context()` of its own.

    So that others get their turns in the middle of a long calculation, and that it can be given up there.
    """
    token = _around.set(context)
    try:
        yield
    finally:
        _around.reset(token)


class Draws:
    """Softmax outputs of single draws, a few images and several draws a pass.

    Args:
        ensemble: in eval mode.
        example: a batch of the images to come.
        max_batch: images a pass; None for what `SelfEnsemble.predict` says.
        seed: None for fresh noise.
        sampling: overrides the ensemble's.
        antithetic: in pairs, see `noise_draw`.
        count: images to come, where the example is not all of them.
        asks_again: whether the network is asked if it has noise of another kind though it was asked before,
            for what holds with a stated risk: what is no plain value of it may have switched it on.

    Attributes:
        size: images a pass, of one draw.
        capacity: images a pass where it holds several draws of few images.
        pairs_by_place: whether opposite noise goes to the image in the same place of the next pass.
    """

    def __init__(
        self,
        ensemble: RandomClassifier,
        example: Tensor,
        max_batch: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        antithetic: bool = False,
        count: int | None = None,
        asks_again: bool = False,
    ) -> None:
        count = len(example) if count is None else count
        self._portable = self._repeats = seed is not None
        shared = (sampling or ensemble.sampling) == "shared"
        # A pass of whole pairs needs no streams, which take time to start.
        self._fresh_pairs = antithetic and seed is None and shared
        if antithetic and seed is None:
            seed = fresh_seed()
        self.ensemble, self.seed, self.sampling, self._example = ensemble, seed, sampling, example
        self._antithetic = antithetic
        self._explained = partial(explain_shape, ensemble)
        self.device = next((tensor.device for tensor in ensemble.parameters()), example.device)
        wanted = ensemble.input_dtype if example.is_floating_point() else None
        self._dtype = wanted or example.dtype
        numbers = max(1, example[:1].numel())
        # Photos are more than a chunk, and faster some at a time.
        in_chunk = max(1, ensemble.chunk // numbers, min(_PHOTOS, _LARGE // numbers))
        if max_batch is not None:
            self.size = self.capacity = max_batch
        elif self.device.type != "cpu":
            self.size, self.capacity = max(in_chunk, count // 2), _ON_ACCELERATORS * in_chunk
        elif ensemble.has_half_activations:
            self.size = self.capacity = in_chunk
        else:  # very small batches are not divided
            self.size, self.capacity = max(1, in_chunk // 4, min(count // 2, in_chunk)), in_chunk
        # Per-image noise of a seed depends on the batch: images of two parts must not have the same, and
        # several draws in one batch would not be those of their own.
        self._by_part = seed is not None and not shared
        if self._by_part:
            self.capacity = 1
        self.pairs_by_place = antithetic and not shared
        self._shared, self._asks_again = shared, asks_again
        self._reseeds: bool | None = None
        self._watched = False  # whether a pass has shown if the network draws from torch's global generators
        self._folds: bool | None = None

    def groups(self, inputs: Tensor | Inputs) -> Iterator[Tensor]:
        """`inputs` in parts that are taken to the device as a whole."""
        return iter(inputs.split(self.size * _PASSES))

    def prepared(self, group: Tensor) -> Tensor:
        """A group on the device of the ensemble, in its dtype."""
        return group.to(self._dtype).to(self.device)  # which may not know the dtype that they have

    def varies(self) -> bool:
        """Whether draws differ at all; one stands for all of them otherwise."""
        with self._explained(self._example):
            return self.ensemble.varies(self.prepared(self._example[:2]))

    def reseeds(self) -> bool:
        """Whether a seed has to hold for torch's global generators as well."""
        if self._reseeds is None:
            few = self.prepared(self._example[:2])
            self._reseeds = self.ensemble.has_other_noise(few, trusting=True)
        return self._reseeds

    @torch.no_grad()
    def folds(self) -> bool:
        """Whether draws in one batch are those of their own: not if the network rearranges its batch.

        The first draw of a batch must not notice which is the second. Found out once for each shape, and
        again when something was set on the network; noise that is drawn once a pass is asked for each time.
        """
        if self._folds is None:
            self._folds = self._find_folds()
        return self._folds

    def _kind(self) -> tuple[tuple[int, ...], int]:
        """What `folds` of the ensemble is by."""
        return tuple(self._example.shape[1:]), self.ensemble.settings()

    def _find_folds(self) -> bool:
        known, key = self.ensemble.folds, self._kind()
        shape = key[0]
        if len(self._example) and key not in known:
            for old in [each for each in known if each[0] == shape]:
                known.pop(old, None)
            few = self.prepared(self._example[:2])
            answers = []
            try:
                if self.ensemble.has_other_noise(few):  # which a pass may draw once for all that is in it
                    known[key] = False
                    return False
                for step in (1, 2):
                    with noise_draw(0, 0, "shared", count=2, step=step):
                        repeated = few.repeat(2, *[1] * (few.dim() - 1))
                        answers.append(self.ensemble.draw_logits(repeated)[: len(few)])
            except (
                RuntimeError,
                ValueError,
                AssertionError,
            ):  # a pass of one draw will say what is the matter, if anything
                known[key] = False
            else:
                known[key] = torch.equal(*answers)
        elif known.get(key) and self.ensemble.has_other_noise(
            self.prepared(self._example[:2]), trusting=not self._asks_again
        ):
            return False
        return known.get(key, False)

    def at_once(self, images: int, left: int) -> int:
        """Draws that go into one pass, of those that are left: several where there are few images."""
        count = min(left, max(1, self.capacity // max(1, images)))
        return 1 if count > 1 and not self.folds() else count

    @torch.no_grad()
    def take(self, images: Tensor, index: int, count: int, group: int = 0) -> Tensor:
        """(count, B, K) softmax outputs of the draws from number `index` on.

        Args:
            images: (B, ...), prepared.
            index, count: of the draws.
            group: number of the group that these are images of.
        """
        try:
            return self._taken(images, index, count, group)
        except UnevenBatchError:  # the network divides its batch, in which draws lie one after another
            if count == 1:
                raise
            self._folds = self.ensemble.folds[self._kind()] = False
            return torch.cat([self._taken(images, index + each, 1, group) for each in range(count)])

    def _taken(self, images: Tensor, index: int, count: int, group: int) -> Tensor:
        passes = []
        fresh = self._fresh_pairs and index % 2 == count % 2 == 0
        for part, few in enumerate(images.split(self.size)):
            own = None if fresh else self.seed
            if own is not None and self._by_part:
                own = derived_seed(own, group * _PASSES + part, 0)
            repeated = few if count == 1 else few.repeat(count, *[1] * (few.dim() - 1))
            drawn = partial(
                noise_draw, own, index, self.sampling, count=count, antithetic=self._antithetic,
                portable=self._portable, repeatable=False,
            )  # fmt: skip
            with ExitStack() as stack:
                stack.enter_context(_around.get()())
                stack.enter_context(self._explained(self._example))
                make = partial(self._outputs, repeated, drawn)
                outputs = self._seeded(make, group * _PASSES + part, index) if self._repeats else make()
            passes.append(outputs.view(count, len(few), outputs.shape[-1]))
        return torch.cat(passes, dim=1)

    def _outputs(self, images: Tensor, drawn: Callable[[], AbstractContextManager[object]]) -> Tensor:
        with drawn():
            return self.ensemble.draw_logits(images).float().softmax(dim=-1)

    def _seeded(self, make: Callable[[], Tensor], part: int, index: int) -> Tensor:
        """A pass whose seed holds for torch's global generators too, where the network draws from them.

        Whether it does is known, but what is no plain value may have switched it on since: so the first
        pass takes such numbers from other generators, too, and tells whether it took any.
        """
        if self._watched and not self.reseeds():
            return make()
        assert self.seed is not None
        numbers = global_noise(other_seed(derived_seed(self.seed, part, 1), index))
        with numbers:
            outputs = make()
        self._watched, self._reseeds = True, self.reseeds() or numbers.drew
        return outputs


def moments(draws: Draws, group: Tensor, rule: Rule, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation over the draws, and how many draws each image took.

    Args:
        draws: of the ensemble. Where a pass holds several, what the rule does not want is thrown away.
        group: (B, ...).
        rule: when an image stops.
        number: of the group.

    Returns:
        (B, K), (B, K) and (B,) int64, where the ensemble is.
    """
    group = draws.prepared(group)
    active = present = torch.arange(len(group), device=group.device)
    used = torch.zeros_like(active)
    mean = squares = torch.empty(0, dtype=torch.float32, device=group.device)
    index = 0
    while index < rule.most:
        count = draws.at_once(len(active), worth_taking(rule, index))
        if not (draws.pairs_by_place and index % 2):
            present = active  # otherwise who is settled stays until the pair is whole
        images = group if len(present) == len(group) else group[present]
        outputs = draws.take(images, index, count, number)
        if len(active) < len(present):
            outputs = outputs[:, torch.isin(present, active)]
        if index == 0:
            mean, squares = outputs.new_zeros((2, *outputs.shape[1:]))
        for later in range(count):
            index += 1
            # Welford's recurrence.
            if len(active) == len(group):  # without the cost of choosing
                step = outputs[later] - mean
                mean += step / index
                squares += step * (outputs[later] - mean)
                used.fill_(index)
            else:
                step = outputs[later] - mean[active]
                mean[active] += step / index
                squares[active] += step * (outputs[later] - mean[active])
                used[active] = index
            if isinstance(rule, Fixed):
                continue
            if index < rule.most and (settled := rule.settled(mean[active], index)).any():
                active, outputs = active[~settled], outputs[:, ~settled]
        if len(active) == 0:
            break
    return mean, (squares / (used - 1).unsqueeze(1)).sqrt(), used


def one_by_one(ensemble: RandomClassifier, inputs: Tensor, size: int | None) -> int | None:
    """Images a pass for what holds of images with noise of their own each: `size`, or one.

    One where a pass draws noise once for all of its images, such as random weights: images that have it in
    common are not independent, whatever they are.
    """
    if size == 1:
        return size
    with eval_mode(ensemble), explain_shape(ensemble, inputs):
        few = Draws(ensemble, inputs).prepared(inputs[:1])
        return 1 if ensemble.images_share_noise(few, size or 4) else size


class NotFiniteError(ValueError):
    """The network returns NaN."""


def check_finite(outputs: Tensor) -> Tensor:
    """Return `outputs`, or raise a NotFiniteError: nothing can be certain where a model returns NaN."""
    if torch.isfinite(outputs).all():
        return outputs
    raise NotFiniteError("the model returns NaN: fix it before asking what is certain of its answers")
