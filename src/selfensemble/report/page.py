"""A page of results: tables and plots with their captions, as Markdown and on the terminal."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.files import atomic_write
from ..runtime.packages import needs
from ..runtime.texts import utf8
from .figures import svg

with needs("selfensemble[report]"):
    from matplotlib.figure import Figure

INDEX = "index.md"


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names them, and the others are numbers unless said otherwise."""

    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]
    numbers: bool = True

    def markdown(self) -> str:
        rule = ["---", *["---:" if self.numbers else "---"] * (len(self.head) - 1)]
        cells = [self.head, rule, *self.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        caption = f"{self.caption}\n\n" if self.caption else ""
        return f"## {self.title}\n\n{caption}" + "\n".join(lines) + "\n"

    def values(self) -> dict[str, Any]:
        """For scripts."""
        return {"title": self.title, "head": self.head, "rows": self.rows}


@dataclass(frozen=True)
class Picture:
    """A plot, and the name of its file without the suffix."""

    name: str
    caption: str
    figure: Figure

    def markdown(self) -> str:
        return f"![{self.caption}]({self.name}.svg)\n"


@dataclass(frozen=True)
class Page:
    """All of it, in order."""

    title: str
    about: str
    parts: list[Table | Picture]
    making: list[Table] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table)]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    def values(self) -> dict[str, Any]:
        """For scripts."""
        return {"title": self.title, "tables": [table.values() for table in (*self.tables, *self.making)]}

    def markdown(self) -> str:
        parts = [part.markdown() for part in (*self.parts, *self.making)]
        return "\n".join([f"# {self.title}\n\n{self.about}\n", *parts])

    def write(self, folder: Path) -> None:
        """`index.md` and the plots."""
        for picture in self.pictures:
            atomic_write(folder / f"{picture.name}.svg", svg(picture.figure))
        atomic_write(folder / INDEX, utf8(self.markdown()))
