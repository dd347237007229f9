"""Sections of a recipe: data, network, noise, optimiser."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..networks.names import Activation
from ..noise.filters import Filter
from ..noise.layer import NoiseConfig
from ..noise.learned import Granularity
from ..noise.streams import Sampling
from ..runtime.schema import Bounds, Count, NonNegative, Positive, Section

Share = Annotated[float, Field(gt=0, le=1)]


class PhotoSection(Section):
    """What is done to photos in training, each on its own, before it has its size (`data.size`).

    `scale`, `ratio`: share of the area and proportions of the part that is cut out and resized, at random
    (Szegedy et al., 2015). `jitter`: how far brightness, contrast and saturation change, as a share.
    `rand_augment`: how many changes a photo gets, of strength `magnitude` of 30 (Cubuk et al., 2020). The
    last two need the package timm: pip install selfensemble[photos].
    """

    scale: tuple[Share, Share] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    rand_augment: Annotated[int, Field(ge=0)] = 0
    magnitude: Annotated[int, Field(ge=0, le=10)] = 9

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.scale[0] > self.scale[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError("scale and ratio are the least and the most: write them in that order")
        return self


class DataSection(Section):
    """Images, and what is done to them. `source` to `revision`: see `load_data`.

    `images`: at most as many of each split, drawn by the seed, to try things out. `workers`: processes that
    decode photos; None for as many as there are cores, 8 at most; the results do not depend on it. `photos`:
    what is done to them in training. `mixup`: each image is mixed with another one, this one's share drawn
    from Beta(mixup + 1, mixup); 0 for not. `bounds`: the range of inputs, which is then that of the network,
    the unit of its noise and of the radii of attacks; uint8 images are scaled to it.
    """

    source: str = "digits"
    size: Count | None = None
    images: Count | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    crop_padding: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    channels: Literal[1, 3] | None = None
    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    split_seed: Annotated[int, Field(ge=0)] = 0
    stream: bool | None = None
    centre: Share = 1.0
    revision: str | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    photos: PhotoSection | None = None
    mixup: NonNegative = 0.0
    shape: Annotated[tuple[Count, ...], Field(min_length=1, max_length=4)] | None = None
    bounds: Bounds = (0.0, 1.0)

    def reading(self) -> dict[str, Any]:
        """Arguments of `load_data` beside source and split."""
        names = (
            "size", "channels", "train_split", "test_split", "image_column", "label_column", "test_share",
            "split_seed", "stream", "centre", "revision", "shape",
        )  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        if self.photos is not None and self.size is not None and self.stream is None:
            found["stream"] = True  # the whole photo is wanted, not what is left of it at that size
        return found

    @model_validator(mode="after")
    def _has_whole_photos(self) -> Self:
        if self.photos is not None and self.size is not None and self.stream is False:
            raise ValueError("data.photos needs the whole photos: leave data.stream out")
        return self


class NormalizeSection(Section):
    """Mean and standard deviation of the channels, of pixels in [0, 1]; one number, or one for each."""

    mean: float | tuple[float, ...]
    std: Positive | tuple[Positive, ...]


class ModelSection(Section):
    """Network: a key of `MODELS`, the factor on its channels, and what stands behind its convolutions.

    `weights`: a trained network to begin with, a folder that `train` wrote or a name of the zoo; it has to be
    of the same architecture. Noise levels are the recipe's, not those it was trained with.

    `network`: another one instead, "package.module:attribute", "file.py:attribute" or of a library, see
    `networks.naming.network_from`, which imports it, with `arguments`. `weights` may be a file of
    weights, too. `normalize`: mean and std of the inputs, in the units of `data.bounds`, that it wants taken
    off and divided by; by default those of pretrained weights of a library, else none.
    """

    name: str = "small-cnn"
    width: Positive = 1.0
    activation: Activation = "relu"
    weights: str | None = None
    network: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    normalize: NormalizeSection | None = None

    @model_validator(mode="after")
    def _has_arguments_of_something(self) -> Self:
        if self.arguments and self.network is None:
            raise ValueError("arguments are those of model.network: set it, or width and activation")
        return self


class NoiseSection(Section):
    """Noise levels and draws a prediction; both levels 0 is the plain network.

    `first`: where the noise of `init_std` is added, to the "image" as the paper says, or to "features",
    those of the first convolution, as the authors' code does; the image then has no noise, and nothing can
    be certified. `learn`: levels are learned from there, one a layer or one a channel; `hold`: the weight of
    what keeps them up, see `selfensemble.noise.learned`. `filter`: which layers have noise before them.
    `sampling`: whether inputs of a batch share the noise of a prediction; "per_image" for networks that put
    parts of an input (frames, windows) into the batch.
    """

    init_std: NonNegative = NoiseConfig().init_std
    inner_std: NonNegative = NoiseConfig().inner_std
    first: Literal["image", "features"] = "image"
    filter: Filter = "conv"
    learn: Granularity | None = None
    hold: NonNegative = 0.1
    draws: Count = 10
    sampling: Sampling = "shared"

    @model_validator(mode="after")
    def _has_noise_to_learn(self) -> Self:
        if self.learn and not (self.init_std or self.inner_std):
            raise ValueError("there is no noise to learn: set init_std or inner_std above 0")
        return self

    def config(self) -> NoiseConfig:
        return NoiseConfig(self.init_std, self.inner_std)


class TrainSection(Section):
    """The optimiser and its schedule.

    `optimizer`: "adam" and "adamw" have torch's settings but for `lr` and `weight_decay`; momentum is for
    "sgd" alone. `decay_of`: "all" parameters have weight decay, or "matrices" alone, not biases and norms.
    `layer_decay`: the learning rate of a layer, and with it its decay, is this share of that of the next one.
    `warmup_epochs`: in which the rate rises from near 0, before `schedule` begins. `accumulate`: passes that
    share a batch and its step. `clip`: the norm to which larger gradients are cut.
    `stages`: lengths of the stages between which the learning rate falls by 10, relative to each other:
    they are stretched to `epochs`. `average`: what is kept of the averaged weights at each step, e.g.
    0.999; with it the average is validated and saved (Polyak averaging); 0 saves the last weights.
    `checkpoint_steps`: None for once an epoch.
    """

    epochs: Count = 30
    batch_size: Count = 128
    lr: Positive = 0.1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 5e-4
    decay_of: Literal["all", "matrices"] = "all"
    layer_decay: Share = 1.0
    schedule: Literal["stages", "cosine", "one_cycle"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    stages: tuple[Positive, ...] = (80, 60, 40, 20)
    # YAML reads a bare `no` as false.
    precision: Annotated[
        Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)
    ] = "no"
    channels_last: bool = True
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    accumulate: Count = 1
    clip: Positive | None = None
    checkpoint_steps: Count | None = None

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be fewer than epochs ({self.epochs})")
        if self.warmup_epochs and self.schedule == "one_cycle":
            raise ValueError("one_cycle begins with a rise of its own: leave warmup_epochs out")
        return self
