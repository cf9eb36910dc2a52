"""torchrun -m recipes prune --config RUN_DIR/resolved.yaml

Minitron pruning with ModelOpt: the channels, heads and layers that matter least are cut from the teacher. Which do was
measured by stage `importance`; where the config gives a budget, the sizes were found by `search`, or by `tournament`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prune_distill.data.folder import DataFolder
from prune_distill.model.student import AXES, EXPERT_AXES
from prune_distill.nemo import backend, nemo_api
from prune_distill.pipeline.artifact import read_manifest, write_json
from prune_distill.pipeline.names import NEMO
from prune_distill.pipeline.stage_main import rank
from prune_distill.pruning import cutting, layer_sets
from prune_distill.pruning.importance import Importance
from prune_distill.pruning.losses import calibration_batches
from prune_distill.schema import Depth, RunConfig


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: teacher (a NeMo checkpoint, or what the round before has distilled), data; importance, unless only layers
    are named; choice, with a budget; before, the pruning of the round before.

    Output: `nemo/`, the student before distillation; `blocks.json` where a block of layers was chosen.
    """
    prune, device = cfg.prune, backend.activate().device
    sizes: dict[str, Any] = {name: getattr(prune, name) for name in (*AXES, *EXPERT_AXES)}
    drop_layers = list(prune.drop_layers or ())
    if "choice" in inputs:
        choice = json.loads((inputs["choice"] / "choice.json").read_text())
        sizes, drop_layers = {name: choice[name] for name in AXES[1:]}, choice["drop_layers"]
    model, trainer = nemo_api.restore(
        inputs["teacher"],
        pipeline_model_parallel_size=prune.pipeline_model_parallel_size,
        tensor_model_parallel_size=prune.tensor_model_parallel_size,
        modelopt_spec=True,
    )
    core = nemo_api.core_model(model)
    teacher_params = nemo_api.count_parameters(core)
    nemo_api.number_layers(core)
    if prune.depth is Depth.block and sizes.get("num_layers"):
        length = core.config.num_layers - sizes.pop("num_layers")
        batches = calibration_batches(DataFolder.read(inputs["data"]), prune, prune.block_samples, cfg.seed, device)
        blocks = layer_sets.list_blocks(core.config.num_layers, length)
        losses = layer_sets.compute_losses_without(core.eval(), batches, blocks)
        drop_layers = blocks[losses.index(min(losses))]
        if rank() == 0:
            by_first = {block[0]: loss for block, loss in zip(blocks, losses, strict=True)}
            write_json(out / "blocks.json", {"length": length, "loss_without_block_from_layer": by_first})
    scores = Importance.load(inputs["importance"], device) if "importance" in inputs else None
    cutting.cut(model, cutting.sizes_for_modelopt(sizes, core.config), drop_layers, scores)
    metrics: dict[str, Any] = {
        "params_before": teacher_params,
        "params": nemo_api.count_parameters(core),
        "kept_layers": _in_teacher_numbering(nemo_api.kept_layers(core), inputs.get("before")),
    }
    if rank() == 0:
        shutil.rmtree(out / NEMO, ignore_errors=True)
    trainer.strategy.barrier()
    cutting.save(trainer, out / NEMO)
    return metrics


def _in_teacher_numbering(layers: list[int], before: Path | None) -> list[int]:
    """Layers of what the round before left, by their numbers in the teacher."""
    if before is None:
        return layers
    manifest = read_manifest(before)
    assert manifest is not None  # stages start when their inputs are whole
    return [manifest["metrics"]["kept_layers"][layer - 1] for layer in layers]
