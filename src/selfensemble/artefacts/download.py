"""Saved ensembles on the Hugging Face Hub: only what `save` writes is fetched, and nothing is unpickled."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

from ..runtime.packages import needs

PREFIX = "hf-hub:"
FILES = ("config.json", "model.safetensors", "README.md", "results.json")
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(name: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a saved ensemble, or find it among those downloaded before.

    Args:
        name: "owner/name", or "owner/name@revision".
        revision: branch, tag or commit.
        token: for private ones; by default the one of `hf auth login`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there is no such network, or the Hub cannot be reached; the message says which.
        ValueError: not a name of the Hub.
    """
    with needs("selfensemble[hub]"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, asked = name.removeprefix(PREFIX).partition("@")
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of the Hub: write owner/name")
    try:
        folder = snapshot_download(
            name,
            revision=asked or revision,
            token=token,
            allow_patterns=list(FILES),
            library_name="selfensemble",
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"cannot reach the Hub, and {name} was not downloaded before: connect, or pass a folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub has no network {name} that you may read: check the name, or log in with `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"the Hub does not give {name}: {said(error)}") from error
    return Path(folder)


def said(error: "HfHubHTTPError") -> str:
    """What the Hub answered, by its number."""
    return f"HTTP status {error.response.status_code}; check the name, the revision and `hf auth login`"
