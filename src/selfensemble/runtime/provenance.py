"""Where a figure comes from: versions, hardware, time, and the interval around it."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Versions and hardware, as they belong beside every figure."""
    import torch

    found = surroundings()
    found["hardware"] |= {
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return found


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
    from scipy.special import (  # scipy.stats has it too, and takes twice as long to load
        betainccinv,
        betaincinv,
    )

    tail = (1 - level) / 2
    low = betaincinv(successes, trials - successes + 1, tail) if successes > 0 else 0.0
    high = betainccinv(successes + 1, trials - successes, tail) if successes < trials else 1.0
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
