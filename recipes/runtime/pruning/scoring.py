"""Scores of candidates on a task, as the stage `evaluate` would ask it of the models that would be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.schema import RunConfig, TaskScore
from convert.exporting import export_model
from recipes.runtime.data.folder import DataFolder
from recipes.runtime.evaluation.evaluator import Evaluator
from recipes.runtime.evaluation.holding import ROOM
from recipes.runtime.evaluation.recovery import exported
from recipes.runtime.huggingface import local_folder


class Scores:
    """Asks a task of NeMo checkpoints; what was asked once is kept in `out`. The same calls on all ranks.

    Args:
        inputs: of the stage: data, teacher_hf, task_folder.
    """

    def __init__(self, cfg: RunConfig, score: TaskScore, inputs: dict[str, Any], out: Path) -> None:
        self.cfg, self.score, self.out = cfg, score, out
        self.teacher = local_folder(inputs["teacher_hf"], cfg.model.revision, weights=False)
        data = DataFolder.read(inputs["data"])
        self.evaluator = Evaluator(cfg, data, self.teacher, out, inputs.get("task_folder"))

    def of(self, name: str, checkpoint: Path) -> dict[str, Any]:
        """`value` and `stderr` of a checkpoint.

        Raises:
            InputError: the task cannot be asked, has no such metric, or one of which less is better.
        """
        from lm_eval.api.registry import is_higher_better

        task, metric = self.score.task, self.score.metric
        dtype = self.cfg.convert.export_dtype.value

        def export(source: Path, folder: Path) -> None:
            export_model(source, self.teacher, folder, dtype, title=name, base=self.cfg.model.name)

        with exported(name, checkpoint, self.out / ROOM, export) as make:
            entries = self.evaluator.score(name, make, task)
        if task not in entries:
            raise InputError(
                f"{task} stands for several tasks; set prune.tournament.score.task to one: {', '.join(entries)}"
            )
        scores = entries[task]
        if metric not in scores:
            found = sorted(key for key in scores if key != "samples")
            raise InputError(f"{task} has no {metric}; set prune.tournament.score.metric to one of {', '.join(found)}")
        if is_higher_better(metric.partition(" ")[0]) is False:  # None: a metric of the task's own
            raise InputError(
                f"of {metric} less is better; set prune.tournament.score.metric to one of which more is better, such as"
                " acc"
            )
        return dict(scores[metric])
