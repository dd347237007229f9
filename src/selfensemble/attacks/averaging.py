"""How an attack handles the noise of a model: what every attack takes as keyword arguments."""

from dataclasses import dataclass, replace
from typing import Literal, TypedDict, get_args

from ..ensemble.checks import check_count, check_seed

Average = Literal["losses", "probabilities"]


class NoiseOptions(TypedDict, total=False):
    """Keyword arguments that every attack takes: the fields of `Noise`."""

    eot: int
    average: Average
    confirm_draws: int | None
    frozen: bool
    seed: int | None


@dataclass(frozen=True, slots=True)
class Noise:
    """How an attack handles the noise of a model.

    Attributes:
        eot: noise draws averaged in a step.
        average: what is averaged, "losses" of single draws, or their "probabilities": the loss is then
            that of the ensemble, `loss(log(mean softmax))`. `ddn` and `fmn` have the latter by default.
        confirm_draws: fresh draws that must confirm a success; None for 10 where two passes differ. Where
            they do not, the model counts as deterministic, and one draw stands for all; set this to
            more than 1 for a model whose randomness is rare.
        frozen: every step uses the same draws, those of `predict(draws=eot, seed=seed)`, and they
            decide about success too. For checking attacks: frozen noise is no defense.
        seed: of the noise and of random starts; None for fresh entropy.
    """

    eot: int = 1
    average: Average = "losses"
    confirm_draws: int | None = None
    frozen: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        check_count("eot", self.eot)
        if self.confirm_draws is not None:
            check_count("confirm_draws", self.confirm_draws)
        check_seed(self.seed)
        if self.average not in get_args(Average):
            raise ValueError(f"average must be one of {', '.join(get_args(Average))}, got {self.average!r}")


def of_nearest(noise: NoiseOptions) -> Noise:
    """Settings of an attack for the nearest image: unless said otherwise, of the mean of probabilities."""
    return replace(Noise(**noise), average=noise.get("average", "probabilities"))
