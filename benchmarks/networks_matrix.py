"""Networks of others against what can be done with them: a table of what works, what is refused, and why.

    python benchmarks/networks_matrix.py [--only NAME] [--rows FOLDER] [--out docs/networks-table.md]

Tiny networks with fresh weights, of transformers from configurations, of timm, torchvision, pytorchcv and
peft where these can be imported, and those of facenet-pytorch with the weights that come in its wheel (`pip
install timm torchvision`, `pip install --no-deps pytorchcv peft facenet-pytorch`; beside a torch that the
wheel of torchvision does not match, two operators are registered, here and nowhere else). A cell works if
its check holds, and is refused if an error says why; anything else is wrong, and fails this script. `--rows`
keeps a file a network, by which another run goes on.
"""

import argparse
import contextlib
import copy
import importlib
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import selfensemble as rse
from selfensemble.attacks import pgd
from selfensemble.certainty.pixels import pixel_std
from selfensemble.data.images import ImageData
from selfensemble.ensemble.checks import logits_of
from selfensemble.evaluation.doctor.examination import CHECKS
from selfensemble.evaluation.doctor.subject import Subject
from selfensemble.evaluation.protocol import load_protocol
from selfensemble.evaluation.runner import Evaluation
from selfensemble.noise.injection import remove_noise_
from selfensemble.report.packing import write_card

_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 32, "patch_size": 8}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 8], "depths": [1, 1]}
_PYRAMID: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
_WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
            "window_size": 4}  # fmt: skip
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ResNet": _STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "RegNet": _STAGES | {"embedding_size": 8, "groups_width": 4},
    "Bit": {"embedding_size": 32, "hidden_sizes": [32, 32], "depths": [1, 1], "num_groups": 4},
    "ConvNext": _STAGES | {"num_stages": 2},
    "ConvNextV2": _STAGES | {"num_stages": 2},
    "MobileNetV1": {"depth_multiplier": 0.25, "min_depth": 8},
    "MobileNetV2": {"depth_multiplier": 0.35},
    "TextNet": {"hidden_sizes": [8] * 5, "stem_out_channels": 8},
    "PoolFormer": _PYRAMID,
    "ViT": _VIT,
    "DeiT": _VIT,
    "ViTMSN": _VIT,
    "Beit": _VIT,
    "Data2VecVision": _VIT,
    "Dinov2": {key: value for key, value in _VIT.items() if key != "intermediate_size"},
    "Swin": _WINDOWS,
    "Swinv2": _WINDOWS,
    "MobileViT": {"image_size": 32, "hidden_sizes": [8] * 3, "neck_hidden_sizes": [8] * 7,
                  "num_attention_heads": 2},
    "MobileViTV2": {"base_attn_unit_dims": [8] * 3, "n_attn_blocks": [1] * 3, "width_multiplier": 0.25},
    "Segformer": _PYRAMID | {"num_attention_heads": [1] * 4, "decoder_hidden_size": 8},
    "FocalNet": _STAGES | {"image_size": 32, "patch_size": 2, "embed_dim": 8, "focal_levels": [2, 2],
                           "focal_windows": [3, 3]},
    "Pvt": _PYRAMID | {"image_size": 32, "num_attention_heads": [1] * 4},
    "PvtV2": _PYRAMID | {"image_size": 32, "num_attention_heads": [1] * 4},
    "SwiftFormer": {"embed_dims": [8] * 4, "depths": [1] * 4},
    "Levit": {"image_size": 64, "hidden_sizes": [16] * 3, "num_attention_heads": [1] * 3, "depths": [1] * 3,
              "key_dim": [8] * 3, "attention_ratio": [2] * 3, "mlp_ratio": [2] * 3},
    "Hiera": {"image_size": [32, 32], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
              "query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4]},
}  # fmt: skip
TIMM = (
    "test_resnet", "test_byobnet", "test_nfnet", "test_efficientnet", "test_efficientnet_gn",
    "test_efficientnet_evos", "test_convnext", "test_convnext2", "test_mambaout", "test_vit", "test_vit2",
)  # fmt: skip
TORCHVISION = ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small", "resnet18")
PYTORCHCV = ("resnet20", "preresnet20", "seresnet20", "densenet40_k12")
_ATTACK = {"attack": "pgd", "title": "PGD", "norm": "linf", "eps": 0.1, "steps": 2}
FACENET = {"RNet": 24, "ONet": 48}
LEVELS = rse.NoiseConfig(0.2, 0.1)
Make = Callable[[], nn.Module]


def transformers_network(name: str) -> nn.Module:
    """With fresh weights, in eval mode."""
    theirs: Any = importlib.import_module("transformers")
    config = getattr(theirs, f"{name}Config")(num_labels=5, **TRANSFORMERS[name])
    network: nn.Module = getattr(theirs, f"{name}ForImageClassification")(config)
    return network.eval()


