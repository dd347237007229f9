"""What a server does, and what it refuses."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from ..ensemble.stopping import Stop
from ..runtime.schema import Count, Positive, Section

_ORIGIN = re.compile(r"https?://[^/?#\s]+")


def _origin(text: str) -> str:
    if text != "*" and not _ORIGIN.fullmatch(text):
        raise ValueError("must be an origin, https://example.org without a path, or *")
    return text


class Settings(Section):
    """How answers are made, and limits.

    Attributes:
        draws: of an image, where the request does not say; None for those of the ensemble.
        stop: rule where the request does not say.
        api_key: what requests must bring in `X-API-Key`, or as a bearer token; None for nothing.
        secret: key of the noise: it is then a function of this and of the image, the same whenever one asks.
        page: whether there is a page at `/`.
        attacks: whether the page may attack images; each takes a core for a while.
        samples: folder of images that the page offers.
        max_body: bytes of a request.
        max_pixels: of an image as it is sent, before it is made as small as the network wants it; of all
            images of a request, eight times as many.
        max_images: of a request.
        max_draws: that a request may ask for, also for decisions.
        max_certify: draws that a certificate may ask for.
        max_waiting: images in the queue.
        timeout: seconds in which a request comes, and in which it is then answered, or given up.
        header_timeout: seconds in which the headers of a request come.
        attack_timeout: seconds after which an attack of the page is given up.
        cors: origins of other pages that may ask, "*" for all.
        access_log: whether there is a line in the log for each request.
        retry_after: seconds after which those who were refused should come back.
    """

    draws: Count | None = None
    stop: Stop | None = None
    api_key: Annotated[str, Field(min_length=8)] | None = None
    secret: Annotated[str, Field(min_length=16)] | None = None
    page: bool = True
    attacks: bool = False
    samples: Path | None = None
    max_body: Count = 16 * 2**20
    max_pixels: Count = 25_000_000
    max_images: Count = 64
    max_draws: Count = 1000
    max_certify: Count = 10_000
    max_waiting: Count = 256
    timeout: Positive = 30.0
    header_timeout: Positive = 10.0
    attack_timeout: Positive = 300.0
    cors: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    access_log: bool = True
    retry_after: Count = 1
