"""Short trainings on masked data with different micro batch sizes, in one run of the stage `distill`.

All in one process, as importing NeMo takes longer than these trainings do.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, cast

from prune_distill.nemo import backend
from prune_distill.pipeline.run_arguments import StageModule
from prune_distill.schema import DistillConfig, LossImplementation, RunConfig
from recipes.__main__ import main
from tests.helpers.tiny import DistillInputs as Inputs

# Our distillation loss, upstream's, and that of a model that learns from the data alone.
KINDS = ("distilled", "upstream", "plain")
MICRO_BATCHES = (1, 4)


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Write `checkpoints/` and `metrics.jsonl` of each training to `out/<kind>/<micro batch size>`."""
    backend.activate()
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from prune_distill.pruning import finalists

    for kind in KINDS:
        for size in MICRO_BATCHES:
            training = dataclasses.replace(cfg.distill, micro_batch_size=size)
            _train(kind, training, inputs, out / kind / str(size), cfg.seed)
            destroy_num_microbatches_calculator()  # otherwise the next training would use this micro batch size
            finalists.release()
    return {}


def _train(kind: str, training: DistillConfig, inputs: Inputs, out: Path, seed: int) -> None:
    from prune_distill.data.folder import DataFolder
    from prune_distill.distillation.distillation import student_to_train
    from prune_distill.nemo import nemo_api
    from prune_distill.training.training import train

    if kind == "plain":
        model = nemo_api.load_model(inputs.student)
    else:
        implementation = LossImplementation.upstream if kind == "upstream" else LossImplementation.chunked
        kd = dataclasses.replace(training.kd, implementation=implementation)
        training = dataclasses.replace(training, kd=kd)
        model = student_to_train(training, inputs.student, inputs.teacher)
    out.mkdir(parents=True, exist_ok=True)
    train(model, training, DataFolder.read(inputs.data), out, seed=seed, start=inputs.student)


if __name__ == "__main__":
    main(lambda stage: cast(StageModule, sys.modules[__name__]))
