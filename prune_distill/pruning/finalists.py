"""The candidates that go to the tournament, each cut and saved as a NeMo checkpoint.

ModelOpt prunes on the ranks of one pipeline only: with several replicas its search space breaks apart, as one rank's
sizes are sent to all (modelopt/torch/nas/plugins/megatron.py:1381). So it is done where the search is, before the
tournament takes all ranks.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import torch

from prune_distill.model.student import AXES
from prune_distill.pipeline.stage_main import rank


def name_of(row: dict[str, Any]) -> str:
    """A folder's name: layers, hidden size, FFN, heads, query groups, and every layer dropped."""
    sizes = [f"{letter}{row[axis]}" for letter, axis in zip("lhfaq", AXES, strict=True)]
    return "-".join(["candidate", *sizes, *(f"d{layer}" for layer in row["drop_layers"])])


def leave(row: dict[str, Any], teacher: Path, scores: Any, stages: int, out: Path) -> None:
    """Leaves a candidate, not yet trained, in `out/<name>`; nothing happens where it is.

    Args:
        row: of the candidates' table.
        teacher: a NeMo checkpoint; `stages`: the pipeline stages that it is spread over.
    """
    from prune_distill.nemo import nemo_api
    from prune_distill.pruning.cutting import cut, save, sizes_for_modelopt

    target, partial = out / name_of(row), out / f".{name_of(row)}"
    if target.exists():
        return
    model, trainer = nemo_api.restore(teacher, pipeline_model_parallel_size=stages, modelopt_spec=True)
    cut(model, sizes_for_modelopt({axis: row[axis] for axis in AXES[1:]}, model.config), row["drop_layers"], scores)
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.strategy.barrier()
    save(trainer, partial)
    trainer.strategy.barrier()
    if rank() == 0:
        partial.rename(target)
    trainer.strategy.barrier()


def release() -> None:
    """Frees the model that was at work, which is held by cycles, before the next one comes."""
    gc.collect()
    torch.cuda.empty_cache()
