"""Short trainings on masked data in several layouts, for one run of the stage `distill`: each in a folder of its own.

All in one process a rank, as importing NeMo takes longer than these trainings do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from conf.schema import DistillConfig, LossImplementation, Parallel, RunConfig
from recipes.runtime.stage_main import stage_main, world_size

# By the number of ranks: micro batch size and parallel layout of each training.
LAYOUTS: dict[int, dict[str, tuple[int, Parallel]]] = {
    1: {"one_by_one": (1, Parallel()), "four_at_once": (4, Parallel())},
    2: {
        "dp2": (1, Parallel()),
        "dp2_two_at_once": (2, Parallel()),
        "cp2": (1, Parallel(context_parallel_size=2)),
        "tp2": (2, Parallel(tensor_model_parallel_size=2)),
        "pp2": (1, Parallel(pipeline_model_parallel_size=2)),
    },
}
# On one rank, by whose loss: the micro batch size is what they have in common with the layouts above.
KINDS = ("upstream", "plain")


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Leaves `checkpoints/` and `metrics.jsonl` of each training in `out/<kind>/<layout>`."""
    from recipes.runtime import backend

    backend.activate()
    from recipes.runtime.pruning import finalists

    for kind in ("distilled", *KINDS) if world_size() == 1 else ("distilled",):
        for name, (micro_batch_size, parallel) in LAYOUTS[world_size()].items():
            training = dataclasses.replace(cfg.distill, micro_batch_size=micro_batch_size, parallel=parallel)
            _train(kind, training, inputs, out / kind / name, cfg.seed)
            finalists.release()
    return {}


def _train(kind: str, training: DistillConfig, inputs: dict[str, Any], out: Path, seed: int) -> None:
    from recipes.runtime import nemo_api
    from recipes.runtime.data.folder import DataFolder
    from recipes.runtime.distillation import student_to_train
    from recipes.runtime.training import train

    if kind == "plain":
        model = nemo_api.load_model(inputs["student"])
    else:
        implementation = LossImplementation.upstream if kind == "upstream" else LossImplementation.chunked
        kd = dataclasses.replace(training.kd, implementation=implementation)
        training = dataclasses.replace(training, kd=kd)
        model = student_to_train(training, inputs["student"], inputs["teacher"])
    out.mkdir(parents=True, exist_ok=True)
    train(model, training, DataFolder.read(inputs["data"]), out, seed=seed, start=inputs["student"])


if __name__ == "__main__":
    stage_main(run, "distill")
