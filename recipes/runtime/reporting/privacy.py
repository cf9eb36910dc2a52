"""What no report may show: credentials, and where on whose disk things are."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REMOVED = "[removed]"
_CODE = Path(__file__).resolve().parents[3]
_NAMES = r"(?:token|secret|passw(?:or)?d|api_?key|access_?key|private_?key|credentials?)"
# Names of environment variables whose values are searched for; short values would be found in any text.
_SECRET_VARIABLE = re.compile(rf"(?i){_NAMES}|_KEY$")
_SHORTEST_VALUE = 8
_PATTERNS = (
    # A URL's user, password and query: signed links carry their key there.
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@\"'<>]+@"), r"\1"),
    (re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s?\"'<>]+)\?[^\s\"'<>)\]]+"), rf"\1?{REMOVED}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{12,}"), rf"\1 {REMOVED}"),
    # NAME=value, name: value. `tokens` and `tokenizer` are no secrets.
    (
        re.compile(rf"(?i)((?<![a-z]){_NAMES}(?![a-z_])[\"']?\s*[=:]\s*[\"']?)(?!null\b|none\b)[^\s\"',&;\]}}]{{6,}}"),
        rf"\1{REMOVED}",
    ),
    # Tokens that are known by how they begin: Hugging Face, OpenAI, GitHub, GitLab, AWS, NVIDIA, Slack, JWT.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
            r"|glpat-[\w-]{16,}|AKIA[0-9A-Z]{12,}|nvapi-[\w-]{16,}|xox[abp]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)"
        ),
        REMOVED,
    ),
    # Home folders, also those of a cluster's shared disk.
    (re.compile(r"(?:/[\w.-]+)*/(?:home|Users)/[^/\s\"':,;<>()\[\]]+"), "~"),
    (re.compile(r"(?<![\w./~-])/root(?![\w-])"), "~"),
)


class Privacy:
    """Takes out of texts what is nobody's business.

    Args:
        run_dirs: folders of runs; paths below them are shown from `RUN_DIR` on.
        environment: where secrets are looked for by the names of variables.
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
        secrets = {
            value
            for name, value in environment.items()
            if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE and not value.startswith("/")
        }
        self._secrets = sorted(secrets, key=len, reverse=True)

    def text(self, text: str) -> str:
        """A text without secrets and without home folders."""
        for secret in self._secrets:
            text = text.replace(secret, REMOVED)
        for pattern, shown in (*self._replaced, *_PATTERNS):
            text = pattern.sub(shown, text)
        return text

    def value(self, value: Any) -> Any:
        """The same of every text in plain data."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value
