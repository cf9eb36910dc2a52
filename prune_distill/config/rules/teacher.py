"""Rules of the teacher's stored signal and of its correction (`distill.signal`, `distill.correct_teacher`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prune_distill.schema import Divergence, Loss, LossImplementation, RunConfig, TeacherSignal

Rule = Callable[[RunConfig], Iterator[str]]


def _signal(cfg: RunConfig) -> Iterator[str]:
    distill, shape = cfg.distill, cfg.model.shape
    kept = distill.signal_top_k
    if distill.signal is TeacherSignal.live:
        return
    if distill.loss is Loss.ce:
        yield "distill.signal=stored keeps what distill.loss=ce does not read; set distill.signal=live"
    lacking = {
        "divergence": (distill.kd.divergence is not Divergence.forward_kl, "forward_kl"),
        "top_k": (distill.kd.top_k is not None, f"null (what is kept of a teacher is distill.signal_top_k={kept})"),
        "intermediate_pairs": (bool(distill.kd.intermediate_pairs), "[]"),
        "implementation": (distill.kd.implementation is not LossImplementation.chunked, "chunked"),
    }
    for name in ("phases", "skip_steps"):
        if getattr(distill, name):
            yield (
                f"distill.{name} takes sequences of which distill.signal=stored keeps no signal; "
                f"set distill.{name}={'null' if name == 'phases' else '[]'}, or distill.signal=live"
            )
    for name, (asked, fix) in lacking.items():
        if asked:
            yield (
                f"distill.kd.{name} asks for what distill.signal=stored does not keep; set distill.kd.{name}={fix}, "
                "or distill.signal=live"
            )
    if shape is not None and kept >= shape.vocab_size:
        yield (
            f"distill.signal_top_k={kept} leaves nothing of the vocabulary of {shape.vocab_size}; "
            f"set distill.signal_top_k to at most {shape.vocab_size - 1}, such as 64"
        )


def _correct_teacher(cfg: RunConfig) -> Iterator[str]:
    distill = cfg.distill
    swap = distill.swap_teacher_at_step
    if distill.correct_teacher is not None and distill.loss is Loss.ce:
        yield "distill.correct_teacher trains a teacher that distill.loss=ce does not need; set it to null"
    if swap is None:
        return
    if distill.correct_teacher is None:
        yield (
            f"distill.swap_teacher_at_step={swap} brings in a corrected teacher, and distill.correct_teacher=null "
            "makes none; set distill.correct_teacher, or distill.swap_teacher_at_step=null"
        )
    if distill.signal is TeacherSignal.stored:
        yield (
            f"distill.swap_teacher_at_step={swap} changes a teacher that runs, and distill.signal=stored runs none; "
            "set distill.signal=live, or distill.swap_teacher_at_step=null"
        )
    if swap >= distill.max_steps:
        yield (
            f"distill.swap_teacher_at_step={swap} is not below distill.max_steps={distill.max_steps}; set "
            f"distill.swap_teacher_at_step to at most {distill.max_steps - 1}"
        )


RULES: tuple[Rule, ...] = (_signal, _correct_teacher)
