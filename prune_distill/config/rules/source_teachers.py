"""Rules of the teachers of single sources of the data (`data.sources.NAME.teacher`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from prune_distill.config.rule import Finding, Rule, rule
from prune_distill.config.rules import fp8, model, training
from prune_distill.config.values import named_source_teachers
from prune_distill.schema import MOST_SOURCE_TEACHERS, Loss, RunConfig, TeacherConfig, TeacherLogits

# Rules of the run's teacher that concern settings of the run, or a teacher that runs next to the student.
OF_RUN = ("teacher.source", "teacher.layout", "teacher.vocabulary")
# Rules that do not concern a teacher in the distillation's layout, which has rules of its own.
OF_OWN_LAYOUT = ("teacher.parallel", "training.ranks")
SIZES = tuple(f"distill.parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline"))


def _named(cfg: RunConfig) -> dict[str, TeacherConfig]:
    """The teachers by key. A dot in the name of a source is refused anyway."""
    return {at: teacher for at, teacher in named_source_teachers(cfg).items() if at.count(".") == 3}


def _follow(cfg: RunConfig, followed: Rule) -> Iterator[Finding]:
    """Yield what a rule of the run's teacher finds with each teacher of single sources in its place."""
    for at, teacher in _named(cfg).items():
        if teacher.hf_path is None or teacher.shape is None:
            continue
        inherits = teacher.parallel is None
        if inherits:
            parallel = cfg.distill.parallel
            alone = dataclasses.replace(parallel, context_parallel_size=1, expert_model_parallel_size=1)
            own = dataclasses.replace(cfg, teacher=dataclasses.replace(teacher, parallel=alone))
        else:
            own = dataclasses.replace(cfg, teacher=teacher)
        if followed.applies_to(own) and not (inherits and followed.id in OF_OWN_LAYOUT):
            yield from (_rename(finding, at, inherits) for finding in followed.check(own))


def _rename(finding: Finding, at: str, inherits: bool) -> Finding:
    """Replace the run's keys by those of a teacher of single sources; its layout may be the distillation's."""

    def rename(text: str) -> str:
        if inherits:
            text = re.sub(r"(?<![\w.])teacher\.parallel", "distill.parallel", text)
        text = re.sub(r"(?<![\w.])teacher(?=\.)", at, text)
        return text.replace("the teacher's", f"{at}'s")

    return dataclasses.replace(finding, key=rename(finding.key), text=rename(finding.text))


def _rules_to_follow() -> Iterator[Rule]:
    """Yield the rules of the run's teacher: of its group, and of the layout in which it is cached."""
    values: list[Any] = [value for module in (model, training, fp8) for value in vars(module).values()]
    for one in (one for value in values for one in (value if isinstance(value, list) else [value])):
        if not isinstance(one, Rule) or one.id in OF_RUN:
            continue
        if one.id.startswith("teacher.") or any(read.startswith("teacher.parallel.") for read in one.reads):
            yield one


def _following(followed: Rule) -> Rule:
    group, _, name = followed.id.rpartition(".")
    # A layout that is searched must divide these teachers too (prune_distill.config.validate.layout_faults).
    own = f"training.source_teacher_{name}" if group == "training" else f"source_teacher.{name}"
    reads = [read for read in followed.reads if not read.startswith("teacher.")]
    check = partial(_follow, followed=followed)
    return Rule(own, ("data.sources", "teacher?", *SIZES, *reads), check, followed.on_machine)


FOLLOWING = list(map(_following, _rules_to_follow()))


@rule("source_teacher.source", "data.sources", "teacher")
def source(cfg: RunConfig) -> Iterator[Finding]:
    for at, teacher in _named(cfg).items():
        if teacher.hf_path is None:
            fix = f"set {at}.hf_path to the teacher's folder or Hub id, or {at}=null"
            yield Finding(f"{at}.hf_path", f"names no teacher; {fix}")
    count = len(cfg.source_teachers)
    if count > MOST_SOURCE_TEACHERS:
        yield Finding(
            "data.sources",
            f"their sources have {count} teachers of their own, and a run at most {MOST_SOURCE_TEACHERS}; give some"
            " sources the same one",
        )
    if cfg.has_own_teacher and _all_have_teachers(cfg):
        problem = "teaches nothing, as each source has another teacher"
        yield Finding("teacher.hf_path", f"{problem}; set teacher.hf_path=null")


@rule(
    "source_teacher.supported",
    *("data.sources", "teacher", "distill.loss", "distill.teacher_logits", "distill.on_policy?"),
    *("distill.teacher_correction?", "prune.successive_halving?", "prune.rounds"),
)
def supported(cfg: RunConfig) -> Iterator[Finding]:
    """Refuse what has one teacher, or one that runs next to the student."""
    keys, distill = list(_named(cfg)), cfg.distill
    if not keys:
        return
    if distill.loss is Loss.ce:
        yield Finding(keys[0], f"distill.loss=ce uses no teacher; set {keys[0]}=null")
    unsupported = {
        "distill.teacher_logits": (
            distill.teacher_logits is TeacherLogits.live and distill.loss is Loss.kd,
            "live runs one teacher next to the student",
            "cached",
        ),
        "distill.on_policy": (
            distill.on_policy is not None,
            "no source says which teacher scores the student's completions",
            "null",
        ),
        "prune.successive_halving": (
            cfg.prune.successive_halving is not None,
            "its candidates learn from one teacher next to them",
            "null",
        ),
        "prune.rounds": (bool(cfg.prune.rounds), "their students learn from one teacher next to them", "[]"),
        "distill.teacher_correction": (
            distill.teacher_correction is not None and _all_have_teachers(cfg),
            "it trains the teacher of the run, which teaches nothing, as each source has another one",
            "null",
        ),
    }
    for key, (is_set, problem, value) in unsupported.items():
        if is_set:
            fix = f"set {key}={value}, or the teachers of the sources to null ({', '.join(keys)})"
            yield Finding(key, f"{problem}; {fix}")


def _all_have_teachers(cfg: RunConfig) -> bool:
    return bool(cfg.source_teachers) and 0 not in cfg.teacher_numbers.values()
