"""First gradients of a mixture's distillation by several losses, for one run of the stage `distill`.

Each variant takes one step; Adam's first moments are then the clipped gradients times 1 - beta1, by which two variants
are compared: experts have an optimizer of their own under expert parallelism, but not on one rank.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, cast

from prune_distill.nemo import backend
from prune_distill.pipeline.run_arguments import StageModule
from prune_distill.schema import LossImplementation, RunConfig
from recipes.__main__ import main
from tests.helpers.tiny import DistillInputs as Inputs

# By name: whose loss, and the weight of the router's auxiliary loss (None: as the checkpoint has it).
VARIANTS: dict[str, tuple[LossImplementation, float | None]] = {
    "ours": (LossImplementation.chunked, None),
    "upstream": (LossImplementation.upstream, None),
    "ours_without": (LossImplementation.chunked, 0.0),
    "ours_doubled": (LossImplementation.chunked, 2e-3),
}


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Write `gradients.json`: the coefficient, and of each variant the largest difference from `ours`, over its
    largest value, of all gradients and of the routers' alone."""
    backend.activate()
    from prune_distill.pruning import finalists

    moments: dict[str, dict[str, Any]] = {}
    for name in VARIANTS:
        moments[name], coefficient = _first_moments(cfg, inputs, out / name, *VARIANTS[name])
        finalists.release()
        if name == "ours":
            found: dict[str, Any] = {"coefficient": coefficient}
    for name in VARIANTS:
        found[name] = {part: _difference(moments["ours"], moments[name], part) for part in ("", "router")}
    (out / "gradients.json").write_text(json.dumps(found))
    return {}


def _first_moments(
    cfg: RunConfig, inputs: Inputs, out: Path, loss: LossImplementation, coefficient: float | None
) -> tuple[dict[str, Any], float]:
    from lightning.pytorch.callbacks import Callback

    from prune_distill.data.folder import DataFolder
    from prune_distill.distillation.distillation import student_to_train
    from prune_distill.nemo.nemo_api import core_model
    from prune_distill.training.training import train

    kd = dataclasses.replace(cfg.distill.kd, implementation=loss)
    # Without the distributed optimizer the moments have their parameters' shapes.
    distill = dataclasses.replace(
        cfg.distill, max_steps=1, warmup_steps=0, kd=kd, use_distributed_optimizer=False, overlap_param_gather=False
    )
    model = student_to_train(distill, inputs.student, inputs.teacher)
    config: Any = model.config
    if coefficient is not None:
        config.moe_aux_loss_coeff = coefficient
    moments: dict[str, Any] = {}

    class Moments(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            (optimizer,) = trainer.optimizers
            state = optimizer.mcore_optimizer.optimizer.state
            for name, parameter in core_model(pl_module).named_parameters():
                if parameter in state:
                    moments[name] = state[parameter]["exp_avg"].clone()

    data = DataFolder.read(inputs.data)
    train(model, distill, data, out, seed=cfg.seed, start=inputs.student, callbacks=[Moments()])
    return moments, float(config.moe_aux_loss_coeff)


def _difference(ours: dict[str, Any], theirs: dict[str, Any], part: str) -> float:
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if part in name]
    most = max(float(ours[name].abs().max()) for name in names)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in names) / most


if __name__ == "__main__":
    main(lambda stage: cast(StageModule, sys.modules[__name__]))
