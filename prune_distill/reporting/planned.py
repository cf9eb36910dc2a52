"""Compare the estimates of `launch.plan` with measurements of the run."""

from __future__ import annotations

import os
from typing import Any

from prune_distill.reporting import Json, words
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite


def compare_with_actual(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return rows of (quantity, planned, actual); none if the run has no plan."""
    plan = run.plan
    if not plan:
        return []
    models = run.metrics("evaluate")
    rows = [
        (
            f"{name}: parameters",
            words.number(_get(plan, "models", name, "parameters")),
            words.number(_get(models, name, "params")),
        )
        for name in ("teacher", "original", "student")
        if name != "original" or _get(plan, "models", name) is not None
    ]
    distill = run.metrics("distill")
    rows += [
        ("distillation: steps", words.number(_get(plan, "training", "steps")), words.number(distill.get("steps"))),
        ("distillation: tokens", words.count(_get(plan, "training", "tokens")), words.count(distill.get("tokens"))),
    ]
    planned = plan.get("stages")
    for stage in planned if isinstance(planned, list) else []:
        name, hours = str(_get(stage, "stage")), finite(_get(stage, "hours"))
        found = run.stages.get(name)
        took = found.manifest.seconds if found is not None else None
        if hours is not None:
            rows.append((f"{name}: time", words.duration(hours * 3600), words.duration(took)))
    rows += _memory(run, plan)
    rows.append(("disk", words.size(_get(plan, "disk", "total")), words.size(_written(run))))
    return rows


def _memory(run: RunFolder, plan: Json) -> list[tuple[str, str, str]]:
    """Return rows on the memory of the fullest rank of each stage; rank 0 measures the actual value."""
    rows = []
    memory = plan.get("memory")
    for name, planned in memory.items() if isinstance(memory, dict) else ():
        ranks = planned if isinstance(planned, list) else [planned]
        totals = [finite(rank.get("total")) for rank in ranks if isinstance(rank, dict)]
        found = run.stages.get(name)
        if found is None or not totals or None in totals:
            continue
        peak = found.manifest.peak_memory
        measured = finite(peak.get("gpu_bytes"))
        actual = words.size(measured) if measured else words.size(peak.get("host_bytes"))
        note = "" if measured else " (the whole process)" if peak else ""
        rows.append((f"{name}: memory of a rank", words.size(max(total for total in totals if total)), actual + note))
    return rows


def _written(run: RunFolder) -> int:
    """Return the total size in bytes of all files in the run's folder."""
    total = 0
    for folder, _, names in os.walk(run.path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total


def _get(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
