"""torchrun --nproc_per_node 8 -m recipes successive_halving --config RUN_DIR/resolved.yaml

The best candidates of the search, distilled shortly, the worse half of them dropped round by round
(`prune.successive_halving`): a loss just after pruning says little of what becomes of a shape.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.exporting import make_exporter
from prune_distill.config.values import halving_rounds
from prune_distill.data.folder import DataFolder
from prune_distill.distillation.distillation import student_to_train
from prune_distill.evaluation.evaluator import Evaluator
from prune_distill.model.huggingface import local_folder
from prune_distill.nemo import nemo_api
from prune_distill.pipeline.artifact import remove_folder, write_json
from prune_distill.pipeline.names import CANDIDATES, CHECKPOINTS, CHOICE, WINNER, checkpoint_name
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import PausedError, rank
from prune_distill.pruning import finalists, successive_halving
from prune_distill.pruning.scoring import Scores
from prune_distill.reporting import plots
from prune_distill.schema import Loss, RunConfig, TaskScore
from prune_distill.training.stop_file import is_pause_requested
from prune_distill.training.training import train

log = logging.getLogger("recipes.successive_halving")
# name, checkpoint -> `value`, `stderr`
Scored = Callable[[str, Path], dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """What the candidates are distilled from.

    Attributes:
        teacher: a NeMo checkpoint; `teacher_hf`: its Hugging Face folder or Hub id, where a task takes part in the
            ranking.
        search: the folder of the search, with the candidates.
        task_folder: the user's task definitions and data.
    """

    teacher: Path
    data: Path
    search: Path
    teacher_hf: Path | str | None = None
    task_folder: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `choice.json`, the winner's sizes and layers; `winner/`, from which its distillation goes on;
    `candidates.json` and `pareto.svg`; a folder a candidate with its `metrics.jsonl`.
    """
    table = json.loads((inputs.search / CANDIDATES).read_text())
    plan = halving_rounds(cfg)
    rows = {finalists.name_of(row): row for row in table["candidates"][: plan[0][0]]}
    _join_ranks(cfg, inputs)
    finalists.release()
    asked = cfg.prune.successive_halving.score if cfg.prune.successive_halving is not None else None
    scores_of = None if asked is None else _scores(cfg, asked, inputs, out, next(iter(rows)))
    taking_part = list(rows)
    for number, (_, step) in enumerate(plan, 1):
        ended: dict[str, dict[str, Any]] = {}
        for name in taking_part:
            _distil(cfg, inputs, name, out, step)
            finalists.release()
            ended[name] = {"step": step, "val_loss": successive_halving.read_val_loss(out / name, step)}
            if scores_of is not None:
                checkpoint = out / name / CHECKPOINTS / checkpoint_name(step)
                ended[name]["score"] = scores_of(f"{name}/{checkpoint_name(step)}", checkpoint)
                finalists.release()
            rows[name].setdefault("rounds", []).append(ended[name])
        log.info("round %d: %s", number, ended)
        left = plan[number][0] if number < len(plan) else 1
        losses = {name: entry["val_loss"] for name, entry in ended.items()}
        behind = (
            []
            if asked is None
            else successive_halving.find_clearly_worse({n: e["score"] for n, e in ended.items()}, asked.margin)
        )
        taking_part = successive_halving.select_survivors(losses, left, behind)
    (winner,) = taking_part
    if rank() == 0:
        successive_halving.keep_winner(out / winner, out / WINNER)
        for name in rows:
            # All that is left to do of the others is to be looked at.
            if (out / name / CHECKPOINTS).exists():
                remove_folder(out / name / CHECKPOINTS)
        every = [*rows.values(), *table["candidates"][plan[0][0] :]]
        write_json(out / CANDIDATES, {"teacher": table["teacher"], "candidates": every})
        plots.pareto(every, table["teacher"]).save(out / "pareto.svg")
        write_json(out / CHOICE, rows[winner])
    return {"choice": rows[winner], "steps": plan[-1][1], "candidates": [*rows.values()]}


def _scores(cfg: RunConfig, asked: TaskScore, inputs: Inputs, out: Path, first: str) -> Scored:
    """What scores a candidate; tried before anything is trained, on the first of them."""
    assert inputs.teacher_hf is not None  # an input wherever a task is scored
    teacher = local_folder(inputs.teacher_hf, cfg.model.revision, weights=False)
    evaluator = Evaluator(cfg, DataFolder.read(inputs.data), teacher, out, inputs.task_folder)
    scores = Scores(evaluator, asked, make_exporter(cfg, teacher), out)
    scores.of(f"{first}/{checkpoint_name(0)}", inputs.search / first)
    return scores.of


def _join_ranks(cfg: RunConfig, inputs: Inputs) -> None:
    """Starts what lets ranks wait for one another, as NeMo does with a model at hand."""
    parallel = cfg.distill.parallel
    nemo_api.restore(
        inputs.teacher,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
    )


def _distil(cfg: RunConfig, inputs: Inputs, name: str, out: Path, step: int) -> None:
    """Trains a candidate to a step of the full distillation, where it is validated and saved.

    Raises: PausedError, where a stop file in the stage's folder asked for it.
    """
    pruned, folder = inputs.search / name, out / name
    if successive_halving.has_reached(folder, step):
        return
    teacher = inputs.teacher if cfg.distill.loss is Loss.kd else None
    model = student_to_train(cfg.distill, pruned, teacher)
    if rank() == 0:
        successive_halving.discard_unfinished(folder, step)
    torch.distributed.barrier()
    # Validated where rounds end: each is as long as all before it.
    training = dataclasses.replace(cfg.distill, val_every_n_steps=halving_rounds(cfg)[0][1])
    data, pause = DataFolder.read(inputs.data), successive_halving.PauseAt(folder, step, out)
    try:
        train(model, training, data, folder, seed=cfg.seed, start=pruned, callbacks=[pause])
    except PausedError as paused:
        log.info("%s: %s", folder.name, paused)
    torch.distributed.barrier()  # rank 0 has written the loss that all ranks read
    if is_pause_requested(out):
        if rank() == 0:
            successive_halving.pause(out, folder)
        raise PausedError(f"paused in {folder.name}")
