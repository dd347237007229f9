"""What the package index shows: the README with addresses that work there, and the links of the project.

The address of the repository is in the environment variable PROJECT_URL, which the release workflow sets;
no file of the repository holds it. Without one, links within the repository become plain text, and pictures
are left out: on the index they would lead nowhere.
"""

import os
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_OUTSIDE = re.compile(r"https?://|mailto:|#")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def absolute(text: str, address: str, version: str) -> str:
    """Markdown in which no link or picture is relative.

    Args:
        text: a page at the root of the repository.
        address: of the repository; empty where it is not known.
        version: whose tag the addresses name.
    """

    def link(found: "re.Match[str]") -> str:
        picture, shown, target = found.groups()
        if _OUTSIDE.match(target):
            return found[0]
        if not address:
            return "" if picture else shown
        return f"{picture}[{shown}]({address}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(link, text))


def links(address: str, version: str) -> dict[str, str]:
    """What the index lists beside the page."""
    if not address:
        return {}
    files = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md", "Security": "SECURITY.md"}
    tagged = {name: f"{address}/blob/v{version}/{file}" for name, file in files.items()}
    return {"Repository": address, "Issues": f"{address}/issues"} | tagged


class Shown(MetadataHookInterface):  # type: ignore[misc]
    """Sets `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """See the module."""
        address, version = os.environ.get("PROJECT_URL", "").rstrip("/"), metadata["version"]
        with open(os.path.join(self.root, "README.md"), encoding="utf-8") as file:  # noqa: PTH118, PTH123
            text = absolute(file.read(), address, version)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        if found := links(address, version):
            metadata["urls"] = found
