"""Terminal output of a run: a status line that is rewritten in place (in a file or a pipe: a line every few seconds),
and at the end a table of the stages and the figures of the report."""

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

# Minimum interval between status lines in a file or a pipe.
SECONDS_BETWEEN_LINES = 15.0
# Longer than two lines of metrics.jsonl.
TAIL_BYTES = 8192


class StatusLine:
    """Status line of a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._last = time.monotonic()
        self._open = False

    def event(self, text: str) -> None:
        """Write a permanent line."""
        self._write(("\r\x1b[2K" if self._open else "") + text + "\n")
        self._open = False
        self._last = time.monotonic()

    def status(self, text: str) -> None:
        """Show a status: on a terminal it replaces the last one; elsewhere it is skipped if the last one is recent."""
        if self._terminal:
            self._write("\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1])
            self._open = True
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self.event(text)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def training_status(metrics: Path, since: float) -> str:
    """Format step, losses, speed and remaining time from a stage's `metrics.jsonl`; empty if there are none.

    A training without a teacher minimizes the cross-entropy, which validation always measures.

    Args:
        metrics: the file, which may not exist.
        since: seconds since the epoch; an older file belongs to an earlier attempt and is ignored.
    """
    latest = newest(metrics, since)
    parts = []
    if "step" in latest:
        parts.append(f"step {latest['step']}/{latest.get('max_steps', '?')}")
    distills = "kd_loss" in latest or "hidden_loss" in latest
    labels = {"loss": "distillation loss" if distills else "cross-entropy", "val_loss": "val cross-entropy"}
    parts += [f"{label} {latest[key]:.3f}" for key, label in labels.items() if key in latest]
    if "tokens_per_second" in latest:
        parts.append(f"{latest['tokens_per_second']:,.0f} tokens/s")
    if "seconds_left" in latest:
        parts.append(f"{duration(latest['seconds_left'])} left")
    return ", ".join(parts)


def newest(metrics: Path, since: float) -> dict[str, float]:
    """Return the newest value of each metric in a metrics file; see `training_status` for the arguments."""
    values: dict[str, float] = {}
    for line in _tail(metrics, since):
        values.update({name: value for name, value in line.items() if value is not None and math.isfinite(value)})
    return values


def duration(seconds: float) -> str:
    """Format seconds: `9 s`, `12:05`, `3:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def _tail(path: Path, since: float) -> list[dict[str, float | None]]:
    """Return the last complete lines of a file of JSON objects."""
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
    """Format a table of the stages and their times, followed by the main figures of the report, if there is one."""
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
    lines, models = [], report.get("models", {})
    width = max(map(len, models), default=0)
    for name, model in models.items():
        figures = [f"{model['params'] / 1e6:>9,.2f} M parameters"] if "params" in model else []
        figures += [f"val loss {model['val_loss']:.4f}"] if model.get("val_loss") is not None else []
        lines.append(f"  {name:<{width}}  {'  '.join(figures)}")
    page = next(path for path in (folder / REPORT_PAGE, folder / REPORT_JSON) if path.exists())
    student = models.get("student", {}).get("hf_path")
    exported = [] if student is None else [f"student: {folder.parent / student}"]
    return ["", *lines, "", *exported, f"report: {page}"]
