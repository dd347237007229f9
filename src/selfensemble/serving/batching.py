"""One thread that computes, for many that ask: images of many requests and their draws share passes.

Every pass holds one noise draw, or several, of all images that are being answered. An image that is settled
leaves, and another that waits takes its place before the next pass: nobody waits for a batch to fill or to
end. Whose answer nobody waits for any more leaves as well. The draws of each image are independent of each
other, or opposite in pairs where a rule says so; that images of one pass share their noise is no matter to
any of them.

What has images for itself (decisions, certificates, keyed noise) is computed by separate threads, which
take turns with this one: a pass each.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ensemble.checks import check_images
from ..ensemble.draws import Draws, NotFiniteError
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.promises import check_stopping
from ..ensemble.stopping import Calibrated, Fixed, Rule, worth_taking
from ..noise.injection import eval_mode
from ..noise.streams import fresh_seed, noise_draw
from ..runtime.errors import UnevenBatchError
from .turns import BusyError, ClosedError, Lane, Turns, settle

_log = logging.getLogger("selfensemble.serving")


class Answer(NamedTuple):
    """Of one image: (K,) mean probabilities, (K,) their spread over the draws, and how many those were."""

    probabilities: Tensor
    spread: Tensor
    draws: int


@dataclass
class _Waiting:
    image: Tensor
    rule: Rule
    answer: "Future[Answer]" = field(default_factory=Future)


class Batcher:
    """Answers images as they come, in a thread of its own.

    Args:
        ensemble: in the form that predicts, in eval mode while this runs.
        example: (1, ...) an image like those to come.
        most_waiting: images that may wait; more are refused.

    `close` (or leaving the context) takes nothing more and ends what was taken.

    Attributes:
        failing: whether the last pass raised an error.
    """

    def __init__(self, ensemble: SelfEnsemble, example: Tensor, most_waiting: int = 256) -> None:
        self.ensemble, self.most_waiting = ensemble, most_waiting
        self._draws = Draws(ensemble, example.repeat(2, *[1] * (example.dim() - 1)))
        self._shape = tuple(example.shape[1:])
        self._floating = example.is_floating_point()
        self._room = self._draws.capacity
        self._shared = ensemble.sampling == "shared"
        self._folds = self._shared and self._draws.at_once(1, 2) > 1
        with eval_mode(ensemble):
            self._draws.varies()  # asked once: what is found out is kept
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = self.failing = False
        self._began: float | None = None  # of the pass that is being made
        self.passes = self.images = self.drawn = 0
        self._turns = Turns()
        self._short, self._long = (Lane(name, self._turns, most_waiting) for name in ("short", "long"))
        self._active = _Active()
        self._thread = threading.Thread(target=self._run, name="selfensemble-batcher", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    @property
    def is_alive(self) -> bool:
        """Whether what is asked will ever be computed."""
        return self._thread.is_alive() and self._short.is_alive and self._long.is_alive

    def stuck(self, seconds: float) -> bool:
        """Whether a pass has taken longer than that and has not ended."""
        began = self._began
        return began is not None and monotonic() - began > seconds

    def submit(self, images: Tensor, rule: Rule) -> "list[Future[Answer]]":
        """Answers to come of (B, ...) images, all of them taken or none.

        Raises:
            BusyError: the queue has no room for them.
            ClosedError: after `close`.
            TypeError, ValueError: images that the ensemble cannot take, or a rule that was calibrated on
                another than the ensemble is now.
        """
        check_images(images, self.ensemble.bounds)
        if isinstance(rule, Calibrated):
            check_stopping(rule, self.ensemble)
        if images.is_floating_point() != self._floating:
            raise TypeError(f"images must be {'' if self._floating else 'no '}floats, got {images.dtype}")
        if tuple(images.shape[1:]) != self._shape:
            raise ValueError(f"images must have shape {self._shape}, got {tuple(images.shape[1:])}")
        prepared = [_Waiting(image, rule) for image in self._draws.prepared(images)]
        with self._changed:
            self._check_open()
            if len(self._queue) + len(prepared) > self.most_waiting:
                self._queue = deque(each for each in self._queue if not each.answer.cancelled())
            if len(self._queue) + len(prepared) > self.most_waiting:
                raise BusyError(f"{len(self._queue)} images wait, at most {self.most_waiting} may")
            self._queue.extend(prepared)
            self._changed.notify()
        return [each.answer for each in prepared]

    def run(self, job: Callable[[], Any], *, long: bool = False) -> "Future[Any]":
        """What `job` returns, to come: the passes of its `Draws` take turns with those of everybody else.

        Args:
            job: is called in another thread. When its answer is cancelled, it ends before its next pass.
            long: whether it may take much longer than an answer; short ones do not wait for those.

        Raises:
            BusyError, ClosedError: see `submit`.
        """
        with self._changed:
            self._check_open()
        return (self._long if long else self._short).run(job)

    def close(self) -> None:
        """Take nothing more, and return when all that was taken is answered or cancelled."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._short.close()
        self._long.close()

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("the server is stopping")
        if not self.is_alive:
            raise ClosedError("the thread that computes has ended: the server must be started again")

    def _run(self) -> None:
        try:
            with eval_mode(self.ensemble), torch.no_grad():
                while self._round():
                    pass
        except BaseException:  # nothing is computed any more; whoever waits is told
            _log.critical("the thread that computes has ended", exc_info=True)
        finally:
            with self._changed:
                left, self._queue = list(self._queue), deque()
            ended = ClosedError("the thread that computes has ended")
            for each in left:
                settle(each.answer, error=ended)
            self._active.fail(ended)

    def _round(self) -> bool:
        """Take who waits, and make a pass; False when closing and nothing is left."""
        active = self._active
        with self._changed:
            while not (self._queue or len(active) or self._closing):
                self._changed.wait()
            if not (self._queue or len(active)):
                return False
            active.forget()
            taken: list[_Waiting] = []
            while self._queue and len(active) + len(taken) < self._room:
                waits = self._queue.popleft()
                if not waits.answer.cancelled():
                    taken.append(waits)
        try:
            self._began = monotonic()
            with self._turns:
                active.admit(taken)
                self._fix(taken)
                if len(active):
                    self._step(active)
                    self.failing = False
        except Exception as error:  # of the network: those who asked are told, others go on
            self.failing = True
            active.fail(error)
            for each in taken:
                settle(each.answer, error=error)
        finally:
            self._began = None
        return True

    def _fix(self, taken: "list[_Waiting]") -> None:
        """One draw is enough of a network that answers these images alike however often it is asked."""
        if taken and not self.ensemble.varies(torch.stack([each.image for each in taken[:2]])):
            for each in taken:
                each.rule = Fixed(1)

    def _step(self, active: "_Active") -> None:
        """One pass, or a pair of them."""
        pairs = active.antithetic
        count = max(1, min(active.block, self._room // len(active)))
        if pairs:
            count = max(2, count - count % 2)
        images = active.images
        outputs = None
        if self._folds or count == 1:
            drawn = noise_draw(
                None, 0, self.ensemble.sampling, count=count, antithetic=pairs, repeatable=False
            )
            try:
                with drawn:
                    repeated = images if count == 1 else images.repeat(count, *[1] * (images.dim() - 1))
                    outputs = self.ensemble.draw_logits(repeated).float().softmax(dim=-1)
                    outputs = outputs.view(count, len(images), -1)
            except UnevenBatchError:  # the network divides its batch
                self._folds = False
        if outputs is None:
            each, seed = [], fresh_seed() if pairs else None
            for index in range(count):
                drawn = noise_draw(
                    seed, index, self.ensemble.sampling, antithetic=pairs, portable=False, repeatable=False
                )
                with drawn:
                    each.append(self.ensemble.draw_logits(images).float().softmax(dim=-1))
            outputs = torch.stack(each)
        self.passes += 1
        self.drawn += count * len(images)
        self.images += active.add(outputs)


class _Active:
    """The images that are being answered."""

    def __init__(self) -> None:
        self._waits: list[_Waiting] = []
        self.images = torch.empty(0, dtype=torch.float32, device="cpu")
        self._mean = self._squares = torch.empty(0, dtype=torch.float32, device="cpu")
        self._used = torch.zeros(0, dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self._waits)

    @property
    def antithetic(self) -> bool:
        """Whether anybody's draws come in pairs; those of all do then, which changes nobody's mean."""
        return any(isinstance(each.rule, Calibrated) and each.rule.antithetic for each in self._waits)

    @property
    def block(self) -> int:
        """The most draws that an image still wants in one pass."""
        pairs = zip(self._waits, self._used.tolist(), strict=True)
        return max(worth_taking(each.rule, int(used)) for each, used in pairs)

    def forget(self) -> None:
        """Leave out those whose answer nobody waits for."""
        gone = torch.tensor([each.answer.cancelled() for each in self._waits], dtype=torch.bool, device="cpu")
        self._keep(~gone)

    def admit(self, taken: list[_Waiting]) -> None:
        """Begin with some more."""
        if not taken:
            return
        images = torch.stack([each.image for each in taken])
        self.images = torch.cat([self.images, images]) if self._waits else images
        self._waits = self._waits + taken
        self._used = torch.cat([self._used, torch.zeros(len(taken), dtype=torch.int64, device="cpu")])

    def add(self, outputs: Tensor) -> int:
        """Take (c, A, K) outputs of the next draws; answer who is settled, and say how many."""
        outputs = outputs.cpu()
        fresh = len(self._used) - len(self._mean)
        if fresh:
            zeros = outputs.new_zeros(fresh, outputs.shape[2])
            self._mean = torch.cat([self._mean.view(-1, outputs.shape[2]), zeros])
            self._squares = torch.cat([self._squares.view(-1, outputs.shape[2]), zeros])
        done = torch.zeros(len(self._used), dtype=torch.bool, device="cpu")
        for output in outputs:
            self._used += ~done
            step = (output - self._mean) / self._used.unsqueeze(1)
            step[done] = 0
            mean = self._mean + step
            self._squares += step * self._used.unsqueeze(1) * (output - mean)
            self._mean = mean
            done |= self._settled()
        broken = ~outputs.isfinite().all(dim=2).all(dim=0)
        for place in torch.nonzero(broken)[:, 0].tolist():
            settle(self._waits[place].answer, error=NotFiniteError("the model returns NaN for this image"))
        self._answer(done & ~broken)
        ended = done | broken
        self._keep(~ended)
        return int(ended.sum())

    def _settled(self) -> Tensor:
        settled = torch.zeros(len(self._used), dtype=torch.bool, device="cpu")
        used = self._used.tolist()
        groups: dict[tuple[int, int], list[int]] = {}
        for place, (each, count) in enumerate(zip(self._waits, used, strict=True)):
            groups.setdefault((id(each.rule), count), []).append(place)
        for (_, count), places in groups.items():
            rule = self._waits[places[0]].rule
            chosen = torch.tensor(places, device="cpu")
            settled[chosen] = count >= rule.most or rule.settled(self._mean[chosen], count)
        return settled

    def _answer(self, done: Tensor) -> None:
        spread = (self._squares / (self._used - 1).unsqueeze(1)).sqrt()
        for place in torch.nonzero(done)[:, 0].tolist():
            answer = Answer(self._mean[place].clone(), spread[place].clone(), int(self._used[place]))
            settle(self._waits[place].answer, answer)

    def _keep(self, stay: Tensor) -> None:
        if stay.all():
            return
        self._waits = [each for each, stays in zip(self._waits, stay.tolist(), strict=True) if stays]
        self.images = self.images[stay.to(self.images.device)]
        self._mean, self._squares, self._used = self._mean[stay], self._squares[stay], self._used[stay]

    def fail(self, error: Exception) -> None:
        """Tell all of them."""
        for each in self._waits:
            settle(each.answer, error=error)
        self.__init__()  # type: ignore[misc]
