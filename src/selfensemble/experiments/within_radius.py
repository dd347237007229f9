"""Attacks within certified radii: a certificate that an attack breaks would be none."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..attacks import apgd, cw_l2, pgd
from ..attacks.transfer import transfer
from ..certainty.certification import METHODS, certificates
from ..ensemble.ensemble import SelfEnsemble
from ..evaluation.balls import within
from ..noise.streams import stream_seed
from ..report.page import Table
from .base import Setting
from .records import Record, column
from .scales import CertificateScale
from .units import Units

Attack = Callable[[SelfEnsemble, Tensor, Tensor, float, int], Tensor]


# Of the honest protocol: ensemble, images, labels, L2 radius and seed.
ATTACKS: dict[str, Attack] = {
    "PGD EOT 8": lambda model, x, y, eps, seed: pgd(
        model, x, y, norm="l2", eps=eps, steps=20, eot=8, average="probabilities", seed=seed
    ),
    "PGD margin EOT 1": lambda model, x, y, eps, seed: pgd(
        model, x, y, norm="l2", eps=eps, steps=100, loss="margin", seed=seed
    ),
    "transfer": lambda model, x, y, eps, seed: transfer(
        model, x, y, attack=apgd, norm="l2", eps=eps, steps=25, loss="dlr", seed=seed
    ),
    "C&W EOT 4": lambda model, x, y, eps, seed: cw_l2(
        model, x, y, steps=50, binary_search_steps=5, eot=4, seed=seed
    ),
}


_LEAST, _INSIDE, _TOGETHER = 0.01, 0.999, 25


_AFTER = 1000  # draws after an attack


def attacked(
    setting: Setting, settings: CertificateScale, units: Units, inputs: Tensor, found: dict[str, Tensor]
) -> dict[str, list[str]]:
    """Attacks within the radius by means, and what is certified of the attacked images.

    Images with similar radii are attacked together, with the least of them. `attack.NAME.METHOD` is the
    answer that is certified of the attacked image, -1 where none is, -2 where the image was not attacked.
    """
    radius, answer = found["mean.radius"], found["mean.answer"]
    eligible = torch.nonzero(radius > _LEAST)[:, 0][: settings.attacked]
    order = eligible[radius[eligible].argsort()]
    eps = torch.zeros_like(radius)
    columns = {
        f"attack.{name}.{method}": torch.full_like(answer, -2) for name in ATTACKS for method in METHODS
    }
    groups = order.split(_TOGETHER)
    for number, group in enumerate(groups):
        eps[group] = _INSIDE * radius[group].min()
        for place, name in enumerate(ATTACKS):
            setting.progress(f"attacks within the radius, {name}", number / len(groups))
            seed = stream_seed(setting.seed, number, 60 + place)
            x, y, within = inputs[group], answer[group], float(eps[group[0]])
            work = partial(_after_attack, setting, settings, name, x, y, within, seed)
            for method, label in units.compute(f"attack-{number:03d}-{name}", work).items():
                columns[f"attack.{name}.{method}"][group] = label
    return {"attack.eps": column(eps.numpy())} | {
        name: column(values.numpy()) for name, values in columns.items()
    }


def _after_attack(
    setting: Setting, settings: CertificateScale, name: str, x: Tensor, y: Tensor, eps: float, seed: int
) -> dict[str, Tensor]:
    """By method, the answers that are certified of the attacked images."""
    x, y = x.to(setting.device), y.to(setting.device)
    found = within(ATTACKS[name](setting.attacked, x, y, eps, seed), x, "l2", eps, name.startswith("C&W"))
    after = certificates(
        setting.attacked, found, METHODS, alpha=settings.alpha, n0=settings.n0, n=min(settings.n, _AFTER),
        seed=stream_seed(seed, 0, 1),
    )  # fmt: skip
    return {method: certificate.label for method, certificate in after.items()}


def withstood(records: Sequence[Record]) -> Table:
    """How many certified answers the attacks changed."""
    rows = []
    for record in records:
        eps = record.numbers("attack.eps")
        for method in METHODS:
            answer, radius = record.numbers(f"{method}.answer"), record.numbers(f"{method}.radius")
            inside = (eps > 0) & (radius >= eps)
            cells = []
            for name in ATTACKS:
                after = record.numbers(f"attack.{name}.{method}")[inside]
                changed = (after >= 0) & (after != answer[inside])
                cells.append(f"{int(changed.sum())} ({int((after < 0).sum())})")
            rows.append([f"{record.facts.title}, {method}", str(int(inside.sum())), *cells])
    caption = (
        "Images whose certified answer an attack within the certified radius changed into another that is "
        f"certified, with {_AFTER:,} draws at most; in brackets those of which nothing is certified then. "
        f"Images with similar radii are attacked together, with {_INSIDE:g} of the least radius."
    )
    return Table("Attacks within the certified radius", caption, ["network", "images", *ATTACKS], rows)
