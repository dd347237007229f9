"""What stands behind the routes: images are opened, answered and named, within limits."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import torch
from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch import Tensor

from ..certainty.conformal import ConformalSets
from ..certainty.decision import decide
from ..ensemble.draws import NotFiniteError, check_finite
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.promises import rule_for
from ..ensemble.stopping import Fixed, Rule, Stop
from ..noise.injection import noise_layers
from . import schemas
from .batching import Answer, Batcher
from .certifying import Certifier
from .images import ImageError, TooLargeError, scaled
from .keyed import check_one_answer, keyed_seed
from .logs import LOG
from .opening import Opener
from .settings import Settings
from .turns import BusyError, ClosedError, ModelError


class Service:
    """One ensemble and its settings."""

    def __init__(
        self,
        ensemble: SelfEnsemble,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        settings: Settings,
        name: str = "",
        metrics: Mapping[str, Any] | None = None,
        centre: float = 1.0,
    ) -> None:
        self.name, self.metrics, self.centre = name, dict(metrics or {}), centre
        self.ensemble, self.classes, self.shape, self.settings = ensemble, classes, shape, settings
        # Says what is wrong.
        rule_for(settings.stop, settings.draws or ensemble.draws, settings.draws is not None, ensemble)
        self.batcher: Batcher | None = None
        self._certifier = Certifier(ensemble, self._name)
        self.opener = Opener(shape, settings.max_pixels, centre)
        self.samples: list[dict[str, str]] = []  # that the page offers
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "selfensemble_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "selfensemble_request_seconds", "Time of a request", ["path"], registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )  # fmt: skip
        self.draws = Histogram(
            "selfensemble_draws", "Noise draws of an image", registry=self.registry,
            buckets=(1, 2, 3, 4, 6, 8, 10, 20, 50, 100, 1000),
        )  # fmt: skip
        for name, about in (("waiting", "Images in the queue"), ("passes", "Passes of the network so far")):
            gauge = Gauge(f"selfensemble_{name}", about, registry=self.registry)
            gauge.set_function(lambda name=name: getattr(self.batcher, name, 0))  # type: ignore[misc]

    def start(self) -> None:
        """Begin to take requests."""
        self.opener = Opener(self.shape, self.settings.max_pixels, self.centre)
        self.batcher = Batcher(self.ensemble, self._example, self.settings.max_waiting)

    def stop(self) -> None:
        """End what was taken."""
        self.opener.close()
        if self.batcher is not None:
            self.batcher.close()

    @property
    def _example(self) -> Tensor:
        return torch.zeros(1, *self.shape, dtype=torch.float32, device="cpu")

    @property
    def is_alive(self) -> bool:
        """Whether anything will ever be computed again: if not, the process must be started again."""
        return self.batcher is None or self.batcher.is_alive

    async def why_not_ready(self) -> str | None:
        """Why a request would get no answer, or None where it would.

        Of a network whose last pass failed it is seen whether it can make another one.
        """
        batcher, limits = self.batcher, self.settings
        if batcher is None:
            return "the server has not started"
        if not batcher.is_alive:
            return "the thread that computes has ended: the server must be started again"
        if batcher.waiting >= limits.max_waiting:
            return "the queue is full"
        if batcher.stuck(limits.timeout):
            return f"a pass of the network has taken longer than {limits.timeout:g} s"
        if not batcher.failing:
            return None
        try:
            await self.predicted(self._example, Fixed(1))
        except HTTPException:
            return "the network fails: see the log"
        return None

    def about(self) -> dict[str, Any]:
        """Of `/v1/model`."""
        return {
            "name": self.name, "metrics": self.metrics, "noise": self._levels(),
            "classes": self.classes, "shape": self.shape, "draws": self.draws_of_all,
            "stop": self.settings.stop, "calibrated": holds(lambda: self.rule("calibrated", None)),
            "sets": holds(lambda: ConformalSets.of(self.ensemble)), "keyed": self.settings.secret is not None,
            "limits": self.settings.model_dump(
                include={name for name in Settings.model_fields if name.startswith("max_")} | {"timeout"}
            ),
            "page": {"attack": self.settings.attacks, "samples": self.samples},
        }  # fmt: skip

    def _levels(self) -> list[float]:
        """Standard deviations of the noise, the largest of its channels each, in the order of the layers."""
        layers = noise_layers(self.ensemble.model).values()
        return [
            float(torch.as_tensor(layer.std, dtype=torch.float64, device="cpu").detach().max())
            for layer in layers
        ]

    def check_count(self, images: int) -> None:
        """Raise unless a request may have as many images."""
        most = min(self.settings.max_images, self.settings.max_waiting)  # more would never find room
        if images > most:
            raise HTTPException(413, f"{images} images, at most {most} a request are taken")

    async def answer(self, files: list[bytes] | list[str], options: schemas.Options) -> schemas.Response:
        """Open files (or their base64), compute, and name the classes."""
        self._check(options)
        async with self._limited():
            opened = await self._open(files)
            inputs = scaled(opened, self.ensemble.bounds)
            seeds = self._seeds(opened)
            if options.sets:
                ConformalSets.of(self.ensemble)  # says what is wrong before anything is computed
            answers = await self._predict(inputs, seeds, options)
            decided = await self._one_by_one(self._decide, inputs, seeds, options.decide, long=False)
            certified = await self._one_by_one(self._certifier, inputs, seeds, options.certify)
            possible = await self._one_by_one(
                lambda image, seed, asked: self._possible(image, seed), inputs, seeds, options.sets or None
            )
        for each in answers:
            self.draws.observe(each.draws)
        return schemas.Response(
            images=[
                self._named(answer, options.top, decided[place], certified[place], possible[place])
                for place, answer in enumerate(answers)
            ]
        )

    @asynccontextmanager
    async def _limited(self) -> AsyncIterator[None]:
        """Within the time of a request, and with what goes wrong as HTTP says it."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                yield
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.settings.timeout:g} s") from None
        except BusyError as error:
            headers = {"Retry-After": str(self.settings.retry_after)}
            raise HTTPException(429, f"{error}: come back later", headers) from None
        except ClosedError as error:
            raise HTTPException(503, str(error)) from None
        except NotFiniteError as error:
            LOG.error("%s", error)
            raise HTTPException(500, "the network returns no numbers for such an image") from None
        except ModelError as error:
            LOG.error("a pass of the network failed", exc_info=error)
            raise HTTPException(500, "the network failed: see the log of the server") from None
        except ValueError as error:  # what this network cannot do
            raise HTTPException(422, str(error)) from None

    async def one_image(self, text: str, draws: int | None) -> tuple[Tensor, int | None]:
        """(1, C, H, W) of an image in base64 that `draws` are asked of, and its seed where noise is keyed."""
        self._check(schemas.Options(draws=draws, stop=None))
        async with self._limited():
            opened = await self._open([text])
        return scaled(opened, self.ensemble.bounds), self._seeds(opened)[0]

    def _seeds(self, opened: list[Tensor]) -> list[int | None]:
        """Of each image, where its noise is keyed."""
        secret = self.settings.secret
        return [None if secret is None else keyed_seed(secret, image) for image in opened]

    async def predicted(self, inputs: Tensor, rule: Rule) -> list[Answer]:
        """Answers to images, in passes that others share."""
        async with self._limited():
            return await self._shared(inputs, rule)

    async def _shared(self, inputs: Tensor, rule: Rule) -> list[Answer]:
        futures = self._batcher.submit(inputs, rule)
        try:
            found: list[Answer] = await asyncio.gather(*(self._wait(future) for future in futures))
        except (ClosedError, NotFiniteError):
            raise
        except Exception as error:  # they were taken: what goes wrong now is the network's
            raise ModelError(f"{type(error).__name__}: {error}") from error
        return found

    async def run(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, which makes passes of its own."""
        async with self._limited():
            return await self._wait(self._batcher.run(work))

    def _check(self, options: schemas.Options) -> None:
        limits = self.settings
        asked: list[tuple[str, int | None, int]] = [("draws", options.draws, limits.max_draws)]
        if options.decide is not None:
            asked.append(("decide.max_draws", options.decide.max_draws, limits.max_draws))
        if options.certify is not None:
            asked.append(("certify.n", options.certify.n, limits.max_certify))
            asked.append(("certify.n0", options.certify.n0, limits.max_certify))
        for name, value, most in asked:
            if value is not None and value > most:
                raise HTTPException(422, f"{name} may be at most {most} here, got {value}")
        if limits.secret is not None:
            check_one_answer(options, self.draws_of_all, limits.stop)

    @property
    def draws_of_all(self) -> int:
        """Of an image where the request does not say."""
        return self.settings.draws or self.ensemble.draws

    async def _open(self, files: list[bytes] | list[str]) -> list[Tensor]:
        try:
            return await self.opener.open(files)
        except TooLargeError as error:
            raise HTTPException(413, str(error)) from None
        except ImageError as error:
            raise HTTPException(422, str(error)) from None

    @property
    def _batcher(self) -> Batcher:
        if self.batcher is None:
            raise ClosedError("the server has not started")
        return self.batcher

    async def _predict(
        self, inputs: Tensor, seeds: list[int | None], options: schemas.Options
    ) -> Sequence[Answer]:
        if self.settings.secret is not None:
            job = self._batcher.run(lambda: self._keyed(inputs, seeds))
            keyed: list[Answer] = await self._wait(job)
            return keyed
        # A number of draws in the request alone takes them all.
        stop = options.stop if options.stop or options.draws else self.settings.stop
        return await self._shared(inputs, self.rule(stop, options.draws))

    def rule(self, stop: Stop | None, draws: int | None) -> Rule:
        """When images stop drawing; `draws`: what a request says of them, None where it says nothing."""
        return rule_for(stop, draws or self.draws_of_all, draws is not None, self.ensemble)

    def _keyed(self, inputs: Tensor, seeds: list[int | None]) -> list[Answer]:
        """Each image on its own, with noise of its own seed."""
        found, draws, stop = [], self.settings.draws, self.settings.stop
        for image, seed in zip(inputs, seeds, strict=True):
            answer = self.ensemble.predict(image[None], draws=draws, stop=stop, seed=seed)
            check_finite(answer.probabilities)
            found.append(Answer(answer.probabilities[0], answer.spread[0], int(answer.draws[0])))
        return found

    async def _one_by_one(
        self,
        work: Callable[[Tensor, int | None, Any], Any],
        inputs: Tensor,
        seeds: list[int | None],
        asked: Any,
        *,
        long: bool = True,
    ) -> list[Any]:
        """A job an image: others get their turns between two, and none begins when the time is over."""
        if asked is None:
            return [None] * len(inputs)
        jobs = [partial(work, image[None], seed, asked) for image, seed in zip(inputs, seeds, strict=True)]
        return [await self._wait(self._batcher.run(job, long=long)) for job in jobs]

    @staticmethod
    async def _wait(future: "Future[Any]") -> Any:
        return await asyncio.wrap_future(future)

    def _decide(self, inputs: Tensor, seed: int | None, asked: schemas.Decide) -> schemas.DecisionAnswer:
        found = decide(self.ensemble, inputs, alpha=asked.alpha, max_draws=asked.max_draws, seed=seed)
        return schemas.DecisionAnswer(
            label=self._name(int(found.label)), leader=self.classes[int(found.leader)], low=float(found.low),
            high=float(found.high), draws=int(found.draws), alpha=asked.alpha,
        )  # fmt: skip

    def _possible(self, inputs: Tensor, seed: int | None) -> schemas.SetAnswer:
        sets = ConformalSets.of(self.ensemble)
        (held,) = sets.predict(inputs, seed=seed).tolist()
        low, high = self.ensemble.bounds or (0.0, 1.0)
        return schemas.SetAnswer(
            labels=[label for label, inside in zip(self.classes, held, strict=True) if inside],
            alpha=sets.alpha, radius=sets.radius / (high - low), draws=sets.draws,
        )  # fmt: skip

    def _name(self, label: int) -> str | None:
        return self.classes[label] if label >= 0 else None

    def _named(
        self, answer: Answer, top: int, decided: Any, certified: Any, possible: Any
    ) -> schemas.ImageAnswer:
        best = answer.probabilities.topk(min(top, len(self.classes))).indices.tolist()
        spread = [float(each) for each in answer.spread]
        shown = [
            schemas.ClassAnswer(
                label=self.classes[k], probability=float(answer.probabilities[k]),
                spread=spread[k] if math.isfinite(spread[k]) else None,
            )
            for k in best
        ]  # fmt: skip
        return schemas.ImageAnswer(
            label=shown[0].label, probability=shown[0].probability, draws=answer.draws, classes=shown,
            decision=decided, certificate=certified, set=possible,
        )  # fmt: skip


def holds(asked: Callable[[], object]) -> bool:
    """Whether what is asked for is there, and was calibrated on what answers."""
    try:
        asked()
    except ValueError:
        return False
    return True
