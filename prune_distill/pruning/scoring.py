"""Scores of candidates on a task, with the settings of the stage `evaluate`, on exported models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from prune_distill.errors import InputError
from prune_distill.evaluation.evaluator import Evaluator
from prune_distill.evaluation.recovery import Export, export_temporarily
from prune_distill.evaluation.results import Metric
from prune_distill.pipeline.names import ROOM
from prune_distill.schema import TaskScore


class Scores:
    """Scores NeMo checkpoints on a task, and stores the scores in `out`. All ranks must make the same calls.

    Args:
        evaluator: measures the task.
        score: the task and its metric.
        export: exports a checkpoint to a Hugging Face folder.
    """

    def __init__(self, evaluator: Evaluator, score: TaskScore, export: Export, out: Path) -> None:
        self.evaluator, self.score, self.export, self.room = evaluator, score, export, out / ROOM

    def measure(self, name: str, checkpoint: Path) -> dict[str, Any]:
        """Return `value` and `stderr` of a checkpoint.

        Raises:
            InputError: the task cannot be loaded, or has no such metric, or lower values of it are better.
        """
        from lm_eval.api.registry import is_higher_better  # takes seconds; only for tasks

        task, metric = self.score.task, self.score.metric
        with export_temporarily(name, checkpoint, self.room, self.export) as make:
            entries = self.evaluator.score(name, make, task)
        if task not in entries:
            raise InputError(
                f"{task} is a group of tasks; set prune.successive_halving.score.task to one: {', '.join(entries)}"
            )
        scores = entries[task]
        if metric not in scores:
            found = sorted(key for key in scores if key != "samples")
            raise InputError(
                f"{task} has no {metric}; set prune.successive_halving.score.metric to one of {', '.join(found)}"
            )
        if is_higher_better(metric.partition(" ")[0]) is False:  # None: a metric of the task's own
            raise InputError(
                f"prune.successive_halving.score.metric={metric}: lower is better; set a metric for which higher is "
                "better, "
                "such as acc"
            )
        return dict(cast(Metric, scores[metric]))
