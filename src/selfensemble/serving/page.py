"""The page at `/`: the vote of the draws as it forms, and attacks, one at a time."""

import asyncio
import base64
import copy
import io
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from importlib import resources
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import StreamingResponse
from PIL import Image
from torch import Tensor

from .. import attacks
from ..data import decoding
from ..data.folders import is_hidden
from ..data.images import in_bounds
from ..ensemble.draws import Draws, check_finite
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.stopping import Calibrated, Fixed
from ..noise.calls import to_eval_mode_
from ..noise.injection import eval_mode, make_static_, noise_disabled
from . import schemas
from .batching import Answer
from .problems import REFUSALS
from .service import Service
from .turns import AbandonedError, in_thread

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# Nothing but what this server sends, and nobody puts the page into a frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_SHOWN = 5  # classes
_DRAWS = 20  # that vote where the request does not say
_SAMPLES = 12
_SAMPLE_SIDE, _SAMPLE_PIXELS = 768, 2**20  # of larger ones, which every visitor of the page gets
# Shares of a minimum-norm attack's change that are tried for one that survives rounding to 8 bits.
_FARTHER = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5)


def add_page(app: FastAPI, service: Service) -> None:
    """Routes of the page, and those that only it needs."""
    page = _Page(service)
    static = resources.files(__package__) / "static"

    def file(name: str, kind: str) -> Any:
        content = (static / name).read_bytes()
        return lambda: Response(content, media_type=kind, headers=_HEADERS)

    for path, (name, kind) in FILES.items():
        app.add_api_route(path, file(name, kind), include_in_schema=False)

    @app.post("/v1/votes", response_class=StreamingResponse, responses=REFUSALS)
    async def votes(request: schemas.Votes) -> StreamingResponse:
        """One line of JSON a draw: votes and mean probabilities of the leading classes so far."""
        inputs, seed = await service.one_image(request.image, request.draws)
        draws = request.draws or (_DRAWS if seed is None else service.draws_of_all)
        return StreamingResponse(page.votes(inputs, seed, draws), media_type="application/x-ndjson")

    if service.settings.attacks:

        @app.post("/v1/attack", responses=REFUSALS)
        async def attack(request: schemas.Attack) -> schemas.Attacked:
            """Change an image so that the ensemble, or the network without noise, errs; one at a time."""
            inputs, _ = await service.one_image(request.image, None)
            if request.attack == "pgd" and request.eps > (reach := _reach(page.pixels(inputs))):
                raise HTTPException(422, f"eps: no image is farther from this one than {reach:.2f} in L2")
            return await page.attack(inputs, request)


def samples(folder: Path | None, shape: tuple[int, int, int]) -> list[dict[str, str]]:
    """Names and PNG files in base64 of images to try: of a folder, or digits where those are read."""
    if folder is not None:
        kinds = (".png", ".jpg", ".jpeg")
        chosen = sorted(
            each for each in folder.iterdir() if each.suffix.lower() in kinds and not is_hidden(each.name)
        )
        if not chosen:
            raise ValueError(f"{folder} holds no PNG or JPEG file to show as a sample")
        return [_sample(each, shape[0]) for each in chosen[:_SAMPLES]]
    if shape == (1, 8, 8):
        from ..data.sources import load_data

        test = load_data("digits", "test")
        return [
            {
                "name": f"sample {place + 1}",
                "caption": f"sample {place + 1} of {_SAMPLES}, from the test images",
                "image": _png(Image.fromarray(test.images[place][0].numpy())),
            }
            for place in range(_SAMPLES)
        ]
    return []


