"""Run EleutherAI's lm-evaluation-harness on a loaded model, distributed over ranks.

The harness's own data parallelism requires accelerate and several GPUs, and confuses local ranks with global ranks
(lm_eval/models/huggingface.py:465-492), so it is limited to one node. Here the existing process group implements what
its evaluator needs of a model: rank, world size, two gathers and a barrier.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from prune_distill.evaluation.results import Metric, TaskScores
from prune_distill.nemo import ranks
from prune_distill.pipeline.stage_main import rank, world_size
from prune_distill.schema import EvaluateConfig

log = logging.getLogger("recipes.evaluate")

# The used entries of the harness's results (lm_eval/result_schema.py). Keys in `results` and `groups` are tasks, then
# `metric,filter`.
Results = TypedDict(
    "Results",
    {
        "results": dict[str, dict[str, object]],
        "groups": dict[str, dict[str, object]],
        "group_subtasks": dict[str, list[str]],
        "n-samples": dict[str, dict[str, int]],
    },
    total=False,
)


class Harness:
    """Measures the tasks of a run. Each has a folder that is searched first for its definition and data.

    Args:
        own: folder of the task that the run itself made, whose name is `own_task`; None: there is none.
        task_folder: the user's folder; None: definitions come from the harness, and data from the Hub.
    """

    def __init__(self, cfg: EvaluateConfig, own: Path | None, own_task: str, task_folder: Path | None) -> None:
        if task_folder is not None:
            os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when `datasets` is imported
        self.cfg = cfg
        self.places: dict[str, Path | None] = {} if own is None else {own_task: own}
        self.places |= dict.fromkeys(cfg.tasks, task_folder)
        self._faults: dict[str, str | None] = {}

    @property
    def tasks(self) -> list[str]:
        return list(self.places)

    @property
    def checked(self) -> set[str]:
        """The tasks that `fault` has checked."""
        return set(self._faults)

    def fault(self, task: str) -> str | None:
        """Return why a task cannot be measured, such as missing data on one of the ranks; None if it can."""
        if task not in self._faults:
            found = [fault for fault in ranks.all_gather(self._fault(task)) if fault is not None]
            self._faults[task] = found[0] if found else None
            if found:
                log.error("task %s is skipped: %s", task, found[0])
        return self._faults[task]

    def measure(self, task: str, model: Any, tokenizer: Any) -> dict[str, TaskScores] | None:
        """Return a model's scores on a task, on the first rank.

        Returns:
            By task, the `value` and `stderr` of each metric, and `samples`. A group has one entry for all of its tasks,
            a tag has one per task.
        """
        from lm_eval import evaluator  # takes seconds; only for tasks

        # It runs pip and the compiler to report their versions, which takes seconds per call and is not used here
        # (lm_eval/loggers/utils.py:add_env_info).
        evaluator.add_env_info = lambda storage: None
        place = self.places[task]
        with _change_directory(place):
            results = evaluator.simple_evaluate(
                model=_language_model(model, tokenizer, self.cfg.task_batch_size),
                tasks=[task],
                num_fewshot=self.cfg.num_fewshot,
                limit=self.cfg.task_limit,
                log_samples=False,
                task_manager=_manager(place, task),
            )
        return None if results is None else scores(results, task)

    def _fault(self, task: str) -> str | None:
        place = self.places[task]
        try:
            with _change_directory(place):
                loaded = _manager(place, task).load([task])
        # `datasets`, the Hub client, its network library and definitions raise errors of any kind.
        except Exception as error:
            where = f" or {place / 'OWNER/NAME'}" if place is not None else ""
            return (
                f"its definition or data cannot be loaded ({type(error).__name__}: {_line(error)}); download the data"
                f" set to the Hub's cache{where}, or remove it from evaluate.tasks"
            )
        unsafe = [name for name, found in loaded["tasks"].items() if getattr(found, "UNSAFE_CODE", False)]
        return f"{unsafe[0]} runs code that the model writes, which is not supported" if unsafe else None


def scores(results: Results, task: str) -> dict[str, TaskScores]:
    """Extract the entries of a task, a group or a tag from the harness's results."""
    whole = {**results["results"], **results.get("groups", {})}
    names = [task] if task in whole else sorted(results["results"])
    return {name: {**_metrics(whole[name]), "samples": _samples(results, name)} for name in names}


def _metrics(entry: dict[str, object]) -> dict[str, Metric]:
    """Convert an entry, whose keys are `metric,filter`: a task may extract answers in several ways."""
    found: dict[str, Metric] = {}
    for key, value in entry.items():
        metric, _, way = key.partition(",")
        if not way or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = entry.get(f"{metric}_stderr,{way}")
        name = metric if way == "none" else f"{metric} ({way})"
        found[name] = {"value": float(value), "stderr": float(stderr) if isinstance(stderr, (int, float)) else None}
    return found


def _samples(results: Results, name: str) -> int:
    """Count the questions of a task, or of all tasks in a group."""
    children = results.get("group_subtasks", {}).get(name)
    if children:
        return sum(_samples(results, child) for child in children)
    return int(results["n-samples"][name]["effective"])


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM  # takes seconds; only for tasks

    # It warns about ranks, and that the model was already loaded, which is intended.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)

    class Ranked(HFLM):  # type: ignore[misc]
        """A language model that shares the requests of a task with the other ranks."""

        def __init__(self) -> None:
            super().__init__(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
            self._rank, self._world_size = rank(), world_size()

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.tensor(ranks.all_gather(tensor.item()))

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
            return ranks.all_gather(obj)

        def barrier(self) -> None:
            if world_size() > 1:
                dist.barrier()

    return Ranked()


@cache
def _manager(place: Path | None, task: str) -> Any:
    """Index task definitions: only the folder if it has the task, because reading all definitions takes 2 s."""
    if place is not None:
        manager = _read_index(place, include_defaults=False)
        if task in manager.all_tasks:
            return manager
    return _read_index(place, include_defaults=True)


@cache
def _read_index(place: Path | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager  # takes seconds; only for tasks

    return TaskManager(include_path=None if place is None else str(place), include_defaults=include_defaults)


@contextlib.contextmanager
def _change_directory(folder: Path | None) -> Iterator[None]:
    """Change to a folder, in which `datasets` finds data sets OWNER/NAME (datasets/load.py:dataset_module_factory)."""
    if folder is None:
        yield
        return
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def versions(tasks: Sequence[str]) -> dict[str, str]:
    """Return the versions that scores depend on, in addition to the stage's identity; empty without tasks."""
    return {"lm_eval": version("lm_eval")} if tasks else {}