def _of_library(name: str) -> nn.Module:
    return rse.network_from(name, {"num_classes": 5, "pretrained": False}).eval()


class FaceOrNot(nn.Module):
    """What a part of MTCNN says of a crop, beside boxes and landmarks: face or not, as logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        theirs: Any = importlib.import_module("facenet_pytorch.models.mtcnn")
        self.part = getattr(theirs, name)()

    def forward(self, crops: Tensor) -> Tensor:
        probabilities: Tensor = self.part(crops)[-1]
        return probabilities.clamp(1e-12).log()


def _of_pytorchcv(name: str) -> nn.Module:
    theirs: Any = importlib.import_module("pytorchcv.model_provider")
    network: nn.Module = theirs.get_model(f"{name}_cifar10")
    return network.eval()


def _with_lora() -> nn.Module:
    theirs: Any = importlib.import_module("peft")
    config = theirs.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    network: nn.Module = theirs.get_peft_model(transformers_network("ViT"), config)
    return network.eval()


_registered: list[Any] = []


def _register() -> None:
    """What torchvision wants of its own wheel's operators before it can be imported at all."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _registered.append(library)


def _imports(library: str) -> bool:
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


def networks() -> dict[str, tuple[Make, int]]:
    """How each is made, and the side of its images."""
    found: dict[str, tuple[Make, int]] = {}
    for name, config in TRANSFORMERS.items():
        side = config.get("image_size", 64)
        side = side[0] if isinstance(side, list) else side
        found[f"transformers {name}"] = (partial(transformers_network, name), side)
    _register()
    for library, names in (("timm", TIMM), ("torchvision", TORCHVISION)):
        if _imports(library):
            found |= {f"{library} {name}": (partial(_of_library, f"{library}:{name}"), 64) for name in names}
    if _imports("pytorchcv"):
        found |= {f"pytorchcv {name}": (partial(_of_pytorchcv, name), 32) for name in PYTORCHCV}
    if _imports("facenet_pytorch"):
        found |= {f"facenet {name}": (partial(FaceOrNot, name), side) for name, side in FACENET.items()}
    if _imports("peft"):
        found["peft LoRA on ViT"] = (_with_lora, 32)
    return found


def _ensemble(make: Make, images: Tensor, levels: rse.NoiseConfig | None = LEVELS) -> rse.SelfEnsemble:
    return rse.SelfEnsemble(make(), levels, filter_fn="conv+linear", example_inputs=images).eval()


def _of(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> str:
    gap = float((one - other).abs().max())
    return "" if gap <= tolerance else f"differs by {gap:.2g}"


# Each gets how the network is made and 4 images, and returns what is wrong, "" if nothing is.


def looked_at(make: Make, images: Tensor) -> str:
    issues = rse.validate(make(), images, filter_fn="conv+linear")
    return "; ".join(str(issue) for issue in issues if issue.severity == "error")


def put_in(make: Make, images: Tensor) -> str:
    network, plain = make(), make()
    rse.inject_noise_(network, LEVELS, filter_fn="conv+linear", example_inputs=images)
    layers = list(rse.noise_layers(network).values())
    if list(network.state_dict()) != list(plain.state_dict()):
        return "names of weights changed"
    return "" if [layer.std for layer in layers] == [0.2] + [0.1] * (len(layers) - 1) else "levels"


def taken_out(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images)
    with torch.no_grad(), rse.noise_disabled(ensemble):
        off = ensemble.draw_logits(images)
        plain = logits_of(remove_noise_(ensemble.model)(images))
    return _of(off, plain)


def predicted(make: Make, images: Tensor) -> str:
    answer = _ensemble(make, images).predict(images, draws=4)
    if not bool((answer.spread.amax(dim=1) > 0).all()):
        return "no noise in the answer"
    return _of(answer.probabilities.sum(dim=1), torch.ones(len(images), device="cpu"))


def seeded(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images)
    whole = ensemble.predict_proba(images, draws=3, seed=1)
    alone = ensemble.predict_proba(images[:2], draws=3, seed=1)
    return _of(whole, ensemble.predict_proba(images, draws=3, seed=1), 0) or _of(whole[:2], alone, 1e-3)


def trained(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images).train()
    logits = ensemble(images)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(images), device="cpu") % logits.shape[1])
    loss.backward()
    grads = [parameter.grad for parameter in ensemble.parameters() if parameter.grad is not None]
    return "" if grads and all(bool(grad.isfinite().all()) for grad in grads) else "no finite gradients"


def checkpointed(make: Make, images: Tensor) -> str:
    ensemble, found = _ensemble(make, images), []
    for recompute in (False, True):
        inputs = images.clone().requires_grad_()
        with rse.noise_draw(3):
            out = checkpoint(ensemble.draw_logits, inputs, use_reentrant=False) if recompute else (
                ensemble.draw_logits(inputs)
            )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs)
        found.append(gradient)
    return _of(found[0], found[1], 1e-4 * float(found[0].abs().max()))


