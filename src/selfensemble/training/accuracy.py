"""Accuracy without attack, on many images."""

from torch import Tensor

from ..data.images import ImageData, batch_size
from ..ensemble.ensemble import SelfEnsemble
from ..noise.streams import stream_seed

_BATCH = 500


def count_correct(
    ensemble: SelfEnsemble,
    data: ImageData,
    indices: Tensor,
    *,
    draws: int | None = None,
    seed: int | None = None,
) -> int:
    """How many of the images `indices` the ensemble labels correctly; noise is drawn per image."""
    correct = 0
    batches = data.batches(indices, batch_size(_BATCH, data.shape))
    for number, (inputs, labels) in enumerate(batches):
        batch_seed = None if seed is None else stream_seed(seed, number, 0)
        prediction = ensemble.predict(inputs, draws=draws, seed=batch_seed, sampling="per_image")
        correct += int((prediction.label == labels).sum())
    return correct
