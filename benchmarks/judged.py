"""What attacks of a benchmark made of some images, judged, in files: a long run goes on where it stopped."""

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import selfensemble as rse
from selfensemble.attacks.budget import count_evaluations
from selfensemble.evaluation import judge
from selfensemble.evaluation.balls import within
from selfensemble.evaluation.identity import model_record
from selfensemble.runtime.files import atomic_write
from selfensemble.runtime.provenance import provenance

LOOKS, QUERIES = 3, 20


@dataclass(frozen=True)
class Judged:
    """One attack's images, asked twice on fresh noise.

    Attributes:
        lead: (N,) lead in the first queries, by which images are chosen.
        right: (N,) share of right answers to the other queries, the figure.
        distance: (N,) to the originals, before the images were brought into a ball.
        gradients, forwards: of an image.
        seconds: of the processor for the attack, which other work disturbs little.
    """

    lead: NDArray[np.float64]
    right: NDArray[np.float64]
    distance: NDArray[np.float64]
    gradients: float
    forwards: float
    seconds: float


def judged(
    path: Path,
    ensemble: rse.SelfEnsemble,
    x: Tensor,
    y: Tensor,
    attack: Callable[[], Tensor],
    norm: str,
    eps: float | None,
    farther: bool,
    seed: int,
) -> Judged:
    """The images of `attack`, judged; read from `path` where it is there.

    Args:
        path: of the file.
        ensemble, x, y: the defender, the originals and their labels.
        attack: makes the images.
        norm, eps: the ball into which they are brought; `eps` None to judge them where they are.
        farther: take images inside on as far as the ball allows, see `within`.
        seed: of the judge.
    """
    about = _about(ensemble, x, y, norm, eps, farther, seed)
    if not path.is_file():
        began = time.process_time()
        with count_evaluations() as spent:
            found = attack()
        seconds = time.process_time() - began
        images = found if eps is None else within(found, x, norm, eps, farther)
        options: dict[str, Any] = {"norm": norm, "eps": eps, "max_batch": 200}
        first = judge(ensemble, x, images, y, queries=LOOKS, seed=seed + 1, **options)
        second = judge(ensemble, x, images, y, queries=QUERIES, seed=seed + 2, **options)
        change = (found - x).flatten(1)
        content = io.BytesIO()
        np.savez(
            content,
            about=np.array(about),
            lead=first.lead.numpy(),
            right=1 - second.wrong_per_query.numpy(),
            distance=(change.norm(dim=1) if norm == "l2" else change.abs().amax(dim=1)).numpy(),
            spent=np.array([spent.gradients / len(x), spent.forwards / len(x), seconds]),
        )
        atomic_write(path, content.getvalue())
    with np.load(path) as stored:
        if "about" not in stored or str(stored["about"]) != about:
            raise SystemExit(
                f"{path} is of another network, data or settings: remove it, or pass another --out"
            )
        gradients, forwards, seconds = stored["spent"].tolist()
        return Judged(stored["lead"], stored["right"], stored["distance"], gradients, forwards, seconds)


def _about(
    ensemble: rse.SelfEnsemble, x: Tensor, y: Tensor, norm: str, eps: float | None, farther: bool, seed: int
) -> str:
    """What a file is of: it is read only where all of it is the same."""
    images = hashlib.sha256(x.contiguous().numpy().tobytes() + y.contiguous().numpy().tobytes()).hexdigest()
    model = model_record(ensemble, "", None, x[:2])
    return json.dumps([model.digest, model.behaviour, model.draws, images, norm, eps, farther, seed])


def worst(members: Sequence[Judged]) -> float:
    """Accuracy in % where of each image the member that leads most is kept."""
    leads, right = np.stack([m.lead for m in members]), np.stack([m.right for m in members])
    return float(100 * right[leads.argmax(axis=0), np.arange(leads.shape[1])].mean())


def about(model: str, images: int, seed: int) -> str:
    """What was measured on what."""
    hardware = provenance()["hardware"]
    return (
        f"{Path(model).name}, first {images} test images, seed {seed}; {hardware['cores']} cores of an "
        f"{hardware['cpu']}, torch {torch.__version__}, {torch.get_num_threads()} threads."
    )
