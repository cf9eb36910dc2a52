"""Cutting a model down to a shape with ModelOpt, by importance that was measured before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp
from nemo.collections.llm.modelopt.prune.pruner import save_pruned_model

from prune_distill.model.student import AXES, EXPERT_AXES
from prune_distill.pruning.importance import Importance
from prune_distill.pruning.search_space import dynamic_core, restore_scores


def sizes_for_modelopt(sizes: Mapping[str, int | None], teacher: Any) -> dict[str, int]:
    """The sizes that are asked for. ModelOpt wants heads and query groups together: the one not named keeps its size.

    Args:
        sizes: by name of `prune_distill.model.student.AXES` and `EXPERT_AXES`; None or absent keeps the teacher's.
        teacher: its Megatron config.
    """
    targets = {name: value for name in (*AXES, *EXPERT_AXES) if (value := sizes.get(name)) is not None}
    if "num_attention_heads" in targets or "num_query_groups" in targets:
        targets.setdefault("num_attention_heads", teacher.num_attention_heads)
        targets.setdefault("num_query_groups", teacher.num_query_groups)
    return targets


def cut(model: Any, sizes: Mapping[str, int], drop_layers: Sequence[int], importance: Importance | None) -> None:
    """Prunes a model in place: widths (and depth, if `sizes` has num_layers) by importance, then the layers named.

    Args:
        importance: None where only layers are named.
    """
    if sizes:
        assert importance is not None
        mtp.prune(
            model,
            mode="mcore_minitron",
            constraints={"export_config": dict(sizes)},
            dummy_input=None,
            # In the place of the forward passes over calibration text, which left these scores.
            config={"forward_loop": lambda space: restore_scores(importance, dynamic_core(space))},
        )
    if drop_layers:
        mtp.plugins.drop_mcore_language_model_layers(model, layers_to_drop=list(drop_layers))


def save(trainer: Any, folder: Path) -> None:
    """Leaves a pruned model as a NeMo checkpoint. Upstream's records the sizes of dense models only in its context
    (nemo/collections/llm/modelopt/prune/pruner.py:132)."""
    for name in EXPERT_AXES:
        if hasattr(trainer.model.config, name):
            setattr(trainer.model.__io__.config, name, getattr(trainer.model.config, name))
    save_pruned_model(trainer, str(folder))
