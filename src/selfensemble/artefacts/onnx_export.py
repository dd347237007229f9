"""ONNX files in which the noise stays random: it is that of a seed which every run is given.

An ensemble repeats the batch, an image for each draw, so that one run of the graph gives the mean of all
draws.
"""

import io
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..ensemble.checks import check_count, explain_shape
from ..ensemble.ensemble import SelfEnsemble
from ..fast.ensemble import checked_original
from ..noise.injection import eval_mode, noise_layers, random_layers
from ..noise.layer import GaussianNoise, Std
from ..noise.operators import onnx_translated
from ..runtime.files import atomic_file
from ..runtime.packages import needs
from .onnx_noise import NOISE, seed_noise

if TYPE_CHECKING:
    import onnx

PREFIX = "selfensemble"  # of our keys in the metadata of a file


class _Exported(nn.Module):
    """Images (B, ...) to the mean and the spread of the softmax over the draws, both (B, K)."""

    def __init__(self, ensemble: SelfEnsemble, draws: int) -> None:
        super().__init__()
        self.ensemble, self.draws = ensemble, draws

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.draws == 1:
            return (self.ensemble.draw_logits(images).float().softmax(dim=-1),)
        repeated = images.unsqueeze(0).expand(self.draws, *images.shape).flatten(0, 1)
        each = self.ensemble.draw_logits(repeated).float().softmax(dim=-1)
        each = each.unflatten(0, (self.draws, images.shape[0]))
        return each.mean(dim=0), each.std(dim=0)


