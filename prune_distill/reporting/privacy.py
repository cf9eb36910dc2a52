"""Remove private information from reports: credentials, and paths of home folders."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_distill.credentials import REMOVED, redact

_CODE = Path(__file__).resolve().parents[2]
_PATTERNS = (
    # A URL's user, password and query, which contains the key of signed links.
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@\"'<>]+@"), r"\1"),
    (re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s?\"'<>]+)\?[^\s\"'<>)\]]+"), rf"\1?{REMOVED}"),
    # Home folders, including those on a shared disk.
    (re.compile(r"(?:/[\w.-]+)*/(?:home|Users)/[^/\s\"':,;<>()\[\]]+"), "~"),
    (re.compile(r"(?<![\w./~-])/root(?![\w-])"), "~"),
)


class Privacy:
    """Removes private information from texts.

    Args:
        run_dirs: folders of runs; paths inside them are shown relative to `RUN_DIR`.
        environment: variables whose names indicate a secret; their values are removed.
    """

    def __init__(self, run_dirs: tuple[Path, ...] = (), environment: Mapping[str, str] = os.environ) -> None:
        folders = {str(form) for path in run_dirs for form in (path.absolute(), path.resolve())}
        places = [(folder, "RUN_DIR") for folder in sorted(folders, key=len, reverse=True) if len(folder) > 1]
        site = Path(sys.prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        places += [(str(site), "site-packages"), (f"{sys.prefix}/bin/", ""), (f"{_CODE}/", "")]
        places += [(str(Path.home()), "~")] if len(str(Path.home())) > 1 else []
        self._replaced = [
            (re.compile(rf"(?<![\w.-]){re.escape(place)}" + ("" if place.endswith("/") else r"(?![\w-])")), shown)
            for place, shown in places
        ]
        self._environment = environment

    def text(self, text: str) -> str:
        """Remove secrets and home folders from a text."""
        text = redact(text, self._environment)
        for pattern, shown in (*self._replaced, *_PATTERNS):
            text = pattern.sub(shown, text)
        return text

    def value(self, value: Any) -> Any:
        """Apply `text` to every string in plain data."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value
