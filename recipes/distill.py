"""torchrun --nproc_per_node 8 -m recipes.distill --config RUN_DIR/resolved.yaml [--stage distill.ce]

Distillation: the pruned student learns the teacher's next-token distribution (`distill.kd` says by which loss). The
controls train the same shape on the same tokens without a teacher: `distill.ce` from the pruned weights,
`distill.scratch` from random ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema import Init, KdConfig, Loss, RunConfig
from conf.validate import meter
from recipes.runtime.stage_main import stage_main


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: student, data and, with a teacher's loss, teacher (NeMo checkpoints).

    Output: `nemo/`, the student as its own model class; `metrics.jsonl`; `checkpoints/`.
    """
    from recipes.runtime import backend

    backend.activate()
    from recipes.runtime import nemo_api
    from recipes.runtime.data.folder import DataFolder
    from recipes.runtime.distillation import distilled_model, student_model
    from recipes.runtime.tokenizer_check import check_tokenizers
    from recipes.runtime.training import train

    student = nemo_api.load_model(inputs["student"])
    if cfg.distill.loss is Loss.kd:
        check_tokenizers(inputs["student"], inputs["teacher"])
        teacher = nemo_api.load_model(inputs["teacher"])
        nemo_api.match_vocabularies(student.config, teacher.config)
        nemo_api.match_precision(teacher.config, cfg.distill.precision)
        model = distilled_model(student, teacher, inputs["teacher"], cfg.distill.kd)
    else:
        chunk_tokens = cfg.distill.kd.chunk_tokens
        model = student_model(student, KdConfig(kd_weight=0.0, lm_weight=1.0, chunk_tokens=chunk_tokens))
    data = DataFolder.read(inputs["data"])
    start = inputs["student"] if cfg.distill.init is Init.pruned else None
    return train(model, cfg.distill, data, out, seed=cfg.seed, start=start, meter=meter(cfg))


if __name__ == "__main__":
    stage_main(run, "distill")
