"""python -m recipes evaluate --config RUN_DIR/resolved.yaml
torchrun --nproc_per_node 8 -m recipes evaluate --config RUN_DIR/resolved.yaml

Evaluate the Hugging Face models of a run, which users will deploy, with plain transformers: held-out loss,
agreement with the teacher, tasks of EleutherAI's lm-evaluation-harness, samples of text, and the checkpoints of the
distillation. Ranks share the work. An interrupted stage resumes with the missing measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.exporting import make_exporter
from prune_distill.data.folder import DataFolder
from prune_distill.evaluation import recovery
from prune_distill.evaluation.evaluator import TEACHER, Evaluator
from prune_distill.evaluation.references import find_references
from prune_distill.model.huggingface import local_folder
from prune_distill.nemo import ranks
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import EVALUATION, ROOM, SAMPLES, find_checkpoints
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import rank
from prune_distill.schema import RunConfig


@dataclass(frozen=True)
class Inputs:
    """Prepared data and models.

    Attributes:
        teacher: a Hugging Face folder, or a Hub id.
        original: the same of the model that is pruned, if it is not the teacher.
        models: Hugging Face folders of the other models, by name.
        checkpoints: checkpoints of the distillation, if its recovery is measured.
        task_folder: the user's task definitions and data.
    """

    data: Path
    teacher: Path | str
    models: dict[str, Path]
    original: Path | str | None = None
    checkpoints: Path | None = None
    task_folder: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `evaluation.json`, `samples.json`, `recovery.json`; `measured/`, one file per model and part."""
    teacher, original = find_references(cfg, inputs.teacher, inputs.original)
    # Not checked as models to convert: a quantized one is not.
    models = {name: local_folder(folder, None, weights=True, model=False) for name, folder in inputs.models.items()}
    # The stage of a control only needs the teacher for the agreement; that of the student measures the teacher.
    references = {TEACHER: teacher} if inputs.original is None else {TEACHER: teacher, "original": original}
    measured = {**references, **models} if "student" in models else models
    with ranks.join_process_group():
        data = DataFolder.read(inputs.data)
        evaluator = Evaluator(cfg, data, teacher, out, inputs.task_folder, original)
        results = {name: evaluator.measure(name, folder) for name, folder in measured.items()}
        if inputs.checkpoints is not None:
            _measure_checkpoints(evaluator, inputs.checkpoints, cfg, original, out)
    if rank() == 0:
        write_json(out / SAMPLES, evaluator.samples(list(measured)))
        write_json(out / EVALUATION, results)
    return results


def _measure_checkpoints(evaluator: Evaluator, checkpoints: Path, cfg: RunConfig, original: Path, out: Path) -> None:
    export = make_exporter(cfg, original)
    for step, checkpoint in find_checkpoints(checkpoints).items():
        recovery.measure_checkpoint(evaluator, recovery.measurement_name(step), checkpoint, out / ROOM, export)
    if rank() == 0:
        recovery.write(evaluator, cfg.distill, out)
