"""The processes that serve models, by their sessions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def members_of_session(session: int) -> set[int]:
    """The living processes of a session."""
    return {pid for pid, _, own in _processes() if own == session}


def sessions_started_by(parent: int) -> set[int]:
    """The sessions whose leaders are children of a process."""
    return {pid for pid, above, session in _processes() if above == parent and session == pid}


def _processes() -> Iterator[tuple[int, int, int]]:
    """The pid, parent and session of each living process (proc(5))."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            yield int(folder.name), int(parent), int(session)
