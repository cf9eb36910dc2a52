"""The content of `report.json`: the results of a run, from the outputs of its stages. Paths are relative to the run."""

from __future__ import annotations

from typing import Any, TypedDict, cast

from prune_distill.benchmarking.timing import Result, cost_per_million
from prune_distill.evaluation.results import ModelEntry, RecoveryPoint, TaskScores
from prune_distill.pipeline.identity import library_versions
from prune_distill.pipeline.names import BENCHMARK, DISTILLED, EVALUATION, RECOVERY
from prune_distill.reporting import Json
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite
from prune_distill.schema import MOST_SOURCE_TEACHERS

QUANTIZED = {
    "student_fp8": "Student, FP8",
    "student_fp8_tensor": "Student, FP8 per tensor",
    "student_nvfp4": "Student, NVFP4",
    "student_int8": "Student, INT8",
    "student_int4": "Student, INT4",
}
# Labels of the models, in the order of the tables.
LABELS = {
    "teacher": "Teacher",
    "corrected_teacher": "Teacher, corrected",
    "original": "Original",
    "pruned": "Just pruned",
    DISTILLED: "Student before on-policy rounds",
    "student": "Student",
    **QUANTIZED,
    "ce": "Control: no teacher",
    "scratch": "Control: from scratch",
}
# Sentences call the model that is pruned so, which is the teacher unless the run has another one.
REFERENCES = {"teacher": "the teacher", "original": "the original model"}
# Metrics of a task in order of preference; tables show the first one that exists.
HEADLINE_METRICS = ("acc_mutual_info", "acc_norm", "acc", "exact_match")
# Prefixes of the checks of conversions, by stage.
CHECKS = {
    "verify_import": "",
    **{
        f"verify_import.{teacher}": f"{teacher}_"
        for teacher in ("teacher", *(f"source_teacher{number}" for number in range(1, MOST_SOURCE_TEACHERS + 1)))
    },
    "verify": "",
}
TRAINED = {"student": "distill", "ce": "distill.ce", "scratch": "distill.scratch"}


class ModelReport(ModelEntry, total=False):
    """A model's entry, with its folder relative to the run.

    Attributes:
        hf_path: a Hugging Face folder that transformers loads.
        engine_path: the folder of a quantized model, which engines such as vLLM load.
    """

    hf_path: str
    engine_path: str


class StageReport(TypedDict, total=False):
    """A stage's status and seconds, its number of starts, and why it failed."""

    status: str
    seconds: float | None
    starts: int
    cause: str


class Report(TypedDict):
    """The content of `report.json`.

    Attributes:
        state: as `state_of` returns it.
        git_commits: stages by the commit of the code that ran them, oldest first.
        models: the evaluated models, in the order of the tables.
        tasks: the scores in `models`, by task and model.
        reference: the model that is pruned, a key of `REFERENCES`, to which changes of size, loss and speed are
            relative.
        benchmark: the content of `benchmark.json`, with costs.
        checks: largest difference of logits for each conversion.
        pruning, correction: metrics of the stages `prune` and `correct_teacher`.
    """

    experiment: str
    state: str
    backend: str | None
    versions: dict[str, str]
    git_commit: str | None
    git_commits: dict[str, list[str]]
    models: dict[str, ModelReport]
    reference: str
    tasks: dict[str, dict[str, TaskScores]]
    recovery: list[RecoveryPoint]
    benchmark: Result | None
    checks: dict[str, float]
    pruning: Json | None
    correction: Json | None
    stages: dict[str, StageReport]


def summarize(run: RunFolder) -> Report:
    """Summarize the results of a run so far; missing results are empty or null."""
    models = _models(run)
    recovery = run.read("evaluate", RECOVERY)
    newest = [stage.manifest for stage in reversed(run.stages.values())]
    return {
        "experiment": run.name,
        "state": state_of(run),
        "backend": next(filter(None, (manifest.metrics.get("backend") for manifest in newest)), None),
        "versions": next(filter(None, (manifest.versions for manifest in newest)), library_versions()),
        "git_commit": next(filter(None, (manifest.git_commit for manifest in newest)), None),
        "git_commits": _commits(run),
        "models": models,
        "reference": _reference(run),
        "tasks": _tasks(models),
        "recovery": _objects(recovery),
        "benchmark": _benchmark(run),
        "checks": {
            f"{prefix}{key}": value
            for stage, prefix in CHECKS.items()
            for key, value in run.metrics(stage).items()
            if key.endswith("_diff")
        },
        "pruning": run.metrics("prune") or None,
        "correction": run.metrics("correct_teacher") or None,
        "stages": {
            name: {
                "status": stage.state,
                "seconds": stage.manifest.seconds,
                "starts": len(stage.attempts),
                **({"cause": stage.cause} if stage.cause else {}),
            }
            for name, stage in run.stages.items()
        },
    }


