"""What networks of others take and return: answered, or refused by `validate` and the constructor alike."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.opening import ensemble_of
from selfensemble.evaluation.doctor.examination import doctor
from selfensemble.runtime.remarks import Remark

from ..conftest import OutOfOrder


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def logits(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(inputs).relu()).mean(dim=(2, 3))
        return found


class Forms(Base):
    """Its answer in one form or another."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def forward(self, inputs: Tensor) -> Any:
        return self.form(self.logits(inputs))


class Output(NamedTuple):
    logits: Tensor
    features: int


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: {"logits": logits, "loss": None},
        lambda logits: (logits,),
        lambda logits: Output(logits, 3),
    ],
)
def test_answers_that_hold_logits(form: Any, images: Tensor) -> None:
    network = Forms(form)
    assert rse.validate(network, images) == []
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0, 0), example_inputs=images).eval()
    expected = network.logits(images).softmax(dim=1)
    assert torch.allclose(ensemble.predict_proba(images), expected, atol=1e-6)
    assert torch.allclose(ensemble(images).exp(), expected, atol=1e-6)
    checks = doctor(network, images, ensemble.predict(images).label, images=5, steps=1, eot=1)
    assert not [check for check in checks if check.figure == "could not be done"]


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: (logits, logits),
        lambda logits: {"scores": logits},
        lambda logits: logits[:, :1],
        lambda logits: logits[:, 0],
        lambda logits: logits.argmax(dim=1),
        lambda logits: logits[:, :, None],
        lambda logits: logits[:3],
        lambda logits: logits.tolist(),
        lambda logits: None,
    ],
)
def test_other_answers_are_refused_in_the_same_words(form: Any, images: Tensor) -> None:
    (issue,) = rse.validate(Forms(form), images)
    assert (issue.rule, issue.severity) == ("output", "error")
    network = Forms(form)
    with pytest.raises(ValueError, match="logits") as raised:
        rse.SelfEnsemble(network, example_inputs=images)
    assert str(raised.value) == issue.message
    assert rse.noise_layers(network) == {}  # left as it was
    with pytest.raises(ValueError, match="logits") as raised:
        rse.SelfEnsemble(network).eval().predict(images)
    assert str(raised.value).partition(" for ")[0] == issue.message.partition(" for ")[0]


class ByKeyword(Base):
    def forward(self, *, pixel_values: Tensor) -> Tensor:
        return self.logits(pixel_values)


class OfTwo(Base):
    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.logits(inputs) * mask


class WithLabels(Base):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.logits(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("network", [ByKeyword, OfTwo])
def test_what_cannot_be_called_is_refused_in_the_same_words(network: type[nn.Module], images: Tensor) -> None:
    example: Any = {"pixel_values": images} if network is ByKeyword else (images, torch.ones(6, 1))
    (issue,) = rse.validate(network(), example)
    assert (issue.rule, issue.severity) == ("inputs", "error")
    for given in (None, example):
        with pytest.raises(ValueError, match=r"calls model\(inputs\)") as raised:
            rse.SelfEnsemble(network(), example_inputs=given)
        assert str(raised.value) == issue.message


def test_labels_in_the_batch(images: Tensor) -> None:
    batch = {"pixel_values": images, "labels": torch.zeros(6, dtype=torch.int64)}
    assert rse.validate(WithLabels(), batch) == []
    ensemble = rse.SelfEnsemble(WithLabels(), example_inputs=batch).eval()
    assert ensemble.predict(images).probabilities.shape == (6, 5)


def test_the_order_of_registration_is_said_where_it_was_taken(images: Tensor) -> None:
    network = OutOfOrder()
    rse.inject_noise_(network)
    (issue,) = rse.validate(network, images)
    assert (issue.rule, issue.where) == ("order", "inner")
    assert "stem runs before it" in issue.message
    rse.remove_noise_(network)
    rse.inject_noise_(network, example_inputs=images)
    assert rse.validate(network, images) == []


class Adapted(nn.Module):
    """As peft wraps a convolution."""

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        narrow = nn.Conv2d(base_layer.in_channels, 2, base_layer.kernel_size[0])
        self.lora_A = nn.ModuleDict({"default": narrow})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(2, base_layer.out_channels, 1)})

    def forward(self, inputs: Tensor) -> Tensor:
        added: Tensor = self.base_layer(inputs) + self.lora_B["default"](self.lora_A["default"](inputs))
        return added


