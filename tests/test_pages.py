"""Every page is reached from the navigation, every link leads to a file, every notebook was executed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Pages that docs/site.py makes of files elsewhere in the repository.
MADE = {"changelog.md", "conduct.md", "contributing.md", "governance.md", "security.md", "zoo.md"}


class _Settings(yaml.SafeLoader):
    """The settings of mkdocs, whose tags (!ENV) are left alone."""


_Settings.add_multi_constructor("!", lambda loader, suffix, node: None)


def navigation(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
        return
    for each in part if isinstance(part, list) else part.values():
        yield from navigation(each)


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


def texts() -> Iterator[tuple[Path, str]]:
    """Pages of the repository, and the text of the notebooks."""
    for page in (*ROOT.glob("*.md"), ROOT / "zoo" / "README.md", *DOCS.rglob("*.md")):
        yield page, re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for notebook in NOTEBOOKS:
        yield notebook, "\n".join("".join(cell["source"]) for cell in cells(notebook, "markdown"))


def test_every_page_is_in_the_navigation_once() -> None:
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), _Settings)
    shown = list(navigation(settings["nav"]))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | MADE
    there |= {str(notebook.relative_to(DOCS).with_suffix(".md")) for notebook in NOTEBOOKS}
    assert sorted(shown) == sorted(there)


def test_every_link_leads_to_a_file() -> None:
    broken = []
    for page, text in texts():
        for target in LINK.findall(text):
            path = target.partition("#")[0]
            made = page.parent == DOCS and path in MADE
            if (
                path
                and not re.match(r"https?://|mailto:", path)
                and not made
                and not (page.parent / path).exists()
            ):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_were_executed_in_order_and_drew_something(notebook: Path) -> None:
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert notebook.stat().st_size < 100_000