def attacked(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images)
    labels = ensemble.predict(images).label
    moved = pgd(ensemble, images, labels, norm="linf", eps=0.1, steps=2, eot=2)
    gap = float((moved - images).abs().max())
    return "" if 0 < gap <= 0.1 + 1e-6 else f"moved by {gap:.2g}"


def examined(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images, rse.NoiseConfig(0.02, 0.01))  # whose labels repeat
    images = images.repeat(4, 1, 1, 1)
    subject = Subject(
        ensemble, images, ensemble.predict(images).label, norm="linf", eps=0.05, steps=1, eot=1, images=5,
        expect_random=True, max_batch=16, seed=0,
    )  # fmt: skip
    for name in (
        "randomness",
        "nothing hidden",
        "where noise enters",
    ):  # trial attacks take long, and need networks that are right
        found = CHECKS[name](subject)
        if found.passed is False:
            return f"{name}: {found.figure}: {found.advice}"
    return ""


def decided(make: Make, images: Tensor) -> str:
    found = rse.decide(_ensemble(make, images), images, max_draws=64)
    return "" if len(found.label) == len(images) else "not one label an image"


def certified(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images)
    std = pixel_std(ensemble, images)
    if abs(std - 0.2) > 1e-4:
        return f"noise of .2 counts as {std:.3g}"
    return (
        "" if bool((rse.certify(ensemble, images[:2], n=64, n0=8).radius >= 0).all()) else "negative radius"
    )


def standardised(make: Make, images: Tensor) -> str:
    network = rse.Normalized(make(), 0.5, 0.25)
    ensemble = rse.SelfEnsemble(network, LEVELS, filter_fn="conv+linear", example_inputs=images).eval()
    std = pixel_std(ensemble, images)
    return "" if abs(std - 0.05) < 1e-4 else f"noise of .05 counts as {std:.3g}"


def saved(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images)
    with tempfile.TemporaryDirectory() as folder:
        rse.save(ensemble, folder, input_shape=tuple(images.shape[1:]))
        try:
            loaded = rse.load(folder)
        except ValueError as error:  # a class that no file may name
            if "model=" not in str(error):
                raise
            loaded = rse.load(folder, model=make())
        card = write_card(Path(folder), ensemble=loaded).read_text()
    wrong = "" if "std 0.2 on the image" in card else "the card does not know where the noise is"
    ours, theirs = (each.predict_proba(images, draws=3, seed=1) for each in (ensemble, loaded))
    return _of(ours, theirs, 1e-5) or wrong


def copied(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images)
    twin = copy.deepcopy(ensemble)
    ours, theirs = (each.predict_proba(images, draws=3, seed=1) for each in (ensemble, twin))
    return _of(ours, theirs, 1e-5)


def _fast(make: Make, images: Tensor, precision: Any, tolerance: float) -> str:
    ensemble = _ensemble(make, images)
    fast = rse.optimize(ensemble, images, precision)
    with rse.noise_disabled(ensemble), rse.noise_disabled(fast):
        slow, quick = (each.predict_proba(images) for each in (ensemble, fast))
    noisy = fast.predict(images, draws=4)
    return _of(slow, quick, tolerance) or ("" if float(noisy.spread.max()) > 0 else "no noise in the answer")


def faster(make: Make, images: Tensor) -> str:
    return _fast(make, images, "float32", 1e-4)


def faster_in_half(make: Make, images: Tensor) -> str:
    return _fast(make, images, "bf16", 0.05)


def exported(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images, rse.NoiseConfig(1e-6, 1e-6))
    with tempfile.TemporaryDirectory() as folder:
        path = rse.export_onnx(ensemble, Path(folder) / "network.onnx", images, draws=2)
        answer = rse.OnnxEnsemble(path).predict(images)
    return _of(
        torch.as_tensor(answer.probabilities, device="cpu"), ensemble.predict_proba(images, draws=1), 1e-3
    )


def in_bfloat16(make: Make, images: Tensor) -> str:
    answer = _ensemble(make, images).to(torch.bfloat16).predict(images, draws=2)
    return "" if bool(answer.probabilities.isfinite().all()) else "not finite"


def tuned(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images)
    levels = [rse.NoiseConfig(0, 0), LEVELS]
    found = rse.tune(ensemble, images, ensemble.predict(images).label, levels, steps=1, eot=1)
    return "" if len(found.levels) == 2 else "not two levels"


