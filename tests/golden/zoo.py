"""Writes the golden logits of networks of the zoo; run once for a new network.

`python tests/golden/zoo.py NAME...`
"""

import sys
from pathlib import Path

import safetensors.torch
import torch

import selfensemble as rse
from selfensemble.artefacts.storage import read_config

if __name__ == "__main__":
    for name in sys.argv[1:]:
        images = torch.rand(
            4, *read_config(name).input_shape or (), generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad(), rse.noise_draw(3, sampling="shared"):
            logits = rse.load(name).draw_logits(images)
        outputs = {"images": images, "logits": logits}
        safetensors.torch.save_file(outputs, Path(__file__).parent / "zoo" / f"{name}.safetensors")
