"""python -m recipes evaluate --config RUN_DIR/resolved.yaml
torchrun --nproc_per_node 8 -m recipes evaluate --config RUN_DIR/resolved.yaml

Quality of the Hugging Face models of a run, which are what users will deploy, in plain transformers: held-out loss,
agreement with the teacher, tasks of EleutherAI's lm-evaluation-harness, samples of text, and the checkpoints of the
distillation. Ranks share the work. Started again, it goes on with what is not measured yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.exporting import exporter
from prune_distill.data.folder import DataFolder
from prune_distill.evaluation import recovery
from prune_distill.evaluation.evaluator import TEACHER, Evaluator
from prune_distill.evaluation.holding import ROOM
from prune_distill.model.huggingface import local_folder
from prune_distill.nemo import ranks
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import find_checkpoints
from prune_distill.pipeline.processes import import_libraries
from prune_distill.pipeline.stage_main import rank
from prune_distill.schema import RunConfig

NO_MODELS = ("data", "checkpoints", "task_folder")


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: data, a Hugging Face folder (or Hub id) a model; checkpoints of the distillation, task_folder.

    Output: `evaluation.json`, `samples.json`, `recovery.json`; `measured/`, one file a model and part.
    """
    import_libraries("transformers.models.auto.modeling_auto")  # or a first model imports it, and more slowly
    models = {
        name: local_folder(source, cfg.model.revision if name == "teacher" else None, weights=True)
        for name, source in inputs.items()
        if name not in NO_MODELS
    }
    with ranks.join_process_group():
        data = DataFolder.read(inputs["data"])
        evaluator = Evaluator(cfg, data, models["teacher"], out, inputs.get("task_folder"))
        # The stage of a control needs the teacher for the agreement alone; the student's measures it.
        measured = {name: folder for name, folder in models.items() if name != TEACHER or "student" in models}
        results = {name: evaluator.measure(name, folder) for name, folder in measured.items()}
        if "checkpoints" in inputs:
            _measure_checkpoints(evaluator, inputs["checkpoints"], cfg, models["teacher"], out)
    if rank() == 0:
        write_json(out / "samples.json", evaluator.samples(list(measured)))
        write_json(out / "evaluation.json", results)
    return results


def _measure_checkpoints(evaluator: Evaluator, checkpoints: Path, cfg: RunConfig, teacher: Path, out: Path) -> None:
    export = exporter(cfg, teacher)
    for step, checkpoint in find_checkpoints(checkpoints).items():
        recovery.measure_checkpoint(evaluator, recovery.name_of(step), checkpoint, out / ROOM, export)
    if rank() == 0:
        recovery.write(evaluator, cfg.distill, out)
