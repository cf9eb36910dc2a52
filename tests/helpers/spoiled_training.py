"""`recipes.distill` with weights that are corrupted before one batch: environment variable SPOILED="STEP FACTOR".

The batch is the one that the step, counted from 1, takes unless it is passed over. FACTOR multiplies the final norm's
weights before that batch's forward pass: a large one makes the loss explode, `nan` makes it NaN.
"""

from __future__ import annotations

import os
from typing import Any

from prune_distill.pipeline.stage import Stage
from recipes.__main__ import load_stage, main


def load(stage: Stage) -> Any:
    """`recipes.distill` with one more callback."""
    module = load_stage(stage)
    from prune_distill.training import training

    make_trainer = training._trainer
    training._trainer = lambda cfg, callbacks: make_trainer(cfg, [*callbacks, _spoil()])
    return module


def _spoil() -> Any:
    import torch
    from lightning.pytorch.callbacks import Callback

    from prune_distill.nemo.nemo_api import core_model

    step, factor = os.environ["SPOILED"].split()
    index = int(step) - 1

    class Spoil(Callback):
        """Corrupts the weights before the step's own batch, not before a spare batch."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches = trainer.datamodule
            own_batch = index not in batches.spares
            if trainer.global_step == index and own_batch:
                with torch.no_grad():
                    core_model(pl_module).decoder.final_layernorm.weight.mul_(float(factor))

    return Spoil()


if __name__ == "__main__":
    main(load)
