"""What networks are called: names that are known without PyTorch."""

import re
from pathlib import Path
from typing import Literal

Activation = Literal["relu", "brelu"]
MODEL_NAMES = (
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "resnet18",
    "resnext29-2x64d",
    "stl10-model-a",
    "small-cnn",
)
LIBRARY_NAMES = ("timm", "torchvision", "transformers")
_HUB = "hf-hub:"  # of saved ensembles


def is_network_name(text: object) -> bool:
    """Whether it names a network, not a folder, one of the zoo or a saved ensemble on the Hub."""
    name = str(text)
    before, colon, attribute = name.rpartition(":")
    if not colon or name.startswith(_HUB) or Path(name).exists():
        return False
    library = name.partition(":")[0] in LIBRARY_NAMES
    return library or (len(before) > 1 and not re.search(r"[\\/]", attribute))  # C:\folder is a folder
