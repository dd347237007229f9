"""In which order images stand: as they are stored if that is a random one, else one that is drawn.

Commands take the first images of a test set, or the last. Where a set is sorted by class, as folders are,
those would be of one class.
"""

import hashlib

import torch
from torch import Tensor

_DEVIATIONS = 3.5  # of what is counted in a random order: one in 2,000 is farther


def is_shuffled(labels: Tensor) -> bool:
    """Whether the classes follow each other as in a random order.

    Neighbours of one class are counted, and images of a class in the first half: a random order of N images
    has about as many as their classes say.
    """
    count = len(labels)
    sizes = torch.bincount(labels).double()
    if count < 2 or int((sizes > 0).sum()) < 2:
        return True
    same = float((labels[1:] == labels[:-1]).sum())
    chance = float((sizes * (sizes - 1)).sum() / (count * (count - 1)))
    spread = (count * chance * (1 - chance)) ** 0.5
    if abs(same - (count - 1) * chance) > _DEVIATIONS * max(spread, 1.0):
        return False
    half = torch.bincount(labels[: count // 2], minlength=len(sizes)).double()
    known = sizes > 0
    squares = ((half - sizes / 2)[known] ** 2 / (sizes[known] / 4)).sum()
    degrees = int(known.sum()) - 1
    return bool(squares <= degrees + _DEVIATIONS * (2 * degrees) ** 0.5 + _DEVIATIONS)


def mixed_order(labels: Tensor, seed: int) -> Tensor:
    """(N,) numbers of all images drawn by `seed`, of which every beginning has its share of each class.

    The images of a class, in random order, are spread evenly over the whole.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    count = len(labels)
    order = torch.randperm(count, generator=generator, device="cpu")
    jitter = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    by_class = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels, minlength=1)
    starts = sizes.cumsum(0) - sizes
    classes = labels[by_class]
    rank = torch.arange(count, device="cpu") - starts[classes]
    place = (rank + jitter) / sizes[classes]
    return by_class[place.argsort(stable=True)]


def test_part(names: list[str], labels: Tensor, share: float, seed: int) -> Tensor:
    """(N,) bool, which images are of the test split where the data have none: `share` of each class.

    An image's place is that of a hash of its name, so that files which come or go move few others.
    """
    keys = [hashlib.sha256(f"{seed}\0{name}".encode(errors="surrogateescape")).hexdigest() for name in names]
    chosen = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1).tolist()
        members.sort(key=keys.__getitem__)
        count = min(round(len(members) * share), len(members) - 1)
        chosen[members[: max(count, min(1, len(members) - 1))]] = True
    return chosen
