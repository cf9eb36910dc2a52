"""torchrun --nproc_per_node 8 -m recipes successive_halving --config RUN_DIR/resolved.yaml

Distill the best candidates of the search for a short time, and drop the worse half in each round
(`prune.successive_halving`). The loss just after pruning predicts the loss after distillation poorly.
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
    """Inputs of the distillation of candidates.

    Attributes:
        teacher: a NeMo checkpoint; `teacher_hf`: its Hugging Face folder or Hub id, if the ranking also uses a
            task.
        search: folder of the search, with the candidates.
        task_folder: the user's task definitions and data.
    """

    teacher: Path
    data: Path
    search: Path
    teacher_hf: Path | str | None = None
    task_folder: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `choice.json`, the winner's sizes and layers; `winner/`, from which its distillation continues;
    `candidates.json` and `pareto.svg`; a folder per candidate with its `metrics.jsonl`.
    """
    table = json.loads((inputs.search / CANDIDATES).read_text())
    plan = halving_rounds(cfg)
    rows = {finalists.name_of(row): row for row in table["candidates"][: plan[0][0]]}
    _join_ranks(cfg, inputs)
    finalists.release()
    task_score = cfg.prune.successive_halving.score if cfg.prune.successive_halving is not None else None
    score_candidate = None if task_score is None else _scores(cfg, task_score, inputs, out, next(iter(rows)))
    candidates = list(rows)
    for number, (_, step) in enumerate(plan, 1):
        results: dict[str, dict[str, Any]] = {}
        for name in candidates:
            _distill(cfg, inputs, name, out, step)
            finalists.release()
            results[name] = {"step": step, "val_loss": successive_halving.read_val_loss(out / name, step)}
            if score_candidate is not None:
                checkpoint = out / name / CHECKPOINTS / checkpoint_name(step)
                results[name]["score"] = score_candidate(f"{name}/{checkpoint_name(step)}", checkpoint)
                finalists.release()
            rows[name].setdefault("rounds", []).append(results[name])
        log.info("round %d: %s", number, results)
        survivors = plan[number][0] if number < len(plan) else 1
        losses = {name: entry["val_loss"] for name, entry in results.items()}
        worse = (
            []
            if task_score is None
            else successive_halving.find_clearly_worse({n: e["score"] for n, e in results.items()}, task_score.margin)
        )
        candidates = successive_halving.select_survivors(losses, survivors, worse)
    (winner,) = candidates
    if rank() == 0:
        successive_halving.keep_winner(out / winner, out / WINNER)
        for name in rows:
            # The other candidates are only kept for inspection.
            if (out / name / CHECKPOINTS).exists():
                remove_folder(out / name / CHECKPOINTS)
        all_rows = [*rows.values(), *table["candidates"][plan[0][0] :]]
        write_json(out / CANDIDATES, {"teacher": table["teacher"], "candidates": all_rows})
        plots.pareto(all_rows, table["teacher"], label=cfg.original_name).save(out / "pareto.svg")
        write_json(out / CHOICE, rows[winner])
    return {"choice": rows[winner], "steps": plan[-1][1], "candidates": [*rows.values()]}


def _scores(cfg: RunConfig, task_score: TaskScore, inputs: Inputs, out: Path, first: str) -> Scored:
    """Return the function that scores a candidate, after a test on the first one, before any training."""
    assert inputs.teacher_hf is not None  # an input if a task is scored
    teacher = local_folder(inputs.teacher_hf, cfg.model.revision, weights=False)
    evaluator = Evaluator(cfg, DataFolder.read(inputs.data), teacher, out, inputs.task_folder)
    scores = Scores(evaluator, task_score, make_exporter(cfg, teacher), out)
    scores.measure(f"{first}/{checkpoint_name(0)}", inputs.search / first)
    return scores.measure


def _join_ranks(cfg: RunConfig, inputs: Inputs) -> None:
    """Initialize the process groups, which NeMo does when it loads a model."""
    parallel = cfg.distill.parallel
    nemo_api.restore(
        inputs.teacher,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
    )


def _distill(cfg: RunConfig, inputs: Inputs, name: str, out: Path, step: int) -> None:
    """Train a candidate up to a step of the full distillation, where it is validated and saved.

    Raises: PausedError, if the stage's folder contains a stop file.
    """
    pruned, folder = inputs.search / name, out / name
    if successive_halving.has_reached(folder, step):
        return
    teacher = inputs.teacher if cfg.distill.loss is Loss.kd else None
    model = student_to_train(cfg.distill, pruned, teacher, cfg.quantize)
    if rank() == 0:
        successive_halving.discard_unfinished(folder, step)
    torch.distributed.barrier()
    # Validate at the end of each round, which is as long as all earlier rounds.
    training = dataclasses.replace(cfg.distill, val_every_n_steps=halving_rounds(cfg)[0][1])
    data, pause = DataFolder.read(inputs.data), successive_halving.PauseAt(folder, step, out)
    try:
        train(model, training, data, folder, seed=cfg.seed, start=pruned, callbacks=[pause])
    except PausedError as paused:
        log.info("%s: %s", folder.name, paused)
    torch.distributed.barrier()  # rank 0 writes the loss that all ranks read
    if is_pause_requested(out):
        if rank() == 0:
            successive_halving.pause(out, folder)
        raise PausedError(f"paused in {folder.name}")
