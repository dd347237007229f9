"""How a page came about: command, scale, training, hardware, versions, commit."""

import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..report.intervals import Share
from ..report.page import Table
from ..runtime.provenance import provenance
from .records import Facts, Record


@functools.cache
def commit() -> str | None:
    """The commit of the source, with `-dirty` where it was changed since; None outside a repository.

    That of the first call: a long run is of the code that it began with.
    """
    try:
        # Of a repository around an installed copy of the package nothing follows.
        _git("ls-files", "--error-unmatch", "py.typed")
        changed = _git("status", "--porcelain", "--", ".")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    folder = Path(__file__).parents[1]
    finished = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return finished.stdout.strip()


def measured_on(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and commit."""
    return provenance(device) | {"commit": commit()}


def making_tables(
    records: Sequence[Record], command: str, about_scale: str, held_out: bool = False
) -> list[Table]:
    """The networks and their training; and what was run, on what."""
    part = "the second half of the test set" if held_out else "the test set"
    facts = [record.facts for record in records]
    head = ["network", "recipe", "width", "epochs", "noise", "draws", "test accuracy", "trained in"]
    networks = [_network_row(each) for each in facts]
    made = [
        ["command", f"`{command}`"],
        ["scale", f"{facts[0].scale}: {about_scale}"],
        ["images", f"the first {len(records[0].columns['label'])} of {part} of {facts[0].source}"],
        ["seed", str(facts[0].seed)],
        *([["settings", settings]] if (settings := _settings(facts[0])) else []),
        *([f"{what} on", text] for what, text in _machines(facts)),
    ]
    trained = "Accuracy without attack on the whole test set, 95 % interval, as training reported it."
    return [
        Table("Networks", trained, head, networks),
        Table("How it was made", "", ["", ""], made, numbers=False),
    ]


def _network_row(facts: Facts) -> list[str]:
    recipe, training = facts.recipe, facts.training
    test = None if facts.changed else training.get("test")
    seconds = training.get("seconds")
    return [
        facts.title,
        f"`{recipe['name']}`",
        f"{recipe['model']['width']:g}",
        f"{recipe['train']['epochs']}",
        _levels(recipe) + (f", then {facts.changed}" if facts.changed else ""),
        f"{facts.draws}",
        Share(test["accuracy"], test["low"], test["high"]).text if test else "unknown",
        f"{seconds / 60:.0f} min" if seconds is not None else "unknown",
    ]


def _levels(recipe: dict[str, Any]) -> str:
    noise, other = recipe["noise"], recipe.get("randomness")
    if other is not None:
        return str(other["name"])
    where = ", behind the first convolution" if noise.get("first") == "features" else ""
    learned = ", learned" if noise.get("learn") else ""
    return f"{noise['init_std']:g}, {noise['inner_std']:g}{learned}{where}"


def _settings(facts: Facts) -> str:
    """The settings of the attacks, for people."""
    protocol = facts.settings.get("protocol")
    if protocol is None:
        return ", ".join(f"{key} {value}" for key, value in facts.settings.items())
    shown = []
    for attack in protocol["attacks"]:
        values = [
            f"{key} {value}"
            for key, value in attack.items()
            if key not in ("attack", "title", "eps", "c") and value
        ]
        shown.append(f"{attack['title']} ({', '.join(values)})")
    if protocol["precision"] != "float32":
        shown.append(f"gradients of the attacks in {protocol['precision']} where the device has it")
    return "; ".join(shown)


def _machines(facts: Sequence[Facts]) -> list[tuple[str, str]]:
    """Where the networks were trained and measured; a line for each that differs."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in facts:
        places = {"trained": each.training.get("provenance"), "measured": each.provenance}
        for what, made in places.items():
            if made:
                found.setdefault((what, _machine(made)), []).append(each.network)
    lines = []
    for what in ("trained", "measured"):
        own = {text: names for (kind, text), names in found.items() if kind == what}
        for text, names in own.items():
            lines.append((what, text if len(own) == 1 else f"{text} ({', '.join(names)})"))
    return lines


def _machine(made: dict[str, Any]) -> str:
    hardware, versions = made["hardware"], made["versions"]
    text = hardware["accelerator"] or f"{hardware['cores']} cores of an {hardware['cpu']}"
    text += "; " + ", ".join(f"{name} {version}" for name, version in versions.items())
    return text + (f"; commit {made['commit']}" if made.get("commit") else "")
