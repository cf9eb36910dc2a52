"""The plan of a run: what it will need, as one object (`launch.plan` says what its keys mean)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from launch import compute, disk
from launch.layouts import Layout, fitting, layout_of, undivided
from launch.memory import Memory, Models, prune_memory, signal_memory, training_memory
from prune_distill.config.values import count_ranks, tournament_rounds, tournament_steps
from prune_distill.errors import ConfigError
from prune_distill.model.flops import forward_flops, training_flops
from prune_distill.model.model_size import active_parameters, parameters
from prune_distill.model.student import shape_to_prune, student_shape, student_shapes
from prune_distill.pipeline.stages import select_stages
from prune_distill.schema import Gpu, Loss, RunConfig, Shape
from prune_distill.schema.phases import training_tokens
from prune_distill.units import GIB, seconds_of_time_limit

# Beyond it, prune and distil twice (Minitron's advice: at most a third a round, no more than half).
LARGEST_CUT = 0.5
SHORTEST_SEQUENCE = 256
# Of stages whose layouts are not searched.
FIXES = {
    "correct_teacher": "for correct_teacher raise the sizes of distill.correct_teacher.parallel, set "
    "distill.correct_teacher.recompute=full, or lower distill.correct_teacher.micro_batch_size",
    "teacher_signal": "for teacher_signal lower distill.micro_batch_size, or raise "
    "distill.parallel.tensor_model_parallel_size",
}


def make(cfg: RunConfig) -> dict[str, Any]:
    """The plan of a run whose config was checked, as the object that `--json` prints."""
    teacher = _teacher(cfg)
    student = student_shape(cfg)
    ranks = count_ranks(cfg)
    gpu = cfg.cluster.gpu
    models = _models(cfg)
    distilling = training_memory(cfg.distill, cfg.distill.loss, models, ranks)
    pruning = prune_memory(cfg.prune, teacher, cfg.model.family, disk.teacher_weight_bytes(cfg))
    flops = training_flops(cfg.distill, cfg.distill.loss, cfg.model.family, student, models.teacher)
    sizes = disk.bytes_needed(cfg, teacher)
    total, run_dir = sum(sizes.values()), Path(cfg.run_dir)
    room = {"total": total, "written": disk.written_bytes(run_dir), "free": disk.free_bytes(run_dir)}
    cut = 1 - parameters(student, cfg.model.family) / parameters(teacher, cfg.model.family)
    limit = gpu.memory_gib * GIB if gpu else math.inf
    layouts = fitting(cfg, models, ranks, limit) if gpu else []
    others = _other_memory(cfg, teacher, ranks)
    peaks = {"distill": _fullest(distilling), "prune": pruning}
    peaks |= {stage: _fullest(memory) for stage, memory in others.items()}
    fits = all(memory.total <= limit for memory in peaks.values())
    return {
        "experiment": cfg.name,
        "cluster": {**_cluster(cfg), "ranks": ranks},
        "models": {
            "teacher": _model(cfg, teacher),
            "student": _model(cfg, student),
            "candidates": _candidates(cfg),
            "cut": cut,
        },
        "training": {
            "steps": cfg.distill.max_steps,
            "tokens": training_tokens(cfg.distill),
            "tokens_a_step": training_tokens(cfg.distill) // cfg.distill.max_steps,
            "flops": training_tokens(cfg.distill) * flops.total,
            "flops_a_token": {**dataclasses.asdict(flops), "total": flops.total},
        },
        "signal": _signal(cfg, teacher, flops.total, sizes),
        "stages": _stages(cfg, student, teacher, ranks),
        "memory": {
            "distill": [_memory(memory) for memory in distilling],
            "prune": _memory(pruning),
            **{stage: [_memory(memory) for memory in memories] for stage, memories in others.items()},
        },
        "layout": _layout(layout_of(cfg.distill, cfg, models, ranks)),
        "layouts": [_layout(layout) for layout in layouts],
        "undivided": undivided(cfg, ranks),
        "disk": {**sizes, **room},
        "warnings": _warnings(cfg, cut, room),
        "fits": fits if gpu else None,
        "impossible": _impossible(peaks, gpu) if gpu else {},
        "fix": None if fits else _fix(cfg, layouts, peaks, limit),
    }


def _teacher(cfg: RunConfig) -> Shape:
    assert cfg.model.shape is not None  # prune_distill.config.load refuses a config without
    return cfg.model.shape


def _models(cfg: RunConfig) -> Models:
    return Models(cfg.model.family, student_shape(cfg), _teacher(cfg) if cfg.distill.runs_teacher else None)


def _other_memory(cfg: RunConfig, teacher: Shape, ranks: int) -> dict[str, list[Memory]]:
    """The memory of a rank of each pipeline stage, by stages of the run that have the teacher alone, and the
    distillations of rounds before the last, whose students are larger."""
    memory: dict[str, list[Memory]] = {}
    for stage in select_stages(cfg):
        if stage.module == "recipes.distill" and ".round" in stage.name:
            own = stage.configure(cfg)
            memory[stage.name] = training_memory(own.distill, own.distill.loss, _models(own), ranks)
    if cfg.distill.correct_teacher is not None:
        models = Models(cfg.model.family, teacher, None)
        memory["correct_teacher"] = training_memory(cfg.distill.correct_teacher, Loss.ce, models, ranks)
    if cfg.distill.reads_signal:
        memory["teacher_signal"] = [signal_memory(cfg.distill, teacher, cfg.model.family)]
    return memory


def _fullest(memory: list[Memory]) -> Memory:
    return max(memory, key=lambda rank: rank.total)


def _signal(cfg: RunConfig, teacher: Shape, student_flops: int, sizes: dict[str, int]) -> dict[str, Any] | None:
    """What a stored signal costs, and what each further student is spared; None where the teacher runs beside."""
    if not cfg.distill.reads_signal:
        return None
    flops = forward_flops(teacher, cfg.model.family, cfg.distill.seq_length)
    return {
        "top_k": cfg.distill.signal_top_k,
        "bytes": sizes["signal"],
        "flops_a_token": flops,
        "spared_share": flops / (flops + student_flops),
    }


def _cluster(cfg: RunConfig) -> dict[str, Any]:
    cluster, gpu = cfg.cluster, cfg.cluster.gpu
    stated = None
    if gpu is not None:
        stated = {
            "name": gpu.name,
            "memory_bytes": round(gpu.memory_gib * GIB),
            "bf16_flops": gpu.bf16_tflops * 1e12,
            "utilisation": gpu.utilisation,
        }
    return {
        "name": cluster.name,
        "nodes": cluster.nodes,
        "devices_per_node": cluster.devices_per_node,
        "gpu": stated,
        "time_limit": cluster.time_limit,
    }


def _model(cfg: RunConfig, shape: Shape) -> dict[str, Any]:
    family = cfg.model.family
    sizes = {"parameters": parameters(shape, family), "active_parameters": active_parameters(shape, family)}
    return {**sizes, **dataclasses.asdict(shape)}


def _candidates(cfg: RunConfig) -> dict[str, int] | None:
    """Of a search: how many shapes there are, and parameters of the smallest and largest; None without one."""
    if cfg.prune.budget is None:
        return None
    sizes = [parameters(shape, cfg.model.family) for shape in student_shapes(cfg)]
    return {"shapes": len(sizes), "least": min(sizes), "most": max(sizes)}


def _memory(memory: Memory) -> dict[str, int]:
    return {**dataclasses.asdict(memory), "reserve": memory.reserve, "total": memory.total}


def _layout(layout: Layout) -> dict[str, Any]:
    return {**dataclasses.asdict(layout), "recompute": layout.recompute.value}


def _stages(cfg: RunConfig, student: Shape, teacher: Shape, ranks: int) -> list[dict[str, Any]]:
    """Every stage of the run, with hours where they can be estimated."""
    calibrating = cfg.prune.pipeline_model_parallel_size
    flops: dict[str, tuple[float, int]] = {}
    if cfg.prune.budget is not None:
        scoring = compute.search_flops(cfg.prune, cfg.model.family, teacher, student_shapes(cfg))
        flops["search"] = (scoring, calibrating)
    if cfg.prune.tournament is not None:
        beside = teacher if cfg.distill.loss is Loss.kd else None
        a_token = training_flops(cfg.distill, cfg.distill.loss, cfg.model.family, student, beside).total
        share = tournament_steps(cfg) / cfg.distill.max_steps
        flops["tournament"] = (training_tokens(cfg.distill) * share * a_token, ranks)
    for stage in select_stages(cfg):
        own = stage.configure(cfg)
        if stage.module == "recipes.importance":
            round_flops = compute.calibration_flops(own.prune, cfg.model.family, shape_to_prune(own))
            flops[stage.name] = (round_flops, calibrating)
        if stage.module == "recipes.distill":
            run = own.distill
            beside = teacher if run.runs_teacher else None
            a_token = training_flops(run, run.loss, cfg.model.family, student_shape(own), beside).total
            # The winner of a tournament goes on from there.
            taken = tournament_rounds(cfg)[-1][1] if "begun" in stage.inputs(own) else 0
            flops[stage.name] = (training_tokens(run) * (1 - taken / run.max_steps) * a_token, ranks)
    forward = forward_flops(teacher, cfg.model.family, cfg.distill.seq_length)
    flops["teacher_signal"] = (training_tokens(cfg.distill) * forward, ranks)
    correction = cfg.distill.correct_teacher
    if correction is not None:
        a_token = training_flops(correction, Loss.ce, cfg.model.family, teacher, None).total
        flops["correct_teacher"] = (training_tokens(correction) * a_token, ranks)
    rows = []
    for stage in select_stages(cfg):
        # Pipeline stages of the calibration wait for one another: no faster than one rank.
        amount, held = flops.get(stage.name, (0.0, stage.ranks(cfg)))
        working = 1 if stage.module in ("recipes.importance", "recipes.search") else held
        precision = correction.precision if correction and stage.name == "correct_teacher" else cfg.distill.precision
        hours = compute.training_hours(amount, precision, cfg.cluster.gpu, working) if amount else None
        rows.append(
            {
                "stage": stage.name,
                "ranks": held,
                "hours": hours,
                "gpu_hours": None if hours is None else hours * held,
                "jobs": _jobs(hours, cfg.cluster.time_limit),
            }
        )
    return rows


def _jobs(hours: float | None, time_limit: str | None) -> int | None:
    if hours is None or time_limit is None:
        return None
    return math.ceil(hours * 3600 / seconds_of_time_limit(time_limit))


def _warnings(cfg: RunConfig, cut: float, room: dict[str, int]) -> list[str]:
    warnings = []
    for number, share in enumerate(_cuts(cfg), 1):
        if share > LARGEST_CUT:
            warnings.append(
                f"pruning removes {share:.0%} of the parameters in round {number} of {len(cfg.prune.rounds) + 1}; "
                f"beyond {LARGEST_CUT:.0%} prune and distil a model in between first (prune.rounds), and prune that "
                f"one: {_in_rounds(share)}"
            )
    fits, words = disk.room(cfg.run_dir, room)
    if not fits:
        warnings.append(f"{words}; {disk.FIX}")
    return warnings


def _cuts(cfg: RunConfig) -> list[float]:
    """The share of the parameters that each round removes."""
    shapes = [shape_to_prune(cfg, number) for number in range(len(cfg.prune.rounds) + 1)] + [student_shape(cfg)]
    sizes = [parameters(shape, cfg.model.family) for shape in shapes]
    return [1 - after / before for before, after in itertools.pairwise(sizes)]


def _in_rounds(cut: float) -> str:
    """Rounds of equal shares, each within Minitron's advice of a third."""
    count = math.ceil(math.log(1 - cut) / math.log(2 / 3) - 1e-9)
    share = (1 - cut) ** (1 / count)
    shares = " -> ".join(f"{share**number:.0%}" for number in range(1, count + 1))
    return f"{count} rounds that each leave {math.ceil(share * 100) / 100:.0%} ({shares} of the parameters)"


