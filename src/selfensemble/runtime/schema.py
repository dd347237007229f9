"""Building blocks of checked YAML: numbers in range, and sections that know their keys."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Checked values that do not change; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
