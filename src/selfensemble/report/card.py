"""The card of a trained network: what it is, what was measured on it, what it is not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artefacts.config import ArtefactConfig
from ..evaluation.certified import Certified, Settings
from ..evaluation.results import Entry, Impossible, Results
from ..runtime.packages import needs
from ..training.recipe import public_recipe
from .facts import facts, usage
from .markdown import code, plain, word

# Their protocols are named EXPERIMENT-SCALE.
EXPERIMENTS = (
    "headline", "draws", "noise", "levels", "targeted", "theory", "honest", "board", "certainty",
    "certificates", "certified-noise", "resnext", "stl10",
)  # fmt: skip
SCALES = ("quick", "quarter", "half", "wide", "full")  # protocols of other names are files, as `honest-1`
# Of hubs, by the dimensions of an input; what else there is has no name there.
_TASKS = {1: "audio-classification", 2: "audio-classification", 3: "image-classification"}
_NOISE = """\
The noise must stay on at test time and be fresh: the defense is weaker against an attacker who can send many
queries or predict the noise. """
_SMALL = "Trained and measured on small images of few classes; nothing is known about\nothers"
_OTHER = "Nothing is known about data other than those named here"
_LIMITS = """\
Robust accuracies are what the named attacks left over: upper bounds, not guarantees. {certificate}{noise}\
{data}, about natural shifts of the data, or about changes that the attacks did not try (patches, rotations,
colours)."""
_CERTIFIED = """\
A certificate holds for the infinite ensemble, in the named precision, and is wrong with the stated risk. """
_UNCERTIFIED = "The network carries no certificate. "


def model_card(
    name: str,
    config: ArtefactConfig,
    results: Sequence[Results] = (),
    licence: str | None = None,
    certificates: Sequence[Certified] = (),
    pixels: float | None = None,
) -> str:
    """Markdown with the front matter of model hubs, filled from a saved ensemble and its evaluations.

    Args:
        name: of the network.
        config: its `config.json`.
        results: evaluations of it, see `read_results`.
        licence: of the weights, an identifier that model hubs know; None says nothing of it.
        certificates: certifications of it, see `read_certified`.
        pixels: what its first noise is worth on the image, see `noise_on_pixels`.
    """
    recipe, quoted = config.recipe or {}, json.dumps(name, ensure_ascii=False)
    front: dict[str, Any] = {} if licence is None else {"license": licence}
    front |= {
        "library_name": "selfensemble",
        "pipeline_tag": _TASKS.get(len(config.input_shape or (0, 0, 0)), "image-classification"),
        "tags": ["random-self-ensemble", "adversarial-robustness"],
    }
    parts = [
        f"---\n{_front_matter(front)}\n---\n\n# {plain(name)}",
        plain(str(recipe.get("description", ""))),
        usage(quoted, config),
        facts(config, pixels),
        "## Measured\n\n" + _measured(config, results),
        "\n\n".join(map(_certificate, certificates)),
        "## Limits\n\n"
        + _LIMITS.format(
            certificate=_CERTIFIED if certificates else _UNCERTIFIED,
            noise=_NOISE if config.is_random else "",
            data=_SMALL if config.architecture is not None else _OTHER,
        ),
    ]
    if recipe:
        with needs("selfensemble[cli]"):
            import yaml

        shown = yaml.safe_dump(public_recipe(recipe), sort_keys=False, allow_unicode=True)
        parts.append(f"## Recipe\n\n```yaml\n{shown}```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(values: dict[str, Any]) -> str:
    """As YAML, of which JSON is a part."""
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())


def _measured(config: ArtefactConfig, results: Sequence[Results]) -> str:
    lines = []
    for split, record in config.metrics.items():
        if isinstance(record, dict) and "accuracy" in record:
            known = {"accuracy", "low", "high"} <= record.keys()
            share = _share(record) if known else f"{100 * record['accuracy']:.1f} %"
            images = f", {record['images']} images" if "images" in record else ""
            lines.append(f"{split.capitalize()} accuracy {share}{images}.")
    for result in results:
        lines += [
            f"\n{code(_command(config, result))}, seed {result.protocol['seed']}, "
            f"{_machine(result.provenance)}; {result.data.which}{_of_data(config, result)}"
            f"{_answered(config, result)}, "
            "95 % Clopper-Pearson intervals:\n",
            "| attack | budget | accuracy | RMS L2 |\n|---|---|---|---|",
            *(_row(entry) for entry in (result.clean, *result.attacks, *result.worst_case)),
            *(_row_without(each) for each in result.impossible),
        ]
    if not results:
        lines.append("\nNot evaluated under attack.")
    return "\n".join(lines)


def _certificate(found: Certified) -> str:
    asked = found.settings
    command = f"selfensemble certify {word(found.name)} --method {asked['method']} --max-draws {asked['n']}"
    command += "" if found.precision == "float32" else f" --precision {found.precision}"
    command += f" --n {found.data.images}"
    command += "".join(f" --radius {each.radius!r}" for each in found.wanted)
    usual = Settings()
    for key in ("alpha", "n0", "rivals", "seed", "shard"):
        if (value := asked.get(key, getattr(usual, key))) != getattr(usual, key):
            command += f" --{key} {value}"
    command += " --grid" if asked.get("grid") else ""
    stopped, most = (
        ("; images stopped when these radii were decided", "at most ") if found.wanted else ("", "")
    )
    rows = [f"| {_radius(point.radius)} | {_share(point.model_dump())} |" for point in found.known]
    return "\n".join(
        [
            f"{code(command)}, {_machine(found.provenance)}; share of the "
            f"{found.which} that are classified correctly with a certificate of at least that "
            f"L2 radius, each wrong with probability {asked['alpha']:g} at most{stopped}; nothing is "
            f"certified of {most}{100 * found.abstained:.1f} %:\n",
            "| radius | certified accuracy |\n|---|---|",
            *rows,
        ]
    )


def _radius(radius: float) -> str:
    """With two decimals, or as many as it has."""
    return f"{radius:.2f}" if round(radius, 2) == radius else f"{radius!r}"


def _command(config: ArtefactConfig, result: Results) -> str:
    """What made an evaluation: `evaluate`, or an experiment, whose protocols are named EXPERIMENT-SCALE."""
    protocol = result.protocol
    experiment, _, scale = protocol["name"].rpartition("-")
    if experiment in EXPERIMENTS and scale in SCALES:
        return f"selfensemble reproduce {experiment} --scale {scale} --only {result.name}"
    precision = protocol.get("precision", "float32")
    options = "" if precision == "float32" else f" --precision {precision}"
    options += f" --draws {result.model.draws}" if result.model.draws != config.draws else ""
    options += f" --seed {protocol['seed']}" if protocol.get("seed") else ""
    name = protocol["name"]
    return (
        f"selfensemble evaluate {word(result.name)} --protocol {word(name)} --n {result.data.images}{options}"
    )


def _of_data(config: ArtefactConfig, result: Results) -> str:
    """What the images are of, where the recipe does not say it."""
    own = (config.recipe or {}).get("data", {}).get("source")
    source = Path(result.data.source).name
    return "" if own is not None and Path(own).name == source else f" of {source}"


def _answered(config: ArtefactConfig, result: Results) -> str:
    """How the network answered, where it was by other draws or an optimised copy in less than float32."""
    model = result.model
    draws = "" if model.draws == config.draws else f", {model.draws} draws a prediction"
    return draws + (
        "" if model.precision == "float32" else f", answered by its optimised copy in {model.precision}"
    )


def _row(entry: Entry) -> str:
    budget = f"{entry.norm} {entry.eps:.4g}" if entry.eps is not None else ""
    if entry.c is not None:
        budget = f"c = {entry.c:g}"
    return f"| {plain(entry.title)} | {budget} | {_share(entry.model_dump())} | {entry.rms_l2:.3f} |"


def _row_without(each: Impossible) -> str:
    budget = "" if each.eps is None else f"{each.norm} {each.eps:.4g}"
    return f"| {plain(each.title)} | {budget} | not possible: gradients are masked |  |"


def _share(record: dict[str, Any]) -> str:
    accuracy, low, high = (100 * record[key] for key in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} % ({low:.1f} to {high:.1f})"


def _machine(about: dict[str, Any]) -> str:
    hardware, versions = about["hardware"], about["versions"]
    device = hardware["accelerator"] or f"{hardware['cpu']} ({hardware['cores']} cores)"
    return f"{device}, torch {versions['torch']}, selfensemble {versions['selfensemble']}"
