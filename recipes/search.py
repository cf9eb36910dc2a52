"""torchrun -m recipes search --config RUN_DIR/resolved.yaml

Search the shapes that meet the budget (`prune.budget`), with a cheap score of each: loss on held-out documents just
after pruning, and KL divergence from the teacher.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prune_distill.data.folder import DataFolder
from prune_distill.errors import InputError
from prune_distill.model import student
from prune_distill.nemo import backend, nemo_api
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import CANDIDATES, CHOICE
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import rank
from prune_distill.pruning import cutting, evidence, finalists, layer_sets
from prune_distill.pruning.importance import Importance
from prune_distill.pruning.latency import LatencyTable
from prune_distill.pruning.losses import calibration_batches, held_out_batches
from prune_distill.pruning.subnets import Subnets
from prune_distill.reporting import plots
from prune_distill.schema import LayerSelection, RunConfig, Shape

log = logging.getLogger("recipes.search")


@dataclass(frozen=True)
class Inputs:
    """The teacher as a NeMo checkpoint, prepared data, and the teacher's importance scores."""

    teacher: Path
    data: Path
    importance: Path


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `candidates.json` (best first), `choice.json` (the first of them), `pareto.svg`; `latency.json`; before
    successive halving, a NeMo checkpoint of each candidate that takes part.
    """
    prune, budget, device = cfg.prune, cfg.prune.budget, backend.activate().device
    assert budget is not None
    assert cfg.model.shape is not None
    data = DataFolder.read(inputs.data)
    model, trainer = nemo_api.restore(
        inputs.teacher,
        pipeline_model_parallel_size=prune.pipeline_model_parallel_size,
        modelopt_spec=True,
    )
    core = nemo_api.core_model(model).eval()
    scores = Importance.load(inputs.importance, device)
    space, latency = _space(cfg, model, device)
    shapes = student.candidates(space, latency)
    if not shapes:
        raise InputError(_nearest(space, latency))
    log.info("%d shapes meet the budget", len(shapes))
    dropped = _layer_sets(cfg, core, scores, data, {shape.num_layers for shape in shapes})
    pairs = [(shape, layers) for shape in shapes for layers in dropped[shape.num_layers]]
    held_out = held_out_batches(data, prune, budget.samples, device)
    teacher_loss, found = Subnets(model, scores, cfg.model.shape).scores(pairs, held_out)
    rows = [
        {**_row(space, shape, latency), "drop_layers": layers, "loss": loss, "kl": kl}
        for (shape, layers), (loss, kl) in zip(pairs, found, strict=True)
    ]
    evidence.mark_front(rows)
    rows = evidence.best_first(rows)
    teacher = {**_row(space, cfg.model.shape, latency), "drop_layers": [], "loss": teacher_loss, "kl": 0.0}
    if rank() == 0:
        if latency is not None:
            write_json(out / "latency.json", latency.table())
        write_json(out / CANDIDATES, {"teacher": teacher, "candidates": rows})
        write_json(out / CHOICE, rows[0])
        plots.pareto(rows, teacher, label=cfg.original_name).save(out / "pareto.svg")
    trainer.strategy.barrier()
    if prune.successive_halving is not None:
        del model, core, trainer
        for row in rows[: prune.successive_halving.candidates]:
            finalists.release()
            cutting.save_candidate(row, inputs.teacher, scores, prune.pipeline_model_parallel_size, out)
    return {"candidates": len(rows), "teacher": teacher, "choice": rows[0]}


def _layer_sets(
    cfg: RunConfig, core: Any, scores: Importance, data: DataFolder, depths: set[int]
) -> dict[int, list[list[int]]]:
    """Return the sets of layers to drop for each depth: that of `prune.layer_selection`, and its best neighbors."""
    prune, budget, total = cfg.prune, cfg.prune.budget, core.config.num_layers
    assert budget is not None
    device = next(core.parameters()).device
    batches = calibration_batches(data, prune, prune.block_samples, cfg.seed, device)
    found: dict[int, list[list[int]]] = {}
    for depth in sorted(depths):
        cut = total - depth
        if prune.layer_selection is LayerSelection.block and cut:
            (selected,) = layer_sets.find_best(core, batches, layer_sets.list_blocks(total, cut), 1)
        else:
            selected = scores.least_important(cut)
        others = layer_sets.list_shifted(selected, total)
        found[depth] = [selected, *layer_sets.find_best(core, batches, others, budget.layer_sets - 1)]
    return found


def _space(cfg: RunConfig, model: Any, device: Any) -> tuple[student.Space, Any]:
    """Return the search space, with relative latency limits made absolute, and the latency estimate of shapes.

    With several pipeline stages, latency is not measured, because a layer's time is that of one rank.
    """
    budget = cfg.prune.budget
    assert budget is not None
    space = student.build_space(cfg)
    if cfg.prune.pipeline_model_parallel_size > 1:
        return space, None
    ids = torch.randint(space.shape.vocab_size, (space.sequences, space.tokens), device=device)
    ffns = student.ffns(space)
    table = LatencyTable(model, (min(ffns), max(ffns)), ids)
    share = table(space.shape) * budget.latency_fraction if budget.latency_fraction else math.inf
    return dataclasses.replace(space, limits=(*space.limits[:2], min(space.limits[2], share))), table


def _row(space: student.Space, shape: Shape, latency: Any) -> dict[str, Any]:
    cost = space.cost(shape)
    sizes = {axis: getattr(shape, axis) for axis in student.AXES}
    measured = latency(shape) if latency is not None else None
    return {**sizes, "params": cost.params, "memory_gb": cost.memory / student.GB, "latency_ms": measured}


def _nearest(space: student.Space, latency: Any) -> str:
    least = student.smallest(space)
    took = f"{latency(least):.4g}" if latency is not None else "?"
    sizes = json.dumps({axis: getattr(least, axis) for axis in student.AXES})
    return (
        f"no shape meets the budget: the smallest, {sizes}, takes {took} ms on this machine, and the limit is "
        f"{space.limits[2]:.4g} ms; raise prune.budget.latency_ms, or prune.budget.max_depth_pruning and "
        "max_width_pruning"
    )
