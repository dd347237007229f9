"""Trained networks that come with the package, by name; no network is needed to load one."""

from pathlib import Path

from .download import PREFIX, fetch

_FOLDERS = (
    Path(__file__).parents[1] / "zoo",  # in an installed package
    Path(__file__).parents[3] / "zoo",  # in the repository
)
_CONFIG = "config.json"


def zoo() -> dict[str, Path]:
    """The folders of the networks by name."""
    found = {
        entry.name: entry
        for folder in reversed(_FOLDERS)
        if folder.is_dir()
        for entry in folder.iterdir()
        if (entry / _CONFIG).is_file()
    }
    return dict(sorted(found.items()))


def is_installed(folder: Path) -> bool:
    """Whether a folder belongs to the installed package, so that nothing may write into it."""
    return folder.resolve().is_relative_to(_FOLDERS[0].resolve())


def locate(model: str | Path) -> Path:
    """The folder of a saved ensemble: `model` itself where there is such a folder, else one of the zoo.

    "hf-hub:owner/name" is downloaded from the Hugging Face Hub.

    Raises:
        FileNotFoundError: neither; the message lists the zoo.
    """
    if str(model).startswith(PREFIX):
        return fetch(str(model))
    folder = Path(model)
    if folder.exists():
        return folder
    known = zoo()
    if str(model) in known:
        return known[str(model)]
    raise FileNotFoundError(
        f"no folder {model}, nor a network of that name: pass the folder that `selfensemble train` wrote, "
        f"hf-hub:owner/name, or one of {', '.join(known) or 'the zoo, which is missing here'}"
    )
