"""Prune a model to a shape with ModelOpt, by importance scores that were measured earlier."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp
from nemo.collections.llm.modelopt.prune.pruner import save_pruned_model

from prune_distill.model.student import AXES, EXPERT_AXES
from prune_distill.nemo import nemo_api
from prune_distill.pipeline.stage_main import rank
from prune_distill.pruning.finalists import name_of
from prune_distill.pruning.importance import Importance
from prune_distill.pruning.search_space import dynamic_core, restore_scores


def complete_sizes(sizes: Mapping[str, int | None], teacher: Any) -> dict[str, int]:
    """Complete the target sizes: ModelOpt needs heads and query groups together, so a missing one keeps its size.

    Args:
        sizes: by name of `prune_distill.model.student.AXES` and `EXPERT_AXES`; None or absent keeps the teacher's.
        teacher: the teacher's Megatron config.
    """
    targets = {name: value for name in (*AXES, *EXPERT_AXES) if (value := sizes.get(name)) is not None}
    if "num_attention_heads" in targets or "num_query_groups" in targets:
        targets.setdefault("num_attention_heads", teacher.num_attention_heads)
        targets.setdefault("num_query_groups", teacher.num_query_groups)
    return targets


def cut(model: Any, sizes: Mapping[str, int], drop_layers: Sequence[int], importance: Importance | None) -> None:
    """Prune a model in place: widths (and depth, if `sizes` has num_layers) by importance, then the named layers.

    Args:
        importance: None if only layers are dropped.
    """
    if sizes:
        assert importance is not None
        mtp.prune(
            model,
            mode="mcore_minitron",
            constraints={"export_config": dict(sizes)},
            dummy_input=None,
            # Replaces the forward passes over calibration text, which produced these scores.
            config={"forward_loop": lambda space: restore_scores(importance, dynamic_core(space))},
        )
    if drop_layers:
        mtp.plugins.drop_mcore_language_model_layers(model, layers_to_drop=list(drop_layers))


def save(trainer: Any, folder: Path) -> None:
    """Write a pruned model as a NeMo checkpoint.

    Upstream's function records the sizes of dense models only in the context
    (nemo/collections/llm/modelopt/prune/pruner.py:132).
    """
    for name in EXPERT_AXES:
        if hasattr(trainer.model.config, name):
            setattr(trainer.model.__io__.config, name, getattr(trainer.model.config, name))
    save_pruned_model(trainer, str(folder))


def save_candidate(row: dict[str, Any], teacher: Path, scores: Any, stages: int, out: Path) -> None:
    """Prune the teacher to a candidate and write it to `out/<name>`, unless it exists.

    ModelOpt prunes on the ranks of a single pipeline: with several replicas it sends one rank's sizes to all ranks
    (modelopt/torch/nas/plugins/megatron.py:1381). So the search, which runs on one pipeline, writes the candidates.

    Args:
        row: a row of the candidates' table.
        teacher: a NeMo checkpoint.
        stages: pipeline stages that the teacher is divided into.
    """
    target, partial = out / name_of(row), out / f".{name_of(row)}"
    if target.exists():
        return
    model, trainer = nemo_api.restore(teacher, pipeline_model_parallel_size=stages, modelopt_spec=True)
    cut(model, complete_sizes({axis: row[axis] for axis in AXES[1:]}, model.config), row["drop_layers"], scores)
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.strategy.barrier()
    save(trainer, partial)
    trainer.strategy.barrier()
    if rank() == 0:
        partial.rename(target)
    trainer.strategy.barrier()
