"""The paper's networks and a few others, for small images.

Every network takes images (B, channels, H, W) in [0, 1] and returns logits (B, classes).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .names import Activation

CREATED_AS = "created_as"  # attribute of a network: the arguments of `create_model`

# BReLU, min(max(0, x), 1): a change of the input cannot grow from layer to layer (Zantedeschi et al.,
# Efficient Defenses Against Adversarial Attacks, AISec 2017, section 4.1, with t = 1).
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "brelu": partial(nn.Hardtanh, 0.0, 1.0, inplace=True),
}

_VGG_STAGES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _vgg(classes: int, channels: int, width: float, activation: Activation, *, depth: str) -> nn.Sequential:
    """VGG (Simonyan & Zisserman 2015) in its form for 32x32: batch norm, one linear layer."""
    layers: list[nn.Module] = []
    for stage, repeats in enumerate(_VGG_STAGES[depth]):
        for _ in range(repeats):
            out = _scaled(min(64 * 2**stage, 512), width)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), ACTIVATIONS[activation]()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


class _Residual(nn.Module):
    """`activation(branch(x) + shortcut(x))`."""

    def __init__(
        self, branch: nn.Module, inputs: int, outputs: int, stride: int, activation: Activation
    ) -> None:
        super().__init__()
        self.branch = branch
        self.activation = ACTIVATIONS[activation]()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.activation(self.branch(inputs) + self.shortcut(inputs))
        return outputs


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [convolution, nn.BatchNorm2d(outputs)]


def _resnet18(classes: int, channels: int, width: float, activation: Activation) -> nn.Sequential:
    """ResNet-18 (He et al. 2016) in its form for 32x32: 3x3 stem, no pooling after it."""
    planes = _scaled(64, width)
    layers = [*_conv_norm(channels, planes, 3), ACTIVATIONS[activation]()]
    inputs = planes
    for stage in range(4):
        outputs = planes * 2**stage
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            branch = nn.Sequential(
                *_conv_norm(inputs, outputs, 3, stride),
                ACTIVATIONS[activation](),
                *_conv_norm(outputs, outputs, 3),
            )
            layers.append(_Residual(branch, inputs, outputs, stride, activation))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _resnext29(classes: int, channels: int, width: float, activation: Activation) -> nn.Sequential:
    """ResNeXt29-2x64d (Xie et al. 2017) as the method's authors use it: 1x1 stem, expansion 2."""
    stem, cardinality = _scaled(64, width), 2
    layers = [*_conv_norm(channels, stem, 1), ACTIVATIONS[activation]()]
    inputs = stem
    for stage in range(3):
        group = cardinality * stem * 2**stage
        for block in range(3):
            stride = 2 if stage > 0 and block == 0 else 1
            branch = nn.Sequential(
                *_conv_norm(inputs, group, 1),
                ACTIVATIONS[activation](),
                *_conv_norm(group, group, 3, stride, groups=cardinality),
                ACTIVATIONS[activation](),
                *_conv_norm(group, 2 * group, 1),
            )
            layers.append(_Residual(branch, inputs, 2 * group, stride, activation))
            inputs = 2 * group
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _model_a(classes: int, channels: int, width: float, activation: Activation) -> nn.Sequential:
    """Model A of the paper, for STL-10 at 96x96: six plain convolutions, batch norm not affine."""
    planes = _scaled(32, width)
    layers: list[nn.Module] = []
    # (output channels, padding, followed by 2x2 max-pooling)
    plan = [(1, 1, True), (2, 1, True), (4, 1, True), (4, 1, True), (8, 0, False), (8, 0, True)]
    for factor, padding, pool in plan:
        outputs = planes * factor
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=padding),
            nn.BatchNorm2d(outputs, affine=False),
            ACTIVATIONS[activation](),
        ]
        if pool:
            layers.append(nn.MaxPool2d(2))
        channels = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


def _small_cnn(classes: int, channels: int, width: float, activation: Activation) -> nn.Sequential:
    """Four 3x3 convolutions for 8x8 images."""
    layers: list[nn.Module] = []
    for stage in range(2):
        outputs = _scaled(32 * 2**stage, width)
        for _ in range(2):
            layers += [*_conv_norm(channels, outputs, 3), ACTIVATIONS[activation]()]
            channels = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


MODELS: dict[str, Callable[[int, int, float, Activation], nn.Module]] = {
    **{depth: partial(_vgg, depth=depth) for depth in _VGG_STAGES},
    "resnet18": _resnet18,
    "resnext29-2x64d": _resnext29,
    "stl10-model-a": _model_a,
    "small-cnn": _small_cnn,
}


def create_model(
    name: str, *, classes: int = 10, channels: int = 3, width: float = 1.0, activation: Activation = "relu"
) -> nn.Module:
    """Build the network `name` with fresh weights.

    Args:
        name: a key of `MODELS`.
        classes: K, logits an image.
        channels: channels of the images, 3 for colour and 1 for grey.
        width: factor on the number of channels of every layer.
        activation: "relu", or "brelu" for `min(max(0, x), 1)`.

    Raises:
        ValueError: unknown name or activation, or counts or width out of range.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if classes < 2 or channels < 1 or not 0 < width <= 16:
        raise ValueError(
            f"need classes >= 2, channels >= 1 and 0 < width <= 16, got {classes}, {channels}, {width}"
        )
    network = MODELS[name](classes, channels, width, activation)
    arguments = {"name": name, "classes": classes, "channels": channels, "width": width}
    setattr(network, CREATED_AS, arguments | {"activation": activation})
    return network
