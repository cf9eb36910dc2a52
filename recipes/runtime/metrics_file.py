"""`metrics.jsonl`: one JSON object a line, appended while a stage trains; a person can `tail -f` it. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """The writing side, for one process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **values: Any) -> None:
        """Adds a line. Values are numbers; `step` is the optimizer step that they belong to."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps that a resumed run is about to repeat, and a last line cut by a kill."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; none where it does not exist."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # the last line, cut by a kill or still being written
            continue
        if isinstance(values, dict):
            lines.append(values)
    return lines
