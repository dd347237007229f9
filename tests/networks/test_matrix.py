"""A sample of the table of networks of others (`benchmarks/networks_matrix.py`), whose every cell works."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from selfensemble.ensemble.checks import check_count

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "networks_matrix.py"
SAMPLE = ("ResNet", "MobileNetV2", "ConvNext", "ViT", "Swin", "Segformer", "PvtV2", "Levit")
QUICK = ("noise in", "noise out", "predict", "train", "checkpointing", "copy")


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("networks_matrix", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["networks_matrix"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", SAMPLE)
def test_networks_of_others(matrix: ModuleType, name: str) -> None:
    side = matrix.TRANSFORMERS[name].get("image_size", 64)
    images = torch.rand(4, 3, side, side)
    make = partial(matrix.seeded_make, partial(matrix.transformers_network, name))
    cells = {what: matrix.cell(matrix.CAPABILITIES[what], make, images) for what in QUICK}
    assert cells == dict.fromkeys(QUICK, ("yes", ""))


def test_wrong_cells_are_found(matrix: ModuleType) -> None:
    """And refused ones, with the reason; the page counts them."""
    images = torch.rand(4, 3, 8, 8)

    def refuses(make: object, images: object) -> str:
        return str(check_count("no\nway", 0))

    def breaks(make: object, images: object) -> str:
        raise ValueError("of somebody else")

    found = {
        "fine": matrix.cell(lambda make, images: "", None, images),
        "wrong": matrix.cell(lambda make, images: "differs", None, images),
        "refused": matrix.cell(refuses, None, images),
    }
    refused = "no way must be an integer >= 1, got 0"
    assert found == {"fine": ("yes", ""), "wrong": ("wrong", "differs"), "refused": ("refused", refused)}
    assert matrix.cell(breaks, None, images) == ("wrong", "of somebody else")
    text = matrix.page({"net": dict(zip(matrix.CAPABILITIES, found.values(), strict=False))})
    assert "1 cells work, 1 refused with the reason below, 1 wrong" in text
    assert "| net | yes | wrong (1) | refused (2) |" in text
    assert f"1. differs\n2. {refused}" in text
