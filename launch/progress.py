"""What a terminal shows of a run: while a stage runs, one line that is rewritten in place (elsewhere, lines now and
then); at the end, a table of the stages and the figures of the report."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from prune_distill.pipeline.artifact import Located, read_manifest
from prune_distill.pipeline.names import REPORT, REPORT_JSON, REPORT_PAGE
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


def newest(metrics: Path, since: float) -> dict[str, float]:
    """The newest value of each of a metrics file's names; see `training_status` for the arguments."""
    values: dict[str, float] = {}
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


def _tail(path: Path, since: float) -> list[dict[str, float | None]]:
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


def summary(stages: Sequence[Located]) -> str:
    """A table of stages with the time each took, then the report's headline figures where there is a report."""
    width = max(len(stage.stage.name) for stage in stages)
    seconds = [(read_manifest(stage.folder) or {}).get("seconds", 0) for stage in stages]
    lines = [f"  {stage.stage.name:<{width}}  {duration(took):>8}" for stage, took in zip(stages, seconds, strict=True)]
    report = next((stage for stage in stages if stage.stage.name == REPORT), None)
    if report is not None:
        lines += _headlines(report.folder)
    return "\n".join(lines)


def _headlines(folder: Path) -> list[str]:
    try:
        report = json.loads((folder / REPORT_JSON).read_text())
    except (OSError, json.JSONDecodeError):
        return []
    lines = []
    for name, model in report.get("models", {}).items():
        figures = [f"{model['params'] / 1e6:>9,.2f} M parameters"] if "params" in model else []
        figures += [f"val loss {model['val_loss']:.4f}"] if model.get("val_loss") is not None else []
        lines.append(f"  {name:<8}  {'  '.join(figures)}")
    page = next(path for path in (folder / REPORT_PAGE, folder / REPORT_JSON) if path.exists())
    return ["", *lines, "", f"report: {page}"]
