"""Saved ensembles on the Hugging Face Hub: only what `save` writes is fetched, and nothing is unpickled."""

import re
from pathlib import Path

PREFIX = "hf-hub:"
_FILES = ("config.json", "model.safetensors", "README.md", "results.json")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, asked = name.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of the Hub: write owner/name")
    try:
        folder = snapshot_download(
            name,
            revision=asked or revision,
            token=token,
            allow_patterns=list(_FILES),
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
        raise FileNotFoundError(f"the Hub does not give {name}: {_short(error)}") from error
    return Path(folder)


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Add a random self-ensemble",
) -> str:
    """Upload the files of a saved ensemble, its card among them, to the Hugging Face Hub.

    Args:
        folder: what `save`, `pack` or `selfensemble train` wrote; nothing else in it is uploaded.
        name: "owner/name"; created if it is not there.
        private: whether only you may read it; None for the Hub's default.
        token: by default the one of `hf auth login`.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError, ValueError: nothing that `load` could read.
        PermissionError: the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from .storage import load, read_config

    name = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of the Hub: write owner/name")
    config = read_config(folder)
    if config.architecture is not None or config.transformers is not None:
        load(folder)  # what cannot be read is not given away
    api = HfApi(token=token, library_name="selfensemble")
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(_FILES), commit_message=message
        )
    except HfHubHTTPError as error:
        raise PermissionError(f"the Hub does not take {name}: {_short(error)}") from error
    return str(commit.commit_url)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
