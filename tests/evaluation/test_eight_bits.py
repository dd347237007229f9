"""Attacked images as files hold them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import selfensemble as rse
from selfensemble.attacks.norms import project, size
from selfensemble.data.images import ImageData
from selfensemble.evaluation.eight_bits import in_8_bits, write_images
from selfensemble.evaluation.protocol import Protocol
from selfensemble.evaluation.runner import Evaluation


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    radius=st.floats(0.02, 0.8),
    seed=st.integers(0, 1000),
)
def test_rounded_images_stay_in_the_ball_and_lose_little(norm: str, radius: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randint(256, (4, 3, 6, 6)) / 255
    eps = radius * {"linf": 0.2, "l2": 1.0, "l1": 20.0}[norm]
    found = x + project(torch.randn_like(x), norm, eps, x)
    images = in_8_bits(found, x, norm, eps)
    assert torch.equal((images * 255).round() / 255, images)
    assert (size(images - x, norm) <= eps * (1 + 1e-4)).all()
    # A step of 1/255 along each pixel at most, and a little of the length where rounding left the ball.
    assert ((images - found).abs() <= 0.5 / 255 + (found - x).abs() + 1e-6).all()
    if norm == "linf":
        assert ((images - found).abs() <= 1.01 / 255).all()
    torch.testing.assert_close(in_8_bits(found, x), (found * 255).round() / 255)


def test_images_that_are_no_multiples_stay_themselves_where_no_rounded_one_fits() -> None:
    x = torch.full((1, 1, 2, 2), 0.5 / 255)
    assert torch.equal(in_8_bits(x + 1e-4, x, "linf", 2e-4), x)


def test_a_protocol_in_8_bits_judges_what_the_files_hold(
    tiny: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.1, 0.1), draws=2).eval()
    labels = ensemble.predict(images, seed=0).label
    data = ImageData("six", (images * 255).round().to(torch.uint8), labels, tuple("abcde"))
    attacks = [
        {"attack": "pgd", "norm": "l2", "eps": [0.3], "steps": 4},
        {"attack": "fmn", "norm": "l2", "eps": [0.3], "steps": 4},
    ]
    values = {
        "name": "bits",
        "images": 6,
        "shard": 4,
        "attacks": attacks,
        "judge": {"seeds": 1, "queries": 1},
    }
    plain = Protocol.model_validate(values)
    protocol = Protocol.model_validate(values | {"bits": 8})
    assert "bits" not in plain.record()  # folders of runs from before go on
    assert protocol.record()["bits"] == 8
    evaluation = Evaluation(ensemble, data, protocol, tmp_path / "run")
    evaluation.run()
    write_images(evaluation.shards, tmp_path / "images")
    for plan in evaluation.plans[1:]:
        files = sorted((tmp_path / "images" / plan.key).iterdir())
        assert [file.name for file in files] == [f"{number:07d}.png" for number in range(6)]
        stored = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
        stored = stored.permute(0, 3, 1, 2).float() / 255
        judged = torch.cat([evaluation.shards.read(start, plan.key).adversarial for start in (0, 4)])
        assert torch.equal(stored, judged)
        if plan.eps is not None:
            assert (size(stored - data.inputs(slice(6)), "l2") <= 0.3 + 1e-4).all()
    with pytest.raises(ValueError, match="differs in protocol"):
        Evaluation(ensemble, data, plain, tmp_path / "run")
