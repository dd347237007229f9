"""A folder that the `Trainer` of transformers wrote gives back the network with its noise."""

from pathlib import Path
from typing import Any

import pytest
import torch

import selfensemble as rse

transformers = pytest.importorskip("transformers")
# Of transformers and accelerate.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_noise_of_a_training_run_is_restored(tmp_path: Path) -> None:
    data = rse.load_data("digits", "train")
    images = data.inputs(slice(2))
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 4],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    network = transformers.ResNetForImageClassification(config)
    rse.inject_noise_(network, rse.NoiseConfig(0.31, 0.07), example_inputs=images)
    rows: Any = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(data.inputs(slice(16)), data.labels[:16], strict=True)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=8, save_strategy="epoch",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=network, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    network.eval()
    expected = rse.SelfEnsemble(network).predict_proba(images, seed=1)
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        again = transformers.AutoModelForImageClassification.from_pretrained(folder)
        assert torch.equal(again(images).logits, again(images).logits)  # as transformers gives it back
        assert {issue.rule for issue in rse.validate(again, images)} == {"lost-noise"}
        ensemble = rse.SelfEnsemble(again)
        assert rse.validate(again, images) == []
        assert [layer.std for layer in rse.noise_layers(again).values()] == [0.31, *[0.07] * 5]
        torch.testing.assert_close(ensemble.predict_proba(images, seed=1), expected)


def test_the_callback_for_lightning_takes_such_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from selfensemble.lightning import RandomSelfEnsemble

    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=10
    )
    network = transformers.ResNetForImageClassification(config)
    rse.inject_noise_(network, rse.NoiseConfig(0.31, 0.07))
    network.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    RandomSelfEnsemble(again, example_inputs=torch.rand(2, 1, 8, 8))
    assert [layer.std for layer in rse.noise_layers(again).values()] == [0.31, 0.07, 0.07]
    again.resnet.embedder.embedder.convolution = torch.nn.Conv2d(1, 4, 7, stride=2, padding=3)
    with pytest.raises(ValueError, match="lost-noise"):
        RandomSelfEnsemble(again, example_inputs=torch.rand(2, 1, 8, 8))
