"""Draw docs/assets/architecture.svg from the imports of the code: `python docs/architecture.py [--check]`.

A row and a column for each package, in the order of the contract in pyproject.toml; a number says in how
many places files of the row's package import from the column's. `--check` writes nothing and ends with
status 1 where the picture is not that of the code.
"""

import sys
import tomllib
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "assets" / "architecture.svg"
_CELL, _LEFT, _TOP, _RIGHT = 30, 110, 96, 620
_STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #222 } .count { text-anchor: middle; fill: #fff }
.grid { fill: none; stroke: #ccc } .down { fill: #3f51b5 } .up { fill: #c62828 } .self { fill: #e0e0e0 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .grid { stroke: #555 } .self { fill: #444 } }"""


def packages() -> list[str]:
    """Names of the packages, the lowest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return [name.strip() for layer in reversed(layers) for name in layer.split("|")]


def imports() -> Counter[tuple[str, str]]:
    """In how many places one package imports from another, imports inside functions included."""
    graph = grimp.build_graph("selfensemble")
    found: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            pair = module.split(".")[1:2], other.split(".")[1:2]
            if all(pair):
                details = graph.get_import_details(importer=module, imported=other)
                found[pair[0][0], pair[1][0]] += len(details)
    return found


def about(package: str) -> str:
    """The first line of a package's docstring."""
    text = (ROOT / "src" / "selfensemble" / package / "__init__.py").read_text(encoding="utf-8")
    return text.partition('"""')[2].partition('"""')[0].partition("\n")[0]


def picture() -> str:
    """The matrix as SVG."""
    names, found = packages(), imports()
    side = _CELL * len(names)
    width, height = _LEFT + side + _RIGHT, _TOP + side + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Which package imports from which">',
        f"<style>{_STYLE}</style>",
    ]
    for column, name in enumerate(names):
        x = _LEFT + _CELL * column + _CELL * 0.65
        parts.append(f'<text transform="translate({x:g},{_TOP - 8}) rotate(-55)">{name}</text>')
    for row, name in enumerate(names):
        y = _TOP + _CELL * row
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 20}" text-anchor="end">{name}</text>')
        parts.append(f'<text x="{_LEFT + side + 12}" y="{y + 20}">{escape(about(name))}</text>')
        for column, other in enumerate(names):
            parts += _cell(row, column, found[name, other])
    return "\n".join([*parts, "</svg>\n"])


def _cell(row: int, column: int, count: int) -> list[str]:
    x, y = _LEFT + _CELL * column, _TOP + _CELL * row
    box = f'x="{x}" y="{y}" width="{_CELL}" height="{_CELL}"'
    if row == column:
        return [f'<rect {box} class="self"/>']
    if not count:
        return [f'<rect {box} class="grid"/>']
    kind = "down" if column < row else "up"
    centre = x + _CELL // 2
    return [f'<rect {box} class="{kind}"/>', f'<text x="{centre}" y="{y + 20}" class="count">{count}</text>']


def main() -> None:
    """Write the picture, or compare it."""
    drawn = picture()
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(drawn, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != drawn:
        sys.exit("docs/assets/architecture.svg is not that of the code: run python docs/architecture.py")


if __name__ == "__main__":
    main()
