"""`metrics.jsonl`: one JSON object per line, appended while a stage trains; `tail -f` shows it. No torch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from prune_distill.atomic_files import write_text
from prune_distill.pipeline.stage_log import parse_metrics

log = logging.getLogger("recipes.metrics")


class MetricsFile:
    """Writes a metrics file, in one process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **values: Any) -> None:
        """Append a line. Values are numbers; `step` is the optimizer step."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def truncate_after(self, step: int) -> None:
        """Remove invalid lines when a training resumes after `step`, and log how many.

        These are lines of steps that it repeats, lines that are not metrics (truncated or damaged), and all but
        the last of several lines for the same step.
        """
        if step and not self.path.exists():
            log.warning("%s is missing: the record starts after step %d", self.path, step)
        parsed = [parse_metrics(line) for line in _lines(self.path)]
        lines = [line for line in parsed if line is not None]
        earlier = [line for line in lines if line["step"] <= step]
        # A step may have a line for training and one for validation.
        kept = list({(line["step"], "val_loss" in line): line for line in earlier}.values())
        dropped = {
            f"of steps after {step}": len(lines) - len(earlier),
            "that were repeated": len(earlier) - len(kept),
            "that are not metrics": len(parsed) - len(lines),
        }
        if words := ", ".join(f"{count} {kind}" for kind, count in dropped.items() if count):
            log.warning("%s: lines removed: %s", self.path, words)
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file with an integer `step`; none if it does not exist. Skips other lines."""
    return [line for line in map(parse_metrics, _lines(path)) if line is not None]


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in content.split("\n") if line]


def loss_gain(path: Path) -> dict[str, float | None]:
    """Return the held-out loss before and after a training, and their difference (nats per token); None if unknown."""
    losses = {line["step"]: line["val_loss"] for line in read_metrics(path) if "val_loss" in line}
    before, after = losses.get(0), losses[max(losses)] if losses else None
    gained = None if before is None or after is None else before - after
    return {"val_loss_before": before, "val_loss_after": after, "val_loss_gain": gained}
