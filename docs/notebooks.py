"""A hook of mkdocs: every notebook becomes a page, with what it printed and drew when it was executed."""

from pathlib import PurePosixPath
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def on_files(files: Files, config: Any) -> Files:
    """Add a page and its pictures for each notebook; the notebook itself is copied, to be downloaded."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        place = PurePosixPath(notebook.src_uri)
        text, pictures = _page(notebook.abs_src_path, place.stem)
        text = text.replace(".ipynb)", ".md)")  # links between notebooks are links between pages here
        text += f"\n\n[The notebook]({place.name}), to run it yourself.\n"
        files.append(File.generated(config, str(place.with_suffix(".md")), content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, str(place.with_name(name)), content=content))
    return files


def _page(path: str | None, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by file name."""
    notebook = nbformat.read(path, as_version=4)
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(notebook, {"unique_key": name, "output_files_dir": "."})
    pictures = {key.removeprefix("./"): content for key, content in resources["outputs"].items()}
    return text.replace("![png](./", "![What the code above draws](").replace("![png](", "![What the code above draws]("), pictures
