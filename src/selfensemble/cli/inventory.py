"""What is installed here, told without PyTorch, which takes seconds to load."""

import os
from importlib import resources
from pathlib import Path
from typing import Any

from ..artefacts.zoo import zoo
from ..networks.names import MODEL_NAMES
from ..runtime.packages import needs
from ..runtime.provenance import surroundings

with needs("selfensemble[cli]"):
    import yaml

_RECIPES, _PROTOCOLS = "training/recipes", "evaluation/protocols"


def inventory() -> dict[str, Any]:
    """Versions, hardware, and the networks, recipes and protocols that come with the package."""
    found = surroundings()
    found["hardware"] |= _threads() | {"accelerator": accelerators(found["versions"]["torch"])}
    shipped = {"recipes": _shipped(_RECIPES), "protocols": _shipped(_PROTOCOLS)}
    return found | {"models": list(MODEL_NAMES)} | shipped | {"zoo": list(zoo())}


def _threads() -> dict[str, int]:
    """That PyTorch would compute with, where the environment says so; else it looks at the cores itself."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return {"threads": int(wanted)} if wanted.isdecimal() and int(wanted) > 0 else {}


def accelerators(torch_version: str, driver: Path = Path("/proc/driver/nvidia/gpus")) -> str | None:
    """Graphics cards as NVIDIA's driver names them; whether PyTorch can use them only PyTorch knows.

    Args:
        torch_version: one that was built for the CPU alone uses none.
        driver: where it says what there is.
    """
    if torch_version.endswith("+cpu") or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    names = []
    for card in sorted(driver.glob("*/information")):
        try:
            lines = card.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return ", ".join(names) or None


def _shipped(folder: str) -> dict[str, str]:
    """Descriptions of the YAML files of a folder of the package, by name."""
    files = sorted(resources.files("selfensemble").joinpath(folder).iterdir(), key=lambda file: file.name)
    fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for file in files:
        if file.name.endswith(".yaml"):
            values = yaml.load(file.read_text(encoding="utf-8"), fast)  # noqa: S506 (a safe loader)
            found[Path(file.name).stem] = str(values.get("description", ""))
    return found
