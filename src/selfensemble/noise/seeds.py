"""Seeds of the streams that noise is drawn from: of a draw, and of a layer in it."""

import hashlib

import torch

# Streams a seed spans before it wraps: LAYERS layers of 2**32 / LAYERS (a million) draws.
LAYERS = 4096
DRAWS = 2**32 // LAYERS
_MASK32 = 0xFFFF_FFFF
# By number of the draw and of the layer, and by device.
Generators = dict[tuple[int, int, torch.device], torch.Generator]


def stream_seed(seed: int, index: int, layer: int) -> int:
    """64-bit seed of the stream (seed, draw index, layer).

    torch's CPU generator uses the low 32 bits of a seed only. Within one seed those are an injective
    function of (index, layer), so that no two streams coincide, then mixed (murmur3's finalizer, a
    bijection), so that neighbours do not look alike.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    high, low = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
    mixed = (low + index * LAYERS + layer) & _MASK32
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EB_CA6B) & _MASK32
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2_AE35) & _MASK32
    return (high << 32) | (mixed ^ (mixed >> 16))


def seed_streams_(generators: Generators, seed: int, index: int) -> None:
    """Put each generator to the start of its layer's stream in draw number `index` of `seed`."""
    for (_, layer, _), generator in generators.items():
        generator.manual_seed(stream_seed(seed, index, layer))
