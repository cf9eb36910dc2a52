"""Store measurements in one small file per model and part, so that a killed stage resumes with the missing ones."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prune_distill.pipeline.artifact import add_crc32, is_intact, write_json


class Store:
    """The measurements of a stage's folder, by model and part.

    Args:
        folder: folder of the files. The stage's identity determines its content, except for what is in `key`.
    """

    def __init__(self, folder: Path, key: dict[str, str]) -> None:
        self.folder = folder
        self.key = key

    def get(self, model: str, part: str) -> Any | None:
        """Return a measurement; None if it is missing, damaged, or made with another `key`."""
        try:
            content = json.loads(self._path(model, part).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or not is_intact(content):
            return None
        return content["result"] if content["key"] == self.key else None

    def put(self, model: str, part: str, result: Any) -> None:
        write_json(self._path(model, part), add_crc32({"key": self.key, "result": result}))

    @contextmanager
    def locked(self, model: str) -> Iterator[None]:
        """Prevent other processes from measuring the same model during the block."""
        path = self.folder / quote(model, safe="/=") / ".lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, model: str, part: str) -> Path:
        return self.folder / quote(model, safe="/=") / f"{quote(part, safe='')}.json"