def state_of(run: RunFolder) -> str:
    """Return the state of a run: complete, failed, running, interrupted, paused, or unfinished."""
    states = [stage.state for stage in run.stages.values()]
    # Without the evaluation a run is not complete. If stages are only known by their folders, later ones are missing.
    if "evaluate" in run.stages and all(state == "complete" for state in states):
        return "complete"
    return next((state for state in ("failed", "running", "interrupted", "paused") if state in states), "unfinished")


def headline(task: TaskScores) -> tuple[str, float, float | None] | None:
    """Return the metric of a task for tables: name, value, standard error. None if no metric is a number."""
    metrics = {name: entry for name, entry in task.items() if isinstance(entry, dict) and "value" in entry}
    for name in sorted(metrics, key=lambda name: (*(name != known for known in HEADLINE_METRICS), name)):
        value = finite(metrics[name]["value"])
        if value is not None:
            return name, value, finite(metrics[name].get("stderr"))
    return None


def count_samples(task: TaskScores) -> int | None:
    """Return the number of questions of a task."""
    samples = task.get("samples")
    return samples if isinstance(samples, int) else None


def _commits(run: RunFolder) -> dict[str, list[str]]:
    """Return the stages by the commit of the code that ran them, oldest first."""
    commits: dict[str, list[str]] = {}
    for name, stage in run.stages.items():
        if stage.manifest.git_commit is not None:
            commits.setdefault(stage.manifest.git_commit, []).append(name)
    return commits


def _objects(value: Any) -> list[Any]:
    """Return the JSON objects in a value that should be a list of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _benchmark(run: RunFolder) -> Result | None:
    """Return the content of `benchmark.json`, with the cost of tokens at the configured price."""
    found = run.read("benchmark", BENCHMARK)
    if not isinstance(found, dict):
        return None
    price = run.cfg.benchmark.cost_per_hour if run.cfg is not None else None
    models = found.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        seconds = finite(model.get("seconds_per_token")) if isinstance(model, dict) else None
        if seconds is not None:
            model["cost_per_million_tokens"] = cost_per_million(seconds, price)
    return cast(Result, found)


def _reference(run: RunFolder) -> str:
    """Return the name of the model that is pruned: `original` if the teacher is another one."""
    return "original" if "hf_to_nemo.teacher" in run.stages else "teacher"


def _models(run: RunFolder) -> dict[str, ModelReport]:
    """Return the evaluated models by name, in the order of the tables, with the paths of those from this run."""
    entries: dict[str, ModelReport] = {}
    for stage in run.evaluations():
        found = stage.manifest.metrics or stage.read(EVALUATION)
        for name, metrics in found.items() if isinstance(found, dict) else ():
            if isinstance(metrics, dict) and "val_loss" in metrics:
                entries[name] = cast(ModelReport, {**metrics, **_place(run, stage.manifest.inputs.get(name), name)})
    order = [*(name for name in LABELS if name in entries), *(name for name in entries if name not in LABELS)]
    return {name: entries[name] for name in order}


def _place(run: RunFolder, path: str | None, name: str) -> dict[str, str]:
    """Return the path of a model of this run. The paths of models from elsewhere are not reported."""
    made_here = name not in REFERENCES or (name == _reference(run) and "demo_model" in run.stages)
    key = "engine_path" if name in QUANTIZED else "hf_path"
    return {key: path} if path is not None and not path.startswith(("/", "..", "~")) and made_here else {}


def _tasks(models: dict[str, ModelReport]) -> dict[str, dict[str, TaskScores]]:
    """Return scores by task, then by model."""
    tasks: dict[str, dict[str, TaskScores]] = {}
    for name, model in models.items():
        model_tasks = model.get("tasks")
        for task, scores in model_tasks.items() if isinstance(model_tasks, dict) else ():
            if isinstance(scores, dict):
                tasks.setdefault(task, {})[name] = scores
    return tasks
