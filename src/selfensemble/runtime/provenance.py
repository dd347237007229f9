"""Where a figure comes from: versions, hardware, time, and the interval around it."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def provenance(device: "torch.device | None" = None) -> dict[str, Any]:
    """Versions and hardware, as they belong beside every figure.

    Args:
        device: where it was measured; None where an accelerator is used if there is one.
    """
    import torch

    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    found = surroundings()
    found["hardware"] |= {"threads": torch.get_num_threads(), "accelerator": _accelerator(device)}
    return found


def _accelerator(device: "torch.device") -> str | None:
    """Its name, None of a CPU."""
    import torch

    if device.type == "cpu":
        return None
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def surroundings() -> dict[str, Any]:
    """What of it is known without PyTorch."""
    packages = ("selfensemble", "torch", "numpy", "accelerate")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count()},
    }


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a proportion: it covers with at least `level`."""
    from scipy import special  # not its `stats`, which takes three times as long to import

    tail, rest = (1 - level) / 2, trials - successes
    low = special.betaincinv(successes, rest + 1, tail) if successes else 0.0
    high = special.betaincinv(successes + 1, rest, 1 - tail) if rest else 1.0
    return float(low), float(high)


def accuracy_record(successes: int, trials: int) -> dict[str, Any]:
    """An accuracy with its 95 % interval, as it stands in results files."""
    low, high = binomial_interval(successes, trials)
    return {"accuracy": successes / trials, "low": low, "high": high, "images": trials}


def _version(package: str) -> str:
    """Unknown of what is imported from its source without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
