"""What a plan says in sentences: warnings about the run, and what to set where it does not fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

from launch.planning.disk import FIX, Disk
from launch.planning.layouts import Layout, Task, fitting
from prune_distill.config.values import cached_share
from prune_distill.model.model_size import parameters
from prune_distill.model.student import shape_to_prune, student_shape
from prune_distill.pipeline.stages import select_stages
from prune_distill.schema import RunConfig

# Beyond it, prune and distill twice (Minitron's advice: at most a third a round, no more than half).
LARGEST_CUT = 0.5
SHORTEST_SEQUENCE = 256
# For stages whose layouts are not searched.
FIXES = {
    "prune": "raise prune.pipeline_model_parallel_size, or lower prune.calibration_seq_length or "
    "prune.micro_batch_size",
    "correct_teacher": "for correct_teacher raise the sizes of distill.teacher_correction.parallel, set "
    "distill.teacher_correction.recompute=full, or lower distill.teacher_correction.micro_batch_size",
    "cache_logits": "for cache_logits lower teacher.micro_batch_size, or raise "
    "teacher.parallel.tensor_model_parallel_size",
}


def warnings(cfg: RunConfig, disk: Disk) -> list[str]:
    """What a run should not start with, in sentences."""
    shapes = [shape_to_prune(cfg, number) for number in range(len(cfg.prune.rounds) + 1)] + [student_shape(cfg)]
    sizes = [parameters(shape, cfg.model.family) for shape in shapes]
    cuts = [1 - after / before for before, after in itertools.pairwise(sizes)]
    found = [
        f"pruning removes {cut:.0%} of the parameters in round {number} of {len(cuts)}; "
        f"beyond {LARGEST_CUT:.0%} prune and distill a model in between first (prune.rounds), and prune that "
        f"one: {_in_rounds(cut)}"
        for number, cut in enumerate(cuts, 1)
        if cut > LARGEST_CUT
    ]
    found += [*_repeated_completions(cfg), *_unknown_shares(cfg)]
    return found if disk.has_room else [*found, f"{disk.describe(cfg.run_dir)}; {FIX}"]


def _repeated_completions(cfg: RunConfig) -> list[str]:
    """Report on-policy rounds that read more sequences than their completions can fill, if the prompts' length is
    known."""
    distill, on_policy = cfg.distill, cfg.distill.on_policy
    if on_policy is None or on_policy.prompts is not None:
        return []
    length = on_policy.prompt_tokens + on_policy.max_new_tokens + 1
    filled = on_policy.prompts_per_round * on_policy.samples_per_prompt * length / distill.seq_length
    times = on_policy.steps * distill.global_batch_size * on_policy.mix / filled
    if times <= 1:
        return []
    fix = "raise distill.on_policy.prompts_per_round or samples_per_prompt, or lower distill.on_policy.steps"
    return [f"on-policy rounds read each completion {times:.1f} times or more; {fix}"]


def _unknown_shares(cfg: RunConfig) -> list[str]:
    """Report stages whose share of the sequences is not known before their documents are prepared."""
    stages = [stage for stage in select_stages(cfg) if stage.module == "recipes.cache_logits"]
    unknown = [stage.name for stage in stages if cached_share(stage.configure(cfg)) is None]
    if not unknown:
        return []
    return [
        f"the hours of {' and '.join(unknown)} are those of all sequences, an upper limit, as the share of each source"
        " is not known; set the sources' weights"
    ]


def _in_rounds(cut: float) -> str:
    """Rounds of equal shares, each within Minitron's advice of a third."""
    count = math.ceil(math.log(1 - cut) / math.log(2 / 3) - 1e-9)
    share = (1 - cut) ** (1 / count)
    shares = " -> ".join(f"{share**number:.0%}" for number in range(1, count + 1))
    return f"{count} rounds that each leave {math.ceil(share * 100) / 100:.0%} ({shares} of the parameters)"


def suggest_fix(task: Task, layouts: Sequence[Layout], stages: Collection[str], limit: float) -> str:
    """What to set so that all fits: the best layout, or else a shorter sequence; for pruning more pipeline stages.

    Args:
        task: the distillation.
        layouts: those that fit, best first.
        stages: those that need more than `limit` bytes of a rank.
    """
    parts = []
    if "distill" in stages:
        parts.append("set " + _changes(task, layouts[0]) if layouts else suggest_shorter(task, limit))
    kinds = {stage.partition(".")[0] for stage in stages}
    return "; ".join([*parts, *(fix for kind, fix in FIXES.items() if kind in kinds)])


def _changes(task: Task, layout: Layout) -> str:
    present = task.layout().overrides
    return " ".join(f"{key}={value}" for key, value in layout.overrides.items() if present[key] != value)


def suggest_shorter(task: Task, limit: float) -> str:
    """Halves the sequences until a layout fits."""
    length = task.training.seq_length
    while (length := length // 2) >= SHORTEST_SEQUENCE:
        shorter = task.replace(seq_length=length)
        layouts = fitting(shorter, limit)
        if layouts:
            changes = f"{task.key}.seq_length={length} {_changes(shorter, layouts[0])}".rstrip()
            return f"no layout fits sequences of {task.training.seq_length} tokens: set {changes}"
    return f"no layout of {task.ranks} ranks fits: take more GPUs, or GPUs of more memory"
