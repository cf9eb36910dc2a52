"""What a terminal shows while a stage runs: one line that is rewritten in place; elsewhere, lines now and then."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any, TextIO

from prune_distill.pipeline.stage_log import parse_metrics

# A new line in a file or a pipe at most this often.
SECONDS_BETWEEN_LINES = 15.0
# More than two lines of metrics.jsonl are long.
TAIL_BYTES = 8192


class StatusLine:
    """A line of a stream that shows the current state."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._last = time.monotonic()
        self._open = False

    def event(self, text: str) -> None:
        """Writes a line that stays."""
        self._write(("\r\x1b[2K" if self._open else "") + text + "\n")
        self._open = False
        self._last = time.monotonic()

    def status(self, text: str) -> None:
        """Shows a state: on a terminal it replaces the last one; elsewhere it is omitted if the last one is recent."""
        if self._terminal:
            self._write("\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1])
            self._open = True
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self.event(text)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def training_status(metrics: Path, since: float) -> str:
    """Step, losses, speed and time left from a stage's `metrics.jsonl`; empty where it has none.

    Args:
        metrics: the file, which may not exist.
        since: seconds since the epoch; an older file is what an earlier attempt left.
    """
    latest = newest(metrics, since)
    parts = []
    if "step" in latest:
        parts.append(f"step {latest['step']}/{latest.get('max_steps', '?')}")
    parts += [
        f"{label} {latest[key]:.3f}" for key, label in (("loss", "loss"), ("val_loss", "val loss")) if key in latest
    ]
    if "tokens_per_second" in latest:
        parts.append(f"{latest['tokens_per_second']:,.0f} tokens/s")
    if "seconds_left" in latest:
        parts.append(f"{duration(latest['seconds_left'])} left")
    return ", ".join(parts)


def newest(metrics: Path, since: float) -> dict[str, Any]:
    """The newest value of each of a metrics file's names; see `training_status` for the arguments."""
    values: dict[str, Any] = {}
    for line in _tail(metrics, since):
        values.update({name: value for name, value in line.items() if value is not None and math.isfinite(value)})
    return values


def duration(seconds: float) -> str:
    """Seconds for people: `9 s`, `12:05`, `3:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def _tail(path: Path, since: float) -> list[dict[str, Any]]:
    """The last complete lines of a file of JSON objects."""
    try:
        if path.stat().st_mtime < since:
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in map(parse_metrics, lines) if line is not None]