def _sample(file: Path, channels: int) -> dict[str, str]:
    """An image to try, upright and of moderate size.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        with Image.open(file) as opened:
            image = decoding.plain(opened, channels)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"the sample {file} cannot be read ({decoding.reason(error)}): remove it") from error
    if image.width * image.height > _SAMPLE_PIXELS:
        image.thumbnail((_SAMPLE_SIDE, _SAMPLE_SIDE))
    return {"name": file.stem, "caption": f"sample from the file {file.name}", "image": _png(image)}


class _Page:
    def __init__(self, service: Service) -> None:
        self.service = service
        self._running: Future[schemas.Attacked] | None = None
        self._given_up = threading.Event()
        self._targets: dict[str, SelfEnsemble] = {}

    async def votes(self, inputs: Tensor, seed: int | None, draws: int) -> AsyncIterator[bytes]:
        """Lines of the stream; what goes wrong is one of them, for it is too late for a status."""
        try:
            async for state in self._votes(inputs, seed, draws):
                yield _line(state)
        except HTTPException as error:
            yield _line(schemas.Vote(error=str(error.detail)))

    async def _votes(self, inputs: Tensor, seed: int | None, draws: int) -> AsyncIterator[schemas.Vote]:
        service, ends = self.service, monotonic() + self.service.settings.timeout
        plain = await service.run(lambda: self._without_noise(inputs))
        yield schemas.Vote(plain=self._answer(plain), reach=_reach(self.pixels(inputs)))
        total = votes = torch.zeros(len(service.classes), dtype=torch.float32, device="cpu")
        for number in range(1, draws + 1):
            if monotonic() > ends:
                raise HTTPException(504, f"no more draws within {service.settings.timeout:g} s")
            one = await self._draw(inputs, seed, number - 1)
            total = total + one
            votes = votes.scatter_add(
                0, one.argmax().unsqueeze(0), torch.ones(1, dtype=torch.float32, device="cpu")
            )
            mean = total / number
            order = (votes + mean).argsort(descending=True)[:_SHOWN].tolist()
            yield schemas.Vote(
                draws=number,
                classes=[
                    schemas.VotedClass(
                        label=service.classes[k], votes=int(votes[k]), probability=float(mean[k])
                    )
                    for k in order
                ],
            )

    async def _draw(self, inputs: Tensor, seed: int | None, number: int) -> Tensor:
        """(K,) softmax of one draw; keyed, those of any other answer to this image."""
        service = self.service
        if seed is not None:
            drawn: Tensor = await service.run(lambda: self._seeded(inputs, seed, number))
            return drawn
        answers = await service.predicted(inputs, Fixed(1))
        return answers[0].probabilities

    @torch.no_grad()
    def _seeded(self, inputs: Tensor, seed: int, number: int) -> Tensor:
        ensemble, rule = self.service.ensemble, self.service.rule(self.service.settings.stop, None)
        with eval_mode(ensemble):
            draws = Draws(
                ensemble, inputs, seed=seed, antithetic=isinstance(rule, Calibrated) and rule.antithetic
            )
            return check_finite(draws.take(draws.prepared(inputs), number, 1))[0, 0].cpu()

    def _without_noise(self, inputs: Tensor) -> Answer:
        with noise_disabled(self.service.ensemble):
            answer = self.service.ensemble.predict(inputs)
        return Answer(check_finite(answer.probabilities)[0], answer.spread[0], 1)

    def _answer(self, answer: Answer) -> schemas.Answered:
        best = int(answer.probabilities.argmax())
        return schemas.Answered(
            label=self.service.classes[best], probability=float(answer.probabilities[best])
        )

    async def attack(self, inputs: Tensor, asked: schemas.Attack) -> schemas.Attacked:
        if self._running is not None and not self._running.done():
            headers = {"Retry-After": str(self.service.settings.retry_after)}
            raise HTTPException(429, "another attack is running: come back later", headers)
        self._given_up.clear()
        # In a thread of its own, on copies: those who want answers go on getting them.
        self._running = in_thread(lambda: self._attack(inputs, asked))
        limit = self.service.settings.attack_timeout
        found = asyncio.wrap_future(self._running)
        found.add_done_callback(lambda ended: ended.exception())  # which perhaps nobody waits for
        try:
            await asyncio.wait({found}, timeout=limit)  # given up, it ends at its next pass, and not before
        finally:
            self._given_up.set()
        if not found.done():
            raise HTTPException(504, f"the attack did not end within {limit:g} s")
        return found.result()

    def pixels(self, inputs: Tensor) -> Tensor:
        """Inputs in the bounds of the ensemble as images in [0, 1]."""
        low, high = self.service.ensemble.bounds or (0.0, 1.0)
        return (inputs - low) / (high - low)

    def _go_on(self, *_: object) -> None:
        """Before each pass of an attack: nobody may wait for it any more."""
        if self._given_up.is_set():
            raise AbandonedError("nobody waits for this attack")

    def _attack(self, inputs: Tensor, asked: schemas.Attack) -> schemas.Attacked:
        if not self._targets:
            ensemble = copy.deepcopy(self.service.ensemble)
            to_eval_mode_(ensemble)
            plain = copy.deepcopy(ensemble)
            make_static_(plain)
            plain.draws = 1
            for target in (ensemble, plain):
                target.model.register_forward_pre_hook(self._go_on)
            self._targets |= {"ensemble": ensemble, "plain": plain}
        target = self._targets[asked.target]
        before = {name: model.predict(inputs) for name, model in self._targets.items()}
        labels = before[asked.target].label.cpu()
        eot = 8 if target.is_random else 1
        with attacks.count_evaluations() as budget:
            if asked.attack == "pgd":
                low, high = self.service.ensemble.bounds or (0.0, 1.0)
                changed = attacks.pgd(
                    target, inputs, labels, norm="l2", eps=asked.eps * (high - low), steps=40, eot=eot,
                    average="probabilities",
                )  # fmt: skip
            else:
                changed = attacks.cw_l2(target, inputs, labels, steps=60, binary_search_steps=4, eot=eot)
        farther = _FARTHER if asked.attack == "cw" else (1.0,)
        original = self.pixels(inputs)
        shown = self._rounded(target, inputs, self.pixels(changed) - original, farther)
        attacked, difference = in_bounds(shown, self.service.ensemble.bounds), shown - original
        largest = float(difference.abs().max())
        factor = max(1, int(0.5 / largest)) if largest > 0 else 1
        after = {name: model.predict(attacked) for name, model in self._targets.items()}
        answers = []
        for who, name in (("the ensemble", "ensemble"), ("the network without noise", "plain")):
            pair = [
                self._answer(Answer(each.probabilities[0].cpu(), each.spread[0], 1))
                for each in (before[name], after[name])
            ]
            answers.append(schemas.Compared(who=who, before=pair[0], after=pair[1]))
        return schemas.Attacked(
            before=_picture(original[0]), after=_picture(shown[0]), magnified=factor,
            change=_picture((0.5 + factor * difference[0]).clamp(0, 1)), l2=float(difference.norm()),
            answers=answers, gradients=budget.gradients, target=asked.target,
            found=bool(after[asked.target].label != before[asked.target].label),
        )  # fmt: skip

    def _rounded(
        self, target: SelfEnsemble, inputs: Tensor, change: Tensor, farther: tuple[float, ...]
    ) -> Tensor:
        """The attacked image in [0, 1] as a file can hold it, which is what is shown and judged.

        The nearest image that fools a network lies at its boundary, and rounding can bring it back: the
        change is then taken `farther`, in shares of its length, until the target is fooled.
        """
        before, original = target.predict(inputs).label, self.pixels(inputs)
        for share in farther:
            attacked = ((original + share * change).clamp(0, 1) * 255).round() / 255
            if target.predict(in_bounds(attacked, target.bounds)).label != before:
                break
        return attacked


def _reach(inputs: Tensor) -> float:
    """L2 distance from an image in [0, 1] to the farthest other one."""
    return float(torch.maximum(inputs, 1 - inputs).norm())


def _line(value: schemas.Vote) -> bytes:
    return value.model_dump_json(exclude_none=True).encode() + b"\n"


def _picture(image: Tensor) -> str:
    """A (C, H, W) image in [0, 1] as PNG in base64."""
    pixels = (image * 255).round().to(torch.uint8).cpu().numpy()
    return _png(Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)))


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
