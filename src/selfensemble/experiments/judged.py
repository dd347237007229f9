"""A protocol on a network as columns of per-image results, and accuracies from such columns."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluation.protocol import Protocol
from ..evaluation.runner import Evaluation
from ..evaluation.shards import CLEAN
from ..report.intervals import Share, share
from .base import Measured, Setting
from .records import Record, column, words


def evaluate(setting: Setting, protocol: Protocol) -> Measured:
    """Run the protocol, or what is left of it.

    Columns of an entry KEY: `KEY.right`, a word of a digit for each seed of the defender's noise, 1 where
    it classifies correctly; `KEY.wrong`, wrong answers of all queries where there are more of them; `KEY.l2`,
    the distance, but for attacks that are bound in another norm.
    """
    evaluation = Evaluation(
        setting.trained.ensemble, setting.test, protocol, setting.folder, name=setting.network.name,
        max_batch=setting.max_batch, progress=setting.progress,
    )  # fmt: skip
    results = evaluation.run()
    shards, seeds = evaluation.shards, protocol.judge.seeds
    entries: dict[str, dict[str, Any]] = {}
    columns = {"label": column(evaluation.labels.numpy())}
    for entry in (results.clean, *results.attacks, *results.worst_case):
        parts = [shards.read(start, entry.key) for start in shards.starts]
        right = torch.cat([part.answers for part in parts]) == evaluation.labels[:, None]
        key, queries = entry.key, right.shape[1]
        columns[f"{key}.right"] = words(right[:, :seeds].numpy())
        if queries > seeds:
            columns[f"{key}.wrong"] = column((~right).sum(dim=1).numpy())
        if entry.norm in (None, "l2") and key != CLEAN:
            columns[f"{key}.l2"] = column(torch.cat([part.l2 for part in parts]).numpy())
        kept = {"title", "attack", "settings", "norm", "eps", "c", "gradients", "forwards", "published"}
        entries[key] = entry.model_dump(mode="json", include=kept) | {"queries": queries}
    settings = {"protocol": protocol.model_dump(mode="json")}
    return Measured(settings, entries, columns)


def accuracy(record: Record, key: str) -> Share:
    """Accuracy by the first seed of the defender's noise."""
    return share(record.bits(f"{key}.right")[:, 0])


def all_seeds(record: Record, key: str) -> float:
    """Share of the images classified correctly under every seed."""
    return float(record.bits(f"{key}.right").all(axis=1).mean())


def seed_range(record: Record, key: str) -> tuple[float, float]:
    """Smallest and largest accuracy of one seed."""
    each = record.bits(f"{key}.right").mean(axis=0)
    return float(each.min()), float(each.max())


def rms(record: Record, key: str) -> float:
    """Root of the mean squared L2 distance, the distortion of the paper; 0 without attack."""
    return 0.0 if key == CLEAN else float(np.sqrt(np.square(record.numbers(f"{key}.l2")).mean()))


def wrong(record: Record, key: str) -> NDArray[np.bool_]:
    """(N,) whether the first seed gives a wrong answer."""
    first: NDArray[np.bool_] = ~record.bits(f"{key}.right")[:, 0]
    return first


def by_strength(record: Record) -> dict[float, str]:
    """Keys of the entries of the paper's attack by c; no attack is c = 0."""
    found = {0.0: CLEAN}
    for key, entry in record.facts.entries.items():
        if entry["attack"] == "cw-paper":
            found[entry["c"]] = key
    return dict(sorted(found.items()))
