"""The figures of one part of the GPU benchmark: each has a unit and says how it was measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prune_distill.pipeline.artifact import write_json

_KINDS = ("NoneType", "bool", "int", "float", "str")


class Figures:
    """Figures by name, written to a JSON file after each.

    Attributes:
        toy: sizes for a CPU, which show that the part works and nothing else.
        work: a folder for models and runs, which later parts may reuse.
        items: `{"name", "value", "unit", "how"}`; a figure that was not measured has the value None, and `why`.
    """

    def __init__(self, path: Path, work: Path, seconds: float, toy: bool) -> None:
        self.path, self.work, self.toy = path, work, toy
        self.until = time.monotonic() + seconds
        self.items: list[dict[str, Any]] = []
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the part has to end. No new measurement starts below zero."""
        return self.until - time.monotonic()

    def add(self, name: str, value: float | int | bool | str, unit: str, how: str) -> None:
        assert type(value).__name__ in _KINDS, (name, type(value))
        self._append({"name": name, "value": value, "unit": unit, "how": how})

    def missing(self, name: str, unit: str, why: str) -> None:
        self._append({"name": name, "value": None, "unit": unit, "why": why})

    def value(self, name: str) -> Any:
        """Return the value of a figure that was added."""
        return next(item["value"] for item in self.items if item["name"] == name)

    def _append(self, item: dict[str, Any]) -> None:
        self.items.append(item)
        self._write()
        print(table([item]), flush=True)

    def _write(self) -> None:
        write_json(self.path, self.items)


def table(items: list[dict[str, Any]]) -> str:
    """A line for each figure: name, value, unit; or why there is no value."""
    lines = []
    for item in items:
        value = item["value"]
        if value is None:
            text = f"not measured: {item['why']}"
        else:
            text = f"{value:.4g} {item['unit']}" if isinstance(value, float) else f"{value} {item['unit']}"
        lines.append(f"{item['name']:<64} {text}".rstrip())
    return "\n".join(lines)
