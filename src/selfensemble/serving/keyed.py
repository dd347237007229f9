"""Noise that is a function of a secret and of the image: an image has one answer, however it is asked for."""

import hashlib
import hmac

from fastapi import HTTPException
from torch import Tensor

from ..ensemble.stopping import Stop
from ..noise.entropy import WideSeed
from . import schemas

_RISK = 0.05  # the largest that may be asked for


def keyed_seed(secret: str, image: Tensor) -> int:
    """A seed that only who knows the secret can tell from the image."""
    code = hmac.new(secret.encode(), image.contiguous().numpy().tobytes(), hashlib.sha256)
    return WideSeed(int.from_bytes(code.digest()[:8], "big") >> 2)


def check_one_answer(options: schemas.Options, draws: int, stop: Stop | None) -> None:
    """Refuse options by which a client would choose among several answers to an image.

    Decisions and certificates are right but for a stated risk, however many draws are asked for; who may
    state any risk could choose among their labels as well.

    Args:
        options: of a request.
        draws, stop: of every answer.
    """
    for name, asked, own in (("draws", options.draws, draws), ("stop", options.stop, stop)):
        if asked is not None and asked != own:
            said = "cannot be chosen" if own is None else f"is {own} for everybody"
            raise HTTPException(422, f"{name} {said} here, so that an image has one answer: leave {name} out")
    for name, part in (("decide", options.decide), ("certify", options.certify)):
        if part is not None and part.alpha > _RISK:
            raise HTTPException(422, f"{name}.alpha may be at most {_RISK} here, got {part.alpha:g}")
