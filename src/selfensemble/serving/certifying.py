"""Certificates on request: what is known of the network is found out once, and passes are short."""

from collections.abc import Callable

from torch import Tensor

from ..certainty.certification import VERDICTS, certificates
from ..certainty.pixels import pixel_std
from ..ensemble.draws import Draws
from ..ensemble.ensemble import SelfEnsemble
from . import schemas

_PASS = 256  # images at most in a pass, which others wait for


class Certifier:
    """Certifies images of one ensemble, which stays as it is.

    Args:
        ensemble: what answers.
        name: of a class by its number, None for -1.
    """

    def __init__(self, ensemble: SelfEnsemble, name: Callable[[int], str | None]) -> None:
        self._ensemble, self._name = ensemble, name
        self._std: float | None = None

    def __call__(self, inputs: Tensor, seed: int | None, asked: schemas.Certify) -> schemas.CertificateAnswer:
        """Of an image (1, ...) in the bounds of the ensemble; radii are those of images in [0, 1]."""
        low, high = self._ensemble.bounds or (0.0, 1.0)
        wanted = None if asked.radius is None else asked.radius * (high - low)
        # What the network is, not the image: found out at the first certificate.
        self._std = self._std or pixel_std(self._ensemble, inputs)
        settings = asked.model_dump(exclude={"method"}) | {"radius": wanted}
        size = min(_PASS, Draws(self._ensemble, inputs).capacity)
        found = certificates(
            self._ensemble, inputs, (asked.method,), **settings, max_batch=size, seed=seed, std=self._std
        )[asked.method]
        return schemas.CertificateAnswer(
            label=self._name(int(found.label)), radius=float(found.radius) / (high - low),
            draws=int(found.draws), alpha=asked.alpha,
            verdict=None if wanted is None else VERDICTS[int(found.verdict)],
        )  # fmt: skip
