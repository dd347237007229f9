"""Saved ensembles into the Hugging Face Hub: nothing but what `save` writes."""

from pathlib import Path

from ..runtime.packages import needs
from .download import FILES, NAME, PREFIX, said
from .storage import load, read_config, read_weights


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
    with needs("selfensemble[hub]"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

    name = name.removeprefix(PREFIX)
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of the Hub: write owner/name")
    config = read_config(folder)
    # What cannot be read is not given away.
    if config.architecture is not None or config.transformers is not None:
        load(folder)
    else:
        read_weights(folder, config)
    api = HfApi(token=token, library_name="selfensemble")
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message=message
        )
    except HfHubHTTPError as error:
        raise PermissionError(f"the Hub does not take {name}: {said(error)}") from error
    return str(commit.commit_url)
