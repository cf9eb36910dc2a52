"""What a page of the report is made of; `templates/report.html.j2` says how each looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        sort: what the column is sorted by instead of the text.
        detail: said below, smaller.
        tone: of the detail: good, bad, or neither.
    """

    text: str
    sort: float | None = None
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """`text`: left-aligned and sorted as words; otherwise as numbers. `unit`: said below the label."""

    label: str
    unit: str = ""
    text: bool = False


@dataclass(frozen=True)
class Table:
    """The first cell of a row is what it is about."""

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
    """Plots beside each other where there is room."""

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
    """Text that stands as it is, folded where it is long."""

    summary: str
    text: str
    folded: bool = True
    kind: str = "code"


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Tiles:
    tiles: Sequence[Tile]
    kind: str = "tiles"


@dataclass(frozen=True)
class Sample:
    """`texts`: what each model wrote, by its label."""

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
    """A page: `lead` says in a sentence or two what came out; `meta` in a line where it is from."""

    title: str
    heading: str
    meta: str
    state: str
    lead: str
    sections: Sequence[Section]
    asked: str = ""
    blocks: Sequence[Block] = field(default_factory=tuple)