def export_onnx(
    ensemble: SelfEnsemble,
    path: str | Path,
    example_inputs: Tensor,
    *,
    draws: int | None = None,
    classes: tuple[str, ...] | None = None,
) -> Path:
    """Write an ensemble as an ONNX file with noise from a seed that must be fresh in every run.

    The graph takes `images`, (B, ...) float32 (or float16, as the network) in the bounds of the ensemble,
    and `seed`, (4,) uint32: 128 bits that must be fresh in every run, as `OnnxEnsemble` makes them. (A
    network without noise takes no seed.) It gives `probabilities`, (B, K), the mean softmax over the draws,
    and with more than one draw `spread`, (B, K), its standard deviation over them. Every image and draw has
    different noise. The number of draws is part of the graph; a run needs memory for `draws` times its
    images.

    Not exported: the streams of `noise_draw` (the same seed gives different noise here), stopping rules,
    decisions and certificates.

    Args:
        ensemble: with Gaussian noise layers only; for an optimised copy, its original is exported.
        path: of the file; it is replaced as a whole or not at all.
        example_inputs: (B, ...) images of the right shape; the exported graph takes any B.
        draws: of an ensemble; None for those of `ensemble`, 1 for a single noisy pass.
        classes: names, for the metadata.

    Returns:
        The path.

    Raises:
        ValueError: there are random layers that ONNX cannot express, the network draws other random numbers,
            computes in float64 or bfloat16, or cannot be exported.
        MissingPackage: onnx or onnxscript is missing: `pip install 'selfensemble[onnx]'`.
    """
    onnx = _onnx()
    original = checked_original(ensemble)
    draws = ensemble.draws if draws is None else check_count("draws", draws)
    _check_layers(original)
    _check_dtypes(original)
    with eval_mode(original), torch.no_grad():
        with explain_shape(original, example_inputs):
            original.draw_logits(example_inputs[:2])
        exported = _Exported(original, draws)
        exported.training = False
        model = _translated(exported, example_inputs, draws)
    active = _noise_of_the_logits(original, example_inputs[:2])
    _check_graph(model, len(active))
    model = seed_noise(model)
    _check_repeats(original, example_inputs)
    facts: dict[str, Any] = {"version": version("selfensemble"), "draws": draws, "noise": active}
    facts |= {"bounds": ensemble.bounds, "classes": classes}
    onnx.helper.set_model_props(model, {f"{PREFIX}.{key}": json.dumps(each) for key, each in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    path = Path(path)
    with atomic_file(path) as file:
        file.write(model.SerializeToString())
    return path


def _noise_of_the_logits(ensemble: SelfEnsemble, images: Tensor) -> dict[str, Std]:
    """Levels of the active noise layers, but for those in branches that the logits do not depend on."""
    layers = {name: layer for name, layer in noise_layers(ensemble.model).items() if layer.is_active}
    probes = [torch.zeros((), device=images.device, requires_grad=True) for _ in layers]
    handles = [
        layer.register_forward_hook(lambda layer, given, out, probe=probe: out + probe)
        for layer, probe in zip(layers.values(), probes, strict=True)
    ]
    try:
        with eval_mode(ensemble), torch.enable_grad():
            total = ensemble.draw_logits(images).sum()
            reached = torch.autograd.grad(total, probes, allow_unused=True) if probes else ()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: layer.std for (name, layer), one in zip(layers.items(), reached, strict=True) if one is not None
    }


def _check_graph(model: Any, layers: int) -> None:
    found = sum(node.op_type == NOISE for node in model.graph.node)
    if found < layers:
        raise ValueError(
            f"the exported graph has {found} of {layers} noise layers: it would be no defense, and is not "
            "written"
        )


def _check_repeats(ensemble: SelfEnsemble, images: Tensor) -> None:
    with eval_mode(ensemble), torch.no_grad():
        if ensemble.has_other_noise(images):
            raise ValueError(
                "the answers of this network change from pass to pass by more than its random layers (random "
                "numbers of Python or NumPy, a counter): an ONNX file would always give one of them. Take "
                "that out, or draw with GaussianNoise"
            )


def _onnx() -> ModuleType:
    """The package onnx, with what torch's exporter needs."""
    with needs("selfensemble[onnx]"):
        import onnx
        import onnxscript  # noqa: F401
    return onnx


def _check_dtypes(ensemble: SelfEnsemble) -> None:
    """Raise a ValueError for what ONNX has no operators for, or onnxruntime none that it can run."""
    computing = [module.weight.dtype for module in ensemble.modules() if isinstance(module, _ConvNd)]
    for dtype in (ensemble.input_dtype, *computing):
        if dtype not in (None, torch.float32, torch.float16):
            raise ValueError(
                f"the network computes in {dtype}, in which runtimes of ONNX have no convolutions: export it "
                "in float32 (ensemble.float(), and example_inputs in float32), or in float16"
            )


def _check_layers(ensemble: SelfEnsemble) -> None:
    strange = Counter(
        type(layer).__name__
        for layer in random_layers(ensemble)
        if layer.is_active and not isinstance(layer, GaussianNoise)
    )
    if strange:
        raise ValueError(
            f"ONNX has no operator for {', '.join(strange)}: only Gaussian noise can be exported; serve this "
            "network with `selfensemble serve`, or save it and load it in Python"
        )


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CALLED = re.compile(
    r'The following call raised this error:\s+File "(?P<file>[^"]+)", '
    r"line (?P<line>\d+)[^\n]*\n(?P<code>[^\n]*)"
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter warns of about itself, and that torchvision is not there."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # where it prints graphs that fail
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What torch's exporter found at last, and where in the network, in one line without its colours."""
    place = _CALLED.search(str(error))
    while error.__cause__ is not None:
        error = error.__cause__
    text = _COLOURS.sub("", str(error)).strip().partition("\n")[0]
    where = "" if place is None else f" ({Path(place['file']).name}:{place['line']}: {place['code'].strip()})"
    return f"{type(error).__name__}: {text[:400]}{where}"


def _translated(module: nn.Module, example_inputs: Tensor, draws: int) -> "onnx.ModelProto":
    from onnxscript import opset18 as op

    def add_noise(inputs, std: float, layer: int, shared: bool, pairs: bool, call: int):  # type: ignore[no-untyped-def]
        return op.Add(inputs, op.RandomNormalLike(inputs, mean=0.0, scale=std))

    def unit_noise(inputs, layer: int, shared: bool, pairs: bool, call: int):  # type: ignore[no-untyped-def]
        return op.RandomNormalLike(inputs, mean=0.0, scale=1.0)

    ours = torch.ops.selfensemble
    table: dict[Any, Any] = {ours.add_noise.default: add_noise, ours.unit_noise.default: unit_noise}
    names = ["probabilities", "spread"][: 1 + (draws > 1)]
    # An example of one image would make the batch size a constant.
    example = example_inputs[:2] if len(example_inputs) > 1 else example_inputs.repeat_interleave(2, dim=0)
    try:
        with _quiet(), onnx_translated():
            program = torch.onnx.export(
                module, (example,), dynamo=True, verbose=False, input_names=["images"], output_names=names,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, custom_translation_table=table,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"torch cannot export this network as ONNX: {_reason(error)}") from error
    assert program is not None
    model = program.model_proto
    ends = [*model.graph.input, *model.graph.output]
    if not all(end.type.tensor_type.shape.dim[0].dim_param for end in ends):
        raise ValueError(
            "this network computes with its batch size as a constant, so that the file would take batches of "
            f"{len(example)} images only: use shapes such as `x.flatten(1)`, which keep it open"
        )
    return model
