"""torchrun --nproc_per_node 8 -m recipes correct_teacher --config RUN_DIR/resolved.yaml

Teacher correction: train the teacher as a language model on the distillation data, which adapts it to these
data (Minitron in practice, arXiv 2408.11796, section 2). The student is pruned from the original teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prune_distill.data.folder import DataFolder
from prune_distill.nemo import nemo_api
from prune_distill.pipeline.metrics_file import loss_gain
from prune_distill.pipeline.names import METRICS
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.schema import RunConfig
from prune_distill.training.training import train


@dataclass(frozen=True)
class Inputs:
    """The teacher as a NeMo checkpoint, and prepared data."""

    teacher: Path
    data: Path


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `nemo/`, the corrected teacher; `metrics.jsonl`; `checkpoints/`.

    The metrics contain the held-out loss (nats per token) before and after, on the same batches.
    """
    correction = cfg.distill.teacher_correction
    assert correction is not None  # otherwise the stage is not part of the run
    teacher = nemo_api.load_model(inputs.teacher)
    data = DataFolder.read(inputs.data)
    key = "distill.teacher_correction"
    metrics = train(teacher, correction, data, out, seed=cfg.seed, start=inputs.teacher, key=key, validate_first=True)
    return {**metrics, **loss_gain(out / METRICS)}
