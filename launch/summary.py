"""The last thing a run prints: its stages, and the figures of its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.progress import duration
from prune_distill.pipeline.artifact import Located, read_manifest
from prune_distill.pipeline.names import REPORT, REPORT_JSON, REPORT_PAGE


def summary(stages: Sequence[Located]) -> str:
    """A table of stages with the time each took, then the report's headline figures where there is a report."""
    width = max(len(stage.stage.name) for stage in stages)
    lines = [f"  {stage.stage.name:<{width}}  {_seconds(stage)}" for stage in stages]
    report = next((stage for stage in stages if stage.stage.name == REPORT), None)
    if report is not None:
        lines += _headlines(report.folder)
    return "\n".join(lines)


def _seconds(stage: Located) -> str:
    manifest = read_manifest(stage.folder) or {}
    return f"{duration(manifest.get('seconds', 0)):>8}"


def _headlines(folder: Path) -> list[str]:
    try:
        report: dict[str, Any] = json.loads((folder / REPORT_JSON).read_text())
    except (OSError, json.JSONDecodeError):
        return []
    lines = [f"  {name:<8}  {_figures(model)}" for name, model in report.get("models", {}).items()]
    page = next(path for path in (folder / REPORT_PAGE, folder / REPORT_JSON) if path.exists())
    return ["", *lines, "", f"report: {page}"]


def _figures(model: dict[str, Any]) -> str:
    parts = []
    if "params" in model:
        parts.append(f"{model['params'] / 1e6:>9,.2f} M parameters")
    if model.get("val_loss") is not None:
        parts.append(f"val loss {model['val_loss']:.4f}")
    return "  ".join(parts)
