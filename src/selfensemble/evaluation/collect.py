"""Putting the shards of an evaluation together: figures, a table of all images, a gallery."""

import csv
import io

import safetensors.torch
import torch
from torch import Tensor

from .balls import UNIT, Bounds, in_units
from .judge import Verdict
from .results import Entry
from .shards import CLEAN, Plan, Shards

_GALLERY_IMAGES = 8
_PERSISTENT = (1, 10, 100)


def entry(shards: Shards, plan: Plan, labels: Tensor, seeds: int) -> Entry:
    """The figures of one entry; `seeds` defenders count."""
    parts = [shards.read(start, plan.key) for start in shards.starts]
    answers = torch.cat([part.answers for part in parts])
    verdict = Verdict(
        answers,
        labels,
        torch.cat([part.lead for part in parts]),
        torch.cat([part.l2 for part in parts]),
        torch.cat([part.linf for part in parts]),
    )
    asked = answers.shape[1]
    low, high = verdict.interval
    settings = dict(plan.run.settings) if plan.run is not None else {}
    if plan.run is not None and plan.run.surrogate is not None:
        settings["surrogate"] = plan.run.surrogate
    gradients, forwards = shards.budget(plan)
    return Entry(
        key=plan.key,
        title=plan.title,
        attack=plan.run.attack if plan.run is not None else "worst case" if plan.members else "none",
        settings=settings,
        norm=plan.norm,
        eps=plan.eps,
        c=settings.get("c"),
        images=len(labels),
        accuracy=verdict.accuracy,
        low=low,
        high=high,
        seeds=tuple((~verdict.wrong[:, :seeds]).double().mean(dim=0).tolist()),
        all_seeds=float((~verdict.wrong[:, :seeds]).all(dim=1).double().mean()),
        wrong_per_query=float(verdict.wrong_per_query.mean()),
        persistent={k: verdict.persistent(k) for k in _PERSISTENT if k <= asked},
        rms_l2=verdict.rms_l2,
        median_l2=float(verdict.l2.median()),
        mean_linf=float(verdict.linf.mean()),
        max_linf=float(verdict.linf.max()),
        gradients=gradients / len(labels),
        forwards=forwards / len(labels),
        published=shards.published(plan),
    )


def table(shards: Shards, labels: Tensor) -> str:
    """CSV, one line an image and entry."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["image", "label", "entry", "attack", "norm", "eps", "c", "answer", "correct", "wrong_per_query",
         "queries", "lead", "l2", "linf"]
    )  # fmt: skip
    for plan in shards.plans:
        attack = plan.run.attack if plan.run is not None else plan.key
        c = plan.run.settings.get("c", "") if plan.run is not None else ""
        for start in shards.starts:
            part = shards.read(start, plan.key)
            for row in range(len(part.lead)):
                label = int(labels[start + row])
                answers = part.answers[row]
                wrong = float((answers != label).double().mean())
                writer.writerow(
                    [start + row, label, plan.key, attack, plan.norm or "", plan.eps or "", c,
                     int(answers[0]), int(answers[0] == label), f"{wrong:.6g}", len(answers),
                     f"{float(part.lead[row]):.6g}", f"{float(part.l2[row]):.6g}",
                     f"{float(part.linf[row]):.6g}"]
                )  # fmt: skip
    return text.getvalue()


def gallery(shards: Shards, labels: Tensor, bounds: Bounds = UNIT) -> bytes:
    """A few images, classified correctly without attack, and what each attack made of them, in [0, 1]."""
    clean = [shards.read(start, CLEAN) for start in shards.starts]
    answers = torch.cat([part.answers[:, 0] for part in clean])
    chosen = (answers == labels).nonzero().squeeze(1)[:_GALLERY_IMAGES]
    tensors = {
        "original": in_units(shards.inputs[chosen], bounds),
        "label": labels[chosen],
        "answer.clean": answers[chosen],
    }
    last = int(chosen.max()) if len(chosen) else 0
    for plan in shards.plans[1:]:
        parts = [shards.read(start, plan.key) for start in shards.starts[: 1 + last // shards.size]]
        tensors[plan.key] = in_units(torch.cat([part.adversarial for part in parts])[chosen], bounds)
        tensors[f"answer.{plan.key}"] = torch.cat([part.answers[:, 0] for part in parts])[chosen]
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
