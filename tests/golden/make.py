"""Writes the golden artefact of the current format version; run once when the version rises.

`python tests/golden/make.py`
"""

from pathlib import Path

import safetensors.torch
import torch

import selfensemble as rse
from selfensemble.artefacts.config import Architecture
from selfensemble.artefacts.outline import FORMAT_VERSION

if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(__file__).parent / f"v{FORMAT_VERSION}"
    architecture = Architecture(name="small-cnn", classes=10, channels=1, width=0.125)
    ensemble = rse.SelfEnsemble(
        rse.create_model(**architecture.model_dump()), rse.NoiseConfig(0.4, 0.2), draws=3
    ).eval()
    images = rse.load_data("digits", "test").inputs(slice(4))
    rse.save(ensemble, folder, architecture=architecture, classes=tuple("0123456789"), input_shape=(1, 8, 8))
    with rse.noise_disabled(ensemble), torch.no_grad():
        logits = ensemble.draw_logits(images)
    outputs = {"images": images, "logits": logits, "proba": ensemble.predict_proba(images, seed=1)}
    safetensors.torch.save_file(outputs, folder / "outputs.safetensors")