def _impossible(peaks: dict[str, Memory], gpu: Gpu) -> dict[str, str]:
    return {
        stage: f"{stage} needs {memory.tensors / GIB:.1f} GiB a GPU for its tensors alone, and "
        f"cluster.gpu.memory_gib={gpu.memory_gib} ({gpu.name})"
        for stage, memory in peaks.items()
        if memory.tensors > gpu.memory_gib * GIB
    }


def refuse_impossible(plan: dict[str, Any], stages: Collection[str]) -> None:
    """Raises: ConfigError, where one of these stages cannot fit the GPU, however its memory is used."""
    faults = [fault for stage, fault in plan["impossible"].items() if stage in stages]
    if faults:
        # The plan may be wrong: whoever knows better has a way past it.
        raise ConfigError([f"{fault}; {plan['fix']}; or set cluster.gpu=null to go unchecked" for fault in faults])


def _fix(cfg: RunConfig, layouts: list[Layout], peaks: dict[str, Memory], limit: float) -> str:
    """What to set so that all fits: the best layout, or else a shorter sequence; for pruning more pipeline stages."""
    parts = []
    if peaks["distill"].total > limit:
        parts.append(_changes(cfg, layouts[0]) if layouts else _shorter(cfg, limit))
    if peaks["prune"].total > limit:
        parts.append(
            "raise prune.pipeline_model_parallel_size, or lower prune.calibration_seq_length or prune.micro_batch_size"
        )
    parts += [words for stage, words in FIXES.items() if stage in peaks and peaks[stage].total > limit]
    return "; ".join(parts)


def _changes(cfg: RunConfig, layout: Layout) -> str:
    ranks = count_ranks(cfg)
    present = layout_of(cfg.distill, cfg, _models(cfg), ranks).overrides
    return "set " + " ".join(f"{key}={value}" for key, value in layout.overrides.items() if present[key] != value)


def _shorter(cfg: RunConfig, limit: float) -> str:
    ranks = count_ranks(cfg)
    cfg = dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill))
    present = cfg.distill.seq_length
    while cfg.distill.seq_length // 2 >= SHORTEST_SEQUENCE:
        cfg.distill.seq_length //= 2
        layouts = fitting(cfg, _models(cfg), ranks, limit)
        if layouts:
            changes = _changes(cfg, layouts[0]).removeprefix("set")
            return f"no layout fits sequences of {present} tokens: set distill.seq_length={cfg.distill.seq_length}" + (
                changes.rstrip()
            )
    return f"no layout of {ranks} ranks fits: take more GPUs, or GPUs of more memory"
