"""What is asked and answered."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..certainty.certification import Method, Verdict
from ..ensemble.stopping import Stop
from ..runtime.schema import Positive

# JSON has types: true and "5" are no numbers. What is text in a form is made one before, see `forms`.
_ASKED = ConfigDict(extra="forbid", strict=True)
_Risk = Annotated[float, Field(ge=1e-300, lt=1)]


class Decide(BaseModel):
    """Ask for the infinite ensemble's answer at a stated risk, see `rse.decide`."""

    model_config = _ASKED
    alpha: _Risk = 0.001
    max_draws: Annotated[int, Field(ge=1)] = 100


class Certify(BaseModel):
    """Ask for a radius within which no change of the image changes that answer, see `rse.certify`."""

    model_config = _ASKED
    alpha: _Risk = 0.001
    n0: Annotated[int, Field(ge=1)] = 100
    n: Annotated[int, Field(ge=2)] = 1000
    method: Method = "mean"
    radius: Positive | None = None
    grid: Annotated[bool, Field(description="noise on the grid of 8-bit images, exact in floating point")] = (
        False
    )


class Options(BaseModel):
    """How images are to be answered."""

    model_config = _ASKED
    draws: Annotated[int, Field(ge=1, description="noise draws an image")] | None = None
    stop: Stop | None = Field(None, description="when an image stops drawing, see `SelfEnsemble.predict`")
    top: Annotated[int, Field(ge=1, description="classes to name")] = 5
    decide: Decide | None = None
    certify: Certify | None = None
    sets: Annotated[
        bool, Field(description="all labels that are possible, where `selfensemble calibrate --sets` was run")
    ] = False


class Request(Options):
    """Images and how they are to be answered."""

    images: Annotated[list[str], Field(min_length=1, description="image files in base64")]


class ClassAnswer(BaseModel):
    """One class: its mean probability over the draws and their standard deviation (null for one draw)."""

    label: str
    probability: float
    spread: float | None


class DecisionAnswer(BaseModel):
    """Label of the infinite ensemble or null, and bounds of the mean probability of the class that leads."""

    label: str | None
    leader: str
    low: float
    high: float
    draws: int
    alpha: float


class CertificateAnswer(BaseModel):
    """Label that no change within the L2 radius changes, or null; images in [0, 1].

    `verdict` on a wanted radius: certified, proven to be out of reach of any answer, or neither.
    """

    label: str | None
    radius: float
    draws: int
    alpha: float
    verdict: Verdict | None = None


class SetAnswer(BaseModel):
    """Labels among which the right one is, but for a risk of alpha; also where the image was moved in L2."""

    labels: list[str]
    alpha: float
    radius: float
    draws: int


class ImageAnswer(BaseModel):
    """Of one image; `label` and `probability` are those of the first of `classes`."""

    label: str
    probability: float
    draws: int
    classes: list[ClassAnswer]
    decision: DecisionAnswer | None = None
    certificate: CertificateAnswer | None = None
    set: SetAnswer | None = None


class Response(BaseModel):
    """In the order of the images."""

    images: list[ImageAnswer]


class Problem(BaseModel):
    """Why there is no answer, and what to do."""

    error: str


class Votes(BaseModel):
    """Ask how the draws vote on one image."""

    model_config = _ASKED
    image: Annotated[str, Field(description="an image file in base64")]
    draws: Annotated[
        int | None, Field(ge=1, description="20 by default; those of the server where noise is keyed")
    ] = None


class Answered(BaseModel):
    """The likeliest class."""

    label: str
    probability: float


class VotedClass(Answered):
    """A class, its mean probability so far, and how many draws voted for it."""

    votes: int


class Vote(BaseModel):
    """A line of the stream: first `plain`, without noise; then draws so far and the leading classes.

    `reach` comes with `plain`: the L2 distance of the farthest image, beyond which no attack can go.
    """

    plain: Answered | None = None
    reach: float | None = None
    draws: int | None = None
    classes: list[VotedClass] | None = None
    error: str | None = None


class Attack(BaseModel):
    """Ask for a change of one image that changes an answer."""

    model_config = _ASKED
    image: Annotated[str, Field(description="an image file in base64")]
    target: Literal["ensemble", "plain"] = "ensemble"
    attack: Literal["pgd", "cw"] = "pgd"
    eps: Annotated[Positive, Field(description="L2 distance within which PGD attacks")] = 0.5


class Compared(BaseModel):
    """Answers to the image before and after."""

    who: str
    before: Answered
    after: Answered


class Attacked(BaseModel):
    """PNG files in base64, the L2 distance, and what became of the answers; judged as 8-bit images.

    `found` says whether the target is fooled. If not, this attack found nothing, which proves nothing:
    `after` is then the last that it tried.
    """

    target: Literal["ensemble", "plain"]
    found: bool
    before: str
    change: str
    magnified: int
    after: str
    l2: float
    answers: list[Compared]
    gradients: Annotated[int, Field(description="of the target, what the search cost")]
