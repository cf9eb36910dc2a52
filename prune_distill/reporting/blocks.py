"""Building blocks of the report's pages, rendered by `templates/report.html.j2`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        sort: sort key, instead of the text.
        detail: small text below.
        tone: tone of the detail: good, bad, or neither.
    """

    text: str
    sort: float | None = None
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table. `text`: left-aligned and sorted as text, not as numbers; `unit`: shown below the label."""

    label: str
    unit: str = ""
    text: bool = False


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row is its header."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Figures:
    """Plots next to each other if there is room."""

    figures: Sequence[Figure]
    kind: str = "figures"


@dataclass(frozen=True)
class Note:
    """A paragraph. `tone`: plain, missing, warning or failure."""

    text: str
    tone: str = "plain"
    kind: str = "note"


@dataclass(frozen=True)
class Code:
    """Preformatted text, folded if it is long."""

    summary: str
    text: str
    folded: bool = True
    kind: str = "code"


@dataclass(frozen=True)
class Tile:
    """A main figure at the top of the page."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Tiles:
    tiles: Sequence[Tile]
    kind: str = "tiles"


@dataclass(frozen=True)
class Sample:
    """A sample of text. `texts`: the continuation of each model, by label."""

    prompt: str
    reference: str
    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    samples: Sequence[Sample]
    kind: str = "samples"


Block = Table | Figures | Note | Code | Tiles | Samples


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page. `lead`: one or two sentences on the results; `meta`: one line on their origin."""

    title: str
    heading: str
    meta: str
    state: str
    lead: str
    sections: Sequence[Section]
    asked: str = ""
    blocks: Sequence[Block] = field(default_factory=tuple)
