"""torchrun -m recipes prune --config RUN_DIR/resolved.yaml

Minitron pruning with ModelOpt: remove the least important channels, heads and layers of the teacher. The stage
`importance` computed the scores; for a config with a budget, `search` or `successive_halving` chose the
sizes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_distill.data.folder import DataFolder
from prune_distill.model.student import AXES, EXPERT_AXES
from prune_distill.nemo import backend, nemo_api
from prune_distill.pipeline.artifact import read_manifest, write_json
from prune_distill.pipeline.names import CHOICE, NEMO
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import rank
from prune_distill.pruning import cutting, layer_sets
from prune_distill.pruning.importance import Importance
from prune_distill.pruning.losses import calibration_batches
from prune_distill.schema import LayerSelection, RunConfig


@dataclass(frozen=True)
class Inputs:
    """The model to prune, prepared data, and what determines the pruning.

    Attributes:
        teacher: NeMo checkpoint of the teacher, or of the model that the previous round distilled.
        importance: None if the config names the dropped layers, or they are chosen as a block.
        choice: folder of the search or successive halving that chose the sizes.
        before: folder of the pruning of the previous round.
    """

    teacher: Path
    data: Path
    importance: Path | None = None
    choice: Path | None = None
    before: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `nemo/`, the student before distillation; `blocks.json` if a block of layers was chosen."""
    prune, device = cfg.prune, backend.activate().device
    sizes: dict[str, Any] = {name: getattr(prune, name) for name in (*AXES, *EXPERT_AXES)}
    drop_layers = list(prune.drop_layers or ())
    if inputs.choice is not None:
        choice = json.loads((inputs.choice / CHOICE).read_text())
        sizes, drop_layers = {name: choice[name] for name in AXES[1:]}, choice["drop_layers"]
    model, trainer = nemo_api.restore(
        inputs.teacher,
        pipeline_model_parallel_size=prune.pipeline_model_parallel_size,
        tensor_model_parallel_size=prune.tensor_model_parallel_size,
        modelopt_spec=True,
    )
    core = nemo_api.core_model(model)
    teacher_params = nemo_api.count_parameters(core)
    nemo_api.number_layers(core)
    if prune.layer_selection is LayerSelection.block and sizes.get("num_layers"):
        length = core.config.num_layers - sizes.pop("num_layers")
        batches = calibration_batches(DataFolder.read(inputs.data), prune, prune.block_samples, cfg.seed, device)
        blocks = layer_sets.list_blocks(core.config.num_layers, length)
        losses = layer_sets.compute_ablation_losses(core.eval(), batches, blocks)
        drop_layers = blocks[losses.index(min(losses))]
        if rank() == 0:
            by_first = {block[0]: loss for block, loss in zip(blocks, losses, strict=True)}
            write_json(out / "blocks.json", {"length": length, "loss_without_block_from_layer": by_first})
    scores = Importance.load(inputs.importance, device) if inputs.importance is not None else None
    cutting.cut(model, cutting.complete_sizes(sizes, core.config), drop_layers, scores)
    metrics: Metrics = {
        "params_before": teacher_params,
        "params": nemo_api.count_parameters(core),
        "kept_layers": _in_teacher_numbering(nemo_api.kept_layers(core), inputs.before),
    }
    if rank() == 0:
        shutil.rmtree(out / NEMO, ignore_errors=True)
    trainer.strategy.barrier()
    cutting.save(trainer, out / NEMO)
    return metrics


def _in_teacher_numbering(layers: list[int], before: Path | None) -> list[int]:
    """Convert layer numbers of the model from the previous round to those of the teacher."""
    if before is None:
        return layers
    manifest = read_manifest(before)
    assert manifest is not None  # stages only start with complete inputs
    return [manifest["metrics"]["kept_layers"][layer - 1] for layer in layers]
