"""The content of `report.json`: what came out of a run, from what its stages left. Paths are relative to the run."""

from __future__ import annotations

from typing import Any

from prune_distill.benchmarking.timing import cost_per_million
from prune_distill.pipeline.identity import library_versions
from prune_distill.pipeline.names import BENCHMARK, EVALUATION, RECOVERY
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite

# How the report calls a model, in the order of its tables.
LABELS = {
    "teacher": "Teacher",
    "corrected_teacher": "Teacher, corrected",
    "pruned": "Just pruned",
    "student": "Student",
    "ce": "Control: no teacher",
    "scratch": "Control: from scratch",
}
# The one metric of a task that tables have room for: the first that there is.
HEADLINE_METRICS = ("acc_mutual_info", "acc_norm", "acc", "exact_match")
TRAINED = {"student": "distill", "ce": "distill.ce", "scratch": "distill.scratch"}


def summarize(run: RunFolder) -> dict[str, Any]:
    """What came out of a run so far; what is not there yet is empty or null."""
    models = _models(run)
    recovery = run.read("evaluate", RECOVERY)
    commits = _commits(run)
    return {
        "experiment": run.name,
        "state": state_of(run),
        "backend": _first(run, "metrics", "backend"),
        "versions": _first(run, "versions") or library_versions(),
        "git_commit": _first(run, "git_commit"),
        "git_commits": commits,
        "models": models,
        "tasks": _tasks(models),
        "recovery": [row for row in recovery if isinstance(row, dict)] if isinstance(recovery, list) else [],
        "benchmark": _benchmark(run),
        "checks": {
            key: value
            for stage in ("verify_import", "verify")
            for key, value in run.metrics(stage).items()
            if key.endswith("_diff")
        },
        "pruning": run.metrics("prune") or None,
        "correction": run.metrics("correct_teacher") or None,
        "stages": {
            name: {
                "status": stage.state,
                "seconds": stage.manifest.get("seconds"),
                "starts": len(stage.attempts),
                **({"cause": stage.cause} if stage.cause else {}),
            }
            for name, stage in run.stages.items()
        },
    }


def state_of(run: RunFolder) -> str:
    """complete, failed, running, paused, or unfinished."""
    states = [stage.state for stage in run.stages.values()]
    # Every run is evaluated: where stages are told by their folders alone, those to come do not show.
    if "evaluate" in run.stages and all(state == "complete" for state in states):
        return "complete"
    return next((state for state in ("failed", "running", "paused") if state in states), "unfinished")


def headline(task: dict[str, Any]) -> tuple[str, float, float | None] | None:
    """A task's metric that tables have room for: name, value, standard error. None where none is a number."""
    metrics = {name: entry for name, entry in task.items() if isinstance(entry, dict) and "value" in entry}
    for name in sorted(metrics, key=lambda name: (*(name != known for known in HEADLINE_METRICS), name)):
        value = finite(metrics[name]["value"])
        if value is not None:
            return name, value, finite(metrics[name].get("stderr"))
    return None


def samples_of(task: dict[str, Any]) -> int | None:
    """How many questions a task had."""
    samples = task.get("samples")
    return samples if isinstance(samples, int) else None


def _commits(run: RunFolder) -> dict[str, list[str]]:
    """The stages that each commit of the code made, the oldest first."""
    commits: dict[str, list[str]] = {}
    for name, stage in run.stages.items():
        commit = stage.manifest.get("git_commit")
        if isinstance(commit, str):
            commits.setdefault(commit, []).append(name)
    return commits


def _benchmark(run: RunFolder) -> dict[str, Any] | None:
    """The content of `benchmark.json`, with what tokens cost at the price that the config names."""
    found = run.read("benchmark", BENCHMARK)
    if not isinstance(found, dict):
        return None
    price = run.cfg.benchmark.cost_per_hour if run.cfg is not None else None
    models = found.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        seconds = finite(model.get("seconds_per_token")) if isinstance(model, dict) else None
        if seconds is not None:
            model["cost_per_million_tokens"] = cost_per_million(seconds, price)
    return found


def _models(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The evaluated models by name, in the order of the tables, with the place of those that were made here."""
    entries: dict[str, dict[str, Any]] = {}
    for stage in run.evaluations():
        found = stage.metrics or stage.read(EVALUATION)
        for name, metrics in found.items() if isinstance(found, dict) else ():
            if isinstance(metrics, dict) and "val_loss" in metrics:
                entries[name] = {**metrics, **_place(run, stage.manifest, name)}
    order = [*(name for name in LABELS if name in entries), *(name for name in entries if name not in LABELS)]
    return {name: entries[name] for name in order}


def _place(run: RunFolder, manifest: dict[str, Any], name: str) -> dict[str, str]:
    """Where a model is. A teacher of the user's is outside the run, or on the Hub: its place is no part of a report."""
    inputs = manifest.get("inputs")
    entry = inputs.get(name) if isinstance(inputs, dict) else None
    path = entry.get("path") if isinstance(entry, dict) else None
    inside = isinstance(path, str) and not path.startswith(("/", "..", "~"))
    made_here = name != "teacher" or "demo_model" in run.stages
    return {"hf_path": path} if isinstance(path, str) and inside and made_here else {}


def _tasks(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores by task, then by model."""
    tasks: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        model_tasks = model.get("tasks")
        for task, scores in model_tasks.items() if isinstance(model_tasks, dict) else ():
            if isinstance(scores, dict):
                tasks.setdefault(task, {})[name] = scores
    return tasks


def _first(run: RunFolder, *keys: str) -> Any:
    """A value of the newest manifest that has it."""
    for stage in reversed(run.stages.values()):
        value: Any = stage.manifest
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value:
            return value
    return None
