"""Hooks of mkdocs: notebooks become pages, and so do the pages that lie outside of `docs/`."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "conduct.md": "CODE_OF_CONDUCT.md",
    "governance.md": "GOVERNANCE.md",
    "security.md": "SECURITY.md",
    "zoo.md": "zoo/README.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and the pictures of notebooks, which are copied as well, to be downloaded."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        place = PurePosixPath(notebook.src_uri)
        text, pictures = _page(notebook.abs_src_path, place.stem)
        text += f"\n\nTo run it yourself: `jupyter lab docs/tutorials/{place.name}` in a clone.\n"
        files.append(File.generated(config, str(place.with_suffix(".md")), content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, str(place.with_name(name)), content=content))
    for page, source in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, name in OUTSIDE.items():
            text = text.replace(f"]({name})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks, as in a clone, are links to their pages."""
    return markdown.replace(".ipynb)", ".md)").replace("](../zoo/README.md)", "](zoo.md)")


def _page(path: str | None, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by file name."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"unique_key": name, "output_files_dir": "."}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    pictures = {key.removeprefix("./"): content for key, content in resources["outputs"].items()}
    for alt in alts(notebook):
        text = text.replace("![png](", f"![{alt}](", 1)
    return text, pictures


def alts(notebook: Any) -> Iterator[str]:
    """What each picture of a notebook shows, in order: `alt` in the metadata of the cell that draws it."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                yield cell["metadata"]["alt"]
