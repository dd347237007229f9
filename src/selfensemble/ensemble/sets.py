"""What conformal sets were calibrated to; they are made in `certainty.conformal`."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from .fingerprint import Promise

_Share = Annotated[float, Field(gt=0, lt=1)]
_Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SetRule(Promise):
    """Which labels belong to the set of an image, see `conformal_sets`.

    Attributes:
        alpha: the risk that a set misses the right label.
        radius, std: of attacks that are accounted for, L2; of the noise on the image, or 0.
        draws: of each image.
        beta: the part of `alpha` for each of the two bounds on what draws leave open.
        threshold: the least (lower bound of the) mean probability of a label in a set, without attack.
        images: how many were calibrated on.
        precision, fingerprint: of the ensemble it was calibrated on, see `Promise`.
    """

    alpha: _Share
    radius: _Finite = 0.0
    std: _Finite = 0.0
    draws: Annotated[int, Field(ge=1)]
    beta: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    threshold: Annotated[float, Field(ge=0, le=1)]
    images: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _accounts_for_its_radius(self) -> Self:
        if self.radius and not (self.std > 0 and 0 < self.beta < self.alpha / 2 and self.draws > 1):
            raise ValueError("a radius needs std > 0, beta between 0 and alpha / 2, and two draws or more")
        return self
