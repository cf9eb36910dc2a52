"""torchrun --nproc_per_node 8 -m recipes.distill --config RUN_DIR/resolved.yaml [--stage distill.ce]

Distillation: the pruned student learns the teacher's next-token distribution (KL divergence on the logits). The
control `distill.ce` trains the same student on the same tokens without a teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema import KdConfig, Loss, RunConfig
from recipes.runtime.stage_main import stage_main


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: student, data and, with a teacher's loss, teacher (NeMo checkpoints) or its stored signal;
    corrected_teacher, where that one takes the teacher's place at a step.

    Output: `nemo/`, the student as its own model class; `metrics.jsonl`; `checkpoints/`.
    """
    from recipes.runtime import backend

    backend.activate()
    from recipes.runtime import nemo_api
    from recipes.runtime.data.folder import DataFolder
    from recipes.runtime.distillation import distilled_model, student_model
    from recipes.runtime.signal import SignalReader
    from recipes.runtime.teacher_swap import TeacherSwap
    from recipes.runtime.training import train

    student = nemo_api.load_model(inputs["student"])
    signal = None
    if cfg.distill.reads_signal:
        signal = SignalReader(inputs["signal"])
        signal.require(temperature=cfg.distill.kd.temperature, vocab_size=student.config.vocab_size)
        model = student_model(student, cfg.distill.kd)
    elif cfg.distill.loss is Loss.kd:
        teacher = nemo_api.load_model(inputs["teacher"])
        nemo_api.match_vocabularies(student.config, teacher.config)
        nemo_api.match_precision(teacher.config, cfg.distill.precision)
        model = distilled_model(student, teacher, inputs["teacher"], cfg.distill.kd)
    else:
        chunk_tokens = cfg.distill.kd.chunk_tokens
        model = student_model(student, KdConfig(kd_weight=0.0, lm_weight=1.0, chunk_tokens=chunk_tokens))
    data = DataFolder.read(inputs["data"])
    swap = cfg.distill.swap_teacher_at_step
    swaps = [] if swap is None else [TeacherSwap(inputs["corrected_teacher"], swap)]
    start = inputs["student"]
    return train(model, cfg.distill, data, out, seed=cfg.seed, start=start, signal=signal, callbacks=swaps)


if __name__ == "__main__":
    stage_main(run, "distill")
