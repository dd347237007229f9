"""Rules that were calibrated on an ensemble, and travel with it."""

from typing import get_args

from ..noise.streams import Sampling
from .classifier import RandomClassifier
from .sets import SetRule
from .stopping import Calibrated, Exact, Fixed, Rule, Stop

_AGAIN = "calibrate again (rse.calibrate, or `selfensemble calibrate`)"


class Promising(RandomClassifier):
    """A classifier that rules may be calibrated on.

    A rule that does not say what it was calibrated on is bound to the ensemble as it is when it is set. Any
    rule may be set, and is refused where it is used on another ensemble than that it was calibrated on.

    Attributes:
        draws: noise draws a prediction.
        stopping: margins at which images stop drawing, see `calibrate`; None where there are none.
        sets: which labels belong to the set of an image, see `conformal_sets`; None where there is none.
    """

    draws: int
    _stopping: Calibrated | None = None
    _sets: SetRule | None = None

    @property
    def stopping(self) -> Calibrated | None:
        return self._stopping

    @stopping.setter
    def stopping(self, rule: Calibrated | None) -> None:
        if not isinstance(rule, Calibrated | None):
            raise TypeError(f"stopping must be what rse.calibrate returns, got {type(rule).__name__}")
        if rule is not None and rule.fingerprint is None:
            rule = rule.bound_to(self).model_copy(update={"draws": self.draws})
        self._stopping = rule

    @property
    def sets(self) -> SetRule | None:
        return self._sets

    @sets.setter
    def sets(self, rule: SetRule | None) -> None:
        if not isinstance(rule, SetRule | None):
            raise TypeError(
                f"sets must be the rule of rse.conformal_sets(...), its attribute `rule`, "
                f"got {type(rule).__name__}"
            )
        self._sets = None if rule is None else rule.bound_to(self)


def check_stopping(rule: Calibrated, ensemble: Promising, sampling: Sampling | None = None) -> None:
    """Raise a ValueError unless `rule` was calibrated on `ensemble` as it is now.

    Args:
        rule: when images are to stop drawing.
        ensemble: what is to draw.
        sampling: where another than that of the ensemble is asked for; draws of each image's own may always
            be, which is how it was calibrated.
    """
    remedy = f"{_AGAIN}, or leave stop out"
    rule.check(ensemble, "the stopping rule", remedy)
    if rule.draws not in (None, ensemble.draws):
        raise ValueError(
            f"the stopping rule was calibrated on an ensemble of {rule.draws} draws, which now has "
            f"{ensemble.draws}: {remedy}"
        )
    if rule.fingerprint is not None and sampling not in (None, "per_image", rule.fingerprint.sampling):
        raise ValueError(
            f"the stopping rule was calibrated with sampling={rule.fingerprint.sampling!r}: leave sampling "
            f"out, or {remedy}"
        )


def check_sets(rule: SetRule, ensemble: Promising) -> None:
    """Raise a ValueError unless `rule` was calibrated on `ensemble` as it is now."""
    rule.check(
        ensemble,
        "the rule of conformal sets",
        "calibrate again (rse.conformal_sets, or `selfensemble calibrate --sets`)",
    )


def check_kept(ensemble: Promising) -> None:
    """Raise a ValueError unless the rules to be saved with `ensemble` are about it, in any precision."""
    for name, rule in (("stopping", ensemble.stopping), ("sets", ensemble.sets)):
        if rule is not None and (different := rule.differences(ensemble)):
            raise ValueError(
                f"ensemble.{name} was calibrated on other {', other '.join(different)} than would be saved "
                f"with it: calibrate again, or drop it by ensemble.{name} = None"
            )


def rule_for(
    stop: Stop | None, draws: int, given: bool, ensemble: Promising, sampling: Sampling | None = None
) -> Rule:
    """The rule of a prediction.

    Args:
        stop: its name; None takes all draws.
        draws: how many an image takes at most.
        given: whether the caller chose that number.
        ensemble: what is to draw.
        sampling: where another than that of the ensemble is asked for.

    Raises:
        ValueError: no such rule, or one that the ensemble lacks, or one that was calibrated on another; the
            message says what to do.
    """
    if stop is None:
        return Fixed(draws)
    if stop == "exact":
        return Exact(draws)
    if stop != "calibrated":
        raise ValueError(f"stop must be one of {get_args(Stop)} or None, got {stop!r}")
    if ensemble.stopping is None:
        raise ValueError(
            "the ensemble has no calibrated thresholds: set ensemble.stopping = calibrate(ensemble, images), "
            "or run `selfensemble calibrate`"
        )
    if given:
        raise ValueError('stop="calibrated" has its own number of draws: leave draws out')
    check_stopping(ensemble.stopping, ensemble, sampling)
    return ensemble.stopping
