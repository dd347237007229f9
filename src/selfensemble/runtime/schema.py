"""Building blocks of checked YAML: numbers in range, and sections that know their keys."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_MOST = 1e38  # about as much as a number of 32 bits holds


def _in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError("must be the lowest and the highest value: write them in that order")
    return bounds


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(ge=-_MOST, le=_MOST, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=_MOST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=_MOST, allow_inf_nan=False)]
Bounds = Annotated[tuple[Finite, Finite], AfterValidator(_in_order)]


class Section(BaseModel):
    """Checked values that do not change; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
