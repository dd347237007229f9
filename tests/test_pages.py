"""Every page is reached from the navigation, every link leads to a file, every notebook was executed."""

import base64
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


# Lists and tables that are read by those who know the terms.
REFERENCE = {"api.md", "glossary.md", "licences.md", "networks-table.md"}
GUIDES = [page for page in sorted(DOCS.glob("*.md")) if page.name not in REFERENCE]
TERMS = re.findall(r"^## (.+)$", (DOCS / "glossary.md").read_text(), re.MULTILINE)


def without_code(text: str) -> str:
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]+`|\]\([^)]*\)|^#.*$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDES], ids=lambda path: path.name)
def test_guides_link_the_terms_that_they_use(page: Path) -> None:
    text = page.read_text()
    used = [
        term for term in TERMS if re.search(rf"\b{re.escape(term)}s?\b", without_code(text), re.IGNORECASE)
    ]
    linked = re.findall(r"\]\((?:docs/)?glossary\.md#([\w-]+)\)", text)
    assert not used or linked
    anchors = {re.sub(r"[^\w -]", "", term).lower().replace(" ", "-") for term in TERMS}
    assert set(linked) <= anchors


@pytest.mark.parametrize("term", ["adversarial-example", "doctor", "draw", "noise-level", "judge"])
def test_the_readme_links_its_terms(term: str) -> None:
    assert f"](docs/glossary.md#{term})" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_of_notebooks_say_what_they_show(notebook: Path) -> None:
    drawn = [
        (cell, output["data"]["image/png"])
        for cell in cells(notebook, "code")
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert all(len(cell["metadata"]["alt"].split()) > 8 for cell, _ in drawn)
    # The overview has the last picture of each.
    shown = DOCS / "assets" / "tutorials" / f"{notebook.stem}.png"
    assert shown.read_bytes() == base64.b64decode(drawn[-1][1])
    alt = drawn[-1][0]["metadata"]["alt"]
    assert f"![{alt}](../assets/tutorials/{shown.name})" in (DOCS / "tutorials" / "index.md").read_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_were_executed_in_order_and_drew_something(notebook: Path) -> None:
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert notebook.stat().st_size < 100_000