def judged(make: Make, images: Tensor) -> str:
    ensemble = _ensemble(make, images)
    pixels = (255 * images).round().to(torch.uint8)
    answer = ensemble.predict(pixels / 255, seed=0)
    data = ImageData("images", pixels, answer.label, tuple("abcdefghij"[: answer.probabilities.shape[1]]))
    protocol = load_protocol("paper", {"images": 4, "attacks": [_ATTACK]})
    with tempfile.TemporaryDirectory() as folder:
        found = Evaluation(ensemble, data, protocol, Path(folder)).run()
    return "" if 0 <= found.clean.accuracy <= 1 and len(found.attacks) == 1 else "not one attack"


CAPABILITIES: dict[str, Callable[[Make, Tensor], str]] = {
    "validate": looked_at, "noise in": put_in, "noise out": taken_out, "predict": predicted, "seeds": seeded,
    "train": trained, "checkpointing": checkpointed, "attack": attacked, "doctor": examined,
    "decide": decided,
    "certify": certified, "mean and std": standardised, "save, load, card": saved, "copy": copied,
    "optimize": faster, "optimize bf16": faster_in_half, "ONNX": exported, "bfloat16": in_bfloat16,
    "tune": tuned, "evaluate": judged,
}  # fmt: skip
_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError)


def _is_ours(error: BaseException) -> bool:
    """Whether the package raised it: what torch or a network raises tells nobody what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(rse.__file__).parent in Path(frames[-1].filename).parents


def cell(check: Callable[[Make, Tensor], str], make: Make, images: Tensor) -> tuple[str, str]:
    """ "yes", "refused" or "wrong", and why."""
    torch.manual_seed(0)
    try:
        wrong = check(make, images)
    except _REFUSALS as error:
        said = " ".join(str(error).split())[:300]
        return ("refused" if _is_ours(error) else "wrong"), said
    return ("wrong", wrong) if wrong else ("yes", "")


def seeded_make(make: Make) -> nn.Module:
    """With the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return make()


def row(make: Make, side: int, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Cells of a network."""
    generator = torch.Generator("cpu").manual_seed(1)
    images = torch.rand(4, 3, side, side, generator=generator, device="cpu")

    same = partial(seeded_make, make)
    return {name: cell(CAPABILITIES[name], same, images) for name in names}


def kept_row(folder: Path | None, name: str, make: Make, side: int) -> dict[str, tuple[str, str]]:
    """All cells of a network, those from its file that stand there."""
    file = None if folder is None else folder / f"{name.replace(' ', '-')}.json"
    known = json.loads(file.read_text()) if file is not None and file.exists() else {}
    missing = [what for what in CAPABILITIES if what not in known]
    cells = known | row(make, side, missing)
    if file is not None and missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(cells))
    return {what: tuple(cells[what]) for what in CAPABILITIES}


def _versions() -> str:
    found = []
    for name in ("torch", "transformers", "timm", "torchvision", "pytorchcv", "facenet-pytorch", "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def page(rows: dict[str, dict[str, tuple[str, str]]]) -> str:
    """The table, and the reasons below it."""
    reasons: dict[str, int] = {}
    lines = []
    for name, cells in rows.items():
        shown = []
        for state, why in cells.values():
            if state != "yes":
                shown.append(f"{state} ({reasons.setdefault(why, len(reasons) + 1)})")
            else:
                shown.append("yes")
        lines.append(f"| {name} | {' | '.join(shown)} |")
    states = [state for cells in rows.values() for state, _ in cells.values()]
    counts = {state: states.count(state) for state in ("yes", "refused", "wrong")}
    about = (
        "# Networks from other libraries\n\n"
        "Tiny networks with fresh weights (those of facenet with its own), noise "
        'before convolutions and linear layers (`filter_fn="conv+linear"`), by '
        f"`python benchmarks/networks_matrix.py`: {len(rows)} networks, {len(CAPABILITIES)} capabilities, "
        f"{counts['yes']} cells work, {counts['refused']} refused with the reason below, "
        f"{counts['wrong']} wrong. {_versions()}; weights of seed 7, images of seed 1, on a CPU.\n\n"
    )
    head = f"| network | {' | '.join(CAPABILITIES)} |\n|---|{'---|' * len(CAPABILITIES)}\n"
    notes = "".join(f"\n{number}. {why.replace('|', '/')}" for why, number in reasons.items())
    return about + head + "\n".join(lines) + "\n" + (f"\n{notes.strip()}\n" if notes else "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = {}
    for name, (make, side) in networks().items():
        if chosen.only is None or any(each in name for each in chosen.only):
            rows[name] = kept_row(chosen.rows, name, make, side)
            print(name, {what: found for what, found in rows[name].items() if found[0] != "yes"}, flush=True)
    text = page(rows)
    if chosen.out is not None:
        chosen.out.write_text(text)
    print(text)
    if any(state == "wrong" for cells in rows.values() for state, _ in cells.values()):
        sys.exit("some cells are wrong")


if __name__ == "__main__":
    main()