def test_an_adapted_convolution_gets_noise_once(images: Tensor) -> None:
    network = nn.Sequential(
        Adapted(nn.Conv2d(3, 4, 3)),
        nn.ReLU(),
        Adapted(nn.Conv2d(4, 5, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    assert rse.validate(network, images) == []
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.2, 0.1)).eval()
    levels = {fqn: layer.std for fqn, layer in rse.noise_layers(network).items()}
    assert levels == {"0": 0.2, "2": 0.1}
    assert rse.validate(network, images) == []
    assert float(rse.certify(ensemble, images, n=100).radius.min()) >= 0  # nothing goes around the noise


class Transformer(nn.Module):
    """Patches by one convolution, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.patches(inputs).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        logits: Tensor = self.head((tokens + self.layers(tokens)).mean(dim=1))
        return logits


def test_noise_in_front_of_one_layer_of_many_is_plain_smoothing(images: Tensor) -> None:
    (issue,) = rse.validate(Transformer(), images)
    assert (issue.rule, issue.where) == ("one-layer", "patches")
    assert "3 linear layers get none" in issue.message
    assert "conv+linear" in issue.cure
    assert rse.validate(Transformer(), images, filter_fn="conv+linear") == []
    network = Transformer()
    rse.inject_noise_(network, filter_fn="conv+linear", example_inputs=images)
    assert list(rse.noise_layers(network)) == ["patches", "layers.0", "layers.2", "head"]
    assert rse.validate(network, images, filter_fn="conv+linear") == []
    with pytest.raises(ValueError, match="conv, linear, conv"):
        rse.inject_noise_(Transformer(), filter_fn="all")  # type: ignore[arg-type]


class Failing(Base):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.shape[-1] != 32:
            raise self.error
        return self.logits(inputs)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("temperature must be positive"),
        RuntimeError("Expected all tensors to be on the same device, but found sizes on two"),
        RuntimeError("mat1 and mat2 must have the same dtype, but got Float and Double"),
        RuntimeError("a view of a leaf Variable that requires grad is being used in an inplace operation"),
        RuntimeError("expected scalar type Double but found Float"),
        KeyError("pixel_values"),
    ],
)
def test_other_faults_are_not_put_down_to_the_shape(error: Exception, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(Failing(error)).eval()
    with pytest.raises(type(error)) as raised:
        ensemble.predict(images)
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Make sure that the channel dimension of the pixel values match with the configuration."),
        AssertionError("Input height (8) doesn't match model (32)."),
        RuntimeError(
            "The size of tensor a (8) must match the size of tensor b (32) at non-singleton dimension 3"
        ),
    ],
)
def test_faults_of_the_shape_are(error: Exception, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(Failing(error)).eval()
    with pytest.raises(
        ValueError, match=r"cannot take inputs of shape \(\d, 3, 8, 8\).*its first layer is Conv2d"
    ):
        ensemble.predict(images)


class OfABatch(nn.Module):
    """Takes the dictionary that a data loader gives, labels and all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.conv(batch["pixel_values"]).mean(dim=(2, 3))
        return logits


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_forward_that_fails_is_refused_in_the_words_of_validate(images: Tensor) -> None:
    with pytest.raises(ValueError, match="the forward pass fails: IndexError") as caught:
        rse.SelfEnsemble(OfABatch(), rse.NoiseConfig(0.1, 0.1), example_inputs=images)
    (issue,) = [each for each in rse.validate(OfABatch(), images) if each.rule == "forward"]
    assert issue.cure in str(caught.value)


class Frames(nn.Module):
    """Puts the frames of videos into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, videos: Tensor) -> Tensor:
        frames: Tensor = self.conv(videos.flatten(0, 1)).mean(dim=(2, 3))
        answers: Tensor = frames.unflatten(0, videos.shape[:2]).mean(dim=1)
        return answers


def test_parts_of_an_input_that_would_share_noise_are_said_with_an_example(images: Tensor) -> None:
    videos = images.unflatten(0, (2, 3))
    with pytest.warns(Remark, match=r'conv: it gets a batch of 6 for 2 inputs.* sampling="per_image"'):
        rse.SelfEnsemble(Frames(), example_inputs=videos)
    own = rse.SelfEnsemble(Frames(), example_inputs=videos, sampling="per_image")
    assert rse.validate(own.model, videos) == []
    assert [each.rule for each in rse.validate(own.model, videos, sampling="shared")] == ["folded-batch"]
    rse.SelfEnsemble(Frames(), rse.NoiseConfig(0, 0), example_inputs=videos)  # nothing to share


LEVELS = [rse.NoiseConfig(0.2, 0.1), rse.NoiseConfig(0.2, 0.0), rse.NoiseConfig(0.0, 0.2)]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("call", ["forward", "predict"])
def test_another_order_than_that_of_registration_is_said_once_at_the_first_pass(
    images: Tensor, levels: rse.NoiseConfig, call: str
) -> None:
    ensemble = rse.SelfEnsemble(OutOfOrder(), levels)
    stds = {fqn: layer.std for fqn, layer in rse.noise_layers(ensemble.model).items()}
    with pytest.warns(Remark, match="inner: it has the noise of the first layer, and stem runs before it"):
        getattr(ensemble, call)(images)
    ensemble.predict(images)  # warnings are errors
    copy.deepcopy(ensemble)(images)
    ensemble.train()(images)
    assert {fqn: layer.std for fqn, layer in rse.noise_layers(ensemble.model).items()} == stds
    assert not any(module._forward_hooks for module in ensemble.modules())


def test_the_order_is_not_asked_for_where_it_cannot_matter(images: Tensor) -> None:
    rse.SelfEnsemble(OutOfOrder(), example_inputs=images)(images)
    rse.SelfEnsemble(OutOfOrder(), rse.NoiseConfig(0.1, 0.1))(images)
    fine = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rse.SelfEnsemble(fine)(images)


def test_a_failed_pass_is_not_the_first(images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(OutOfOrder())
    with pytest.raises(RuntimeError, match="channels"):
        ensemble(images[:, :1])
    with pytest.warns(Remark, match="registration"):
        ensemble(images)


def test_many_threads_say_the_order_once(images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(OutOfOrder()).eval()
    with warnings.catch_warnings(record=True) as said, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        list(pool.map(lambda _: ensemble.predict(images), range(8)))
    assert [str(each.message) for each in said if "registration" in str(each.message)] == [
        str(each.message) for each in said
    ]
    assert len(said) == 1


def test_graphs_are_recorded_as_before_and_compiled_networks_say_it(images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(OutOfOrder()).eval()
    torch.export.export(ensemble, (images,))
    compiled = torch.compile(ensemble, backend="eager", fullgraph=True)
    compiled(images)
    network: Any = torch.compile(rse.inject_noise_(OutOfOrder()), backend="eager")
    inside = rse.SelfEnsemble(network).eval()
    with pytest.warns(Remark, match="stem runs before it"):
        inside(images)
    with pytest.warns(Remark, match="stem runs before it"):
        ensemble(images)
    compiled(images)


class Adaptive(Base):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits(inputs)


class OfBatches(Base):
    """As training loops with batches of keys have it."""

    def forward(self, batch: Any) -> Tensor:
        return self.logits(batch["image"])


class OfAttributes(Base):
    def forward(self, batch: Any) -> Tensor:
        return self.logits(batch.image)


class Unready(Base):
    def forward(self, inputs: Tensor) -> Tensor:  # noqa: ARG002
        raise RuntimeError("missing variable DATA_ROOT")


def of_batches(images: Tensor) -> dict[str, Any]:
    return {"image": images, "label": torch.zeros(6, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("network", "example", "cure"),
    [
        (OfBatches, lambda images: images, "labels apart"),
        (OfBatches, of_batches, "labels apart"),
        (OfAttributes, lambda images: images, "labels apart"),
        (Unready, lambda images: images, "Its own code fails"),
        (Base, lambda images: images, "Its own code fails"),  # has no forward
        (Adaptive, lambda images: images[:, :1], "Pass example inputs that the model accepts"),
        (Adaptive, lambda images: images.double(), "Pass example inputs that the model accepts"),
    ],
)
def test_a_failed_pass_is_said_in_the_same_words_and_blames_what_failed(
    network: type[nn.Module], example: Any, cure: str, images: Tensor
) -> None:
    (issue,) = rse.validate(network(), example(images))
    assert (issue.rule, issue.severity) == ("forward", "error")
    assert cure in issue.cure
    with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
        rse.SelfEnsemble(network(), example_inputs=example(images))
    assert str(raised.value) == f"{issue.message}. {issue.cure}"
    if example(images) is images:  # what commands say of a named network
        with pytest.raises(ValueError, match="forward pass fails") as named:
            ensemble_of(network(), "nets.py:make", example_inputs=images)
        assert str(named.value) == str(raised.value)
