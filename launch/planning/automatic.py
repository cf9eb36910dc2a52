"""Chooses the settings that are `auto`: the fastest layout that fits the GPU, which a run keeps on the same GPUs."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch.planning.advice import suggest_shorter
from launch.planning.disk import teacher_weight_bytes
from launch.planning.layouts import (
    CORRECTION,
    DISTILL,
    MICRO_BATCHES,
    Layout,
    Task,
    fitting,
    smallest_layout,
    undivided,
)
from launch.planning.memory import Memory, Models, fullest, prune_memory
from launch.planning.plan import distillation, stage_memory
from prune_distill.config import load
from prune_distill.config.validate import validate
from prune_distill.config.values import count_ranks, get_value, replace_values
from prune_distill.config.wording import divisors
from prune_distill.errors import ConfigError, Fault
from prune_distill.pipeline.names import RESOLVED, cache_stage
from prune_distill.schema import Gpu, Precision, Recompute, RunConfig
from prune_distill.schema.run import LAYOUT
from prune_distill.units import GIB

# The share of the GPU's memory that a chosen layout leaves free, beyond the reserve that every estimate has.
MARGIN = 0.05
REASONS_SHOWN = 3
CHUNK = "distill.kd.chunk_tokens"
CHUNKS, USUAL_CHUNK = (256, 512, 1024, 2048, 4096, 8192), 1024
# A larger chunk has to make a step faster by more than this share.
CHUNK_TOLERANCE = 0.005
CACHE_SIZES = tuple(f"teacher.parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline"))
CACHE_BATCH = "teacher.micro_batch_size"
PRUNE_STAGES, PRUNE_BATCH = "prune.pipeline_model_parallel_size", "prune.micro_batch_size"


def compose(
    overrides: Sequence[str],
    check_files: bool = False,
    config_dir: str | os.PathLike[str] | None = None,
    for_plan: bool = False,
) -> RunConfig:
    """The config of a run from `key=value` overrides, with values for all keys that are `auto`; see `load.compose`.

    Args:
        for_plan: a plan needs nothing that differs from site to site, and shows the nearest layout where none fits.

    Raises:
        ConfigError: all faults found, or no layout fits.
    """
    return load.compose(overrides, check_files, config_dir, partial(choose, accept_nearest=for_plan), not for_plan)


def choose(cfg: RunConfig, automatic: Collection[str], accept_nearest: bool = False) -> RunConfig:
    """The config with values for the keys `automatic`: those of the run's folder if they were chosen for the same GPUs
    and still fit, and otherwise new ones.

    Args:
        accept_nearest: choose what needs the least memory where nothing fits.

    Raises:
        ConfigError: nothing fits; it names the nearest layout and by how much that misses.
    """
    kept = _kept(cfg, automatic)
    if kept is not None:
        return kept
    cfg = _choose_layout(cfg, CORRECTION, automatic, accept_nearest)
    if CHUNK in automatic:
        cfg = _choose_chunk(cfg, automatic, accept_nearest)
    else:
        cfg = _choose_layout(cfg, DISTILL, automatic, accept_nearest)
    return _choose_caching(_choose_pruning(cfg, automatic, accept_nearest), automatic, accept_nearest)


def _choose_layout(cfg: RunConfig, key: str, automatic: Collection[str], accept_nearest: bool) -> RunConfig:
    fixed = {name: get_value(cfg, f"{key}.{name}") for name in LAYOUT if f"{key}.{name}" not in automatic}
    if len(fixed) == len(LAYOUT) or get_value(cfg, key) is None:
        return cfg
    chosen = _best(_task(cfg, key, fixed), accept_nearest)
    return replace_values(cfg, {f"{key}.{name}": value for name, value in chosen.values.items()})


def _choose_chunk(cfg: RunConfig, automatic: Collection[str], accept_nearest: bool) -> RunConfig:
    """Choose the fewest tokens of a chunk of the loss with which a step is nearly as fast as with any other, and the
    best layout for it; `USUAL_CHUNK` where speed is not known, and the smallest where nothing fits.

    The output weight's gradient is read and written once for each chunk, whatever its tokens: traffic that takes as
    long as the chunk's products if a chunk has a few hundred tokens.
    """

    def choose_layout(tokens: int, accept_nearest: bool = False) -> RunConfig:
        return _choose_layout(replace_values(cfg, {CHUNK: tokens}), DISTILL, automatic, accept_nearest)

    options: list[tuple[float, RunConfig]] = []
    for tokens in CHUNKS:
        try:
            option = choose_layout(tokens)
        except ConfigError:
            break
        layout = distillation(option).layout()
        if option.cluster.gpu is None or layout.seconds is None:
            return choose_layout(USUAL_CHUNK, accept_nearest)
        if not _fits(option, _chosen_memory(option)):
            break
        options.append((layout.seconds, option))
    if not options:
        return choose_layout(CHUNKS[0], accept_nearest)
    fastest = min(seconds for seconds, _ in options)
    return next(option for seconds, option in options if seconds <= (1 + CHUNK_TOLERANCE) * fastest)


def _fits(cfg: RunConfig, memory: Mapping[str, list[Memory]]) -> bool:
    return all(fullest(ranks).total <= _limit(cfg) for ranks in memory.values())


def _chosen_memory(cfg: RunConfig) -> dict[str, list[Memory]]:
    """The memory of a rank by stage, without teachers' caches in layouts of their own."""
    teachers = enumerate([cfg.teacher, *cfg.source_teachers])
    own = {cache_stage(number) for number, teacher in teachers if teacher.parallel is not None}
    return {stage: memory for stage, memory in stage_memory(cfg).items() if stage not in own}


def _kept(cfg: RunConfig, automatic: Collection[str]) -> RunConfig | None:
    """The config with the values that an earlier launch chose; None where there are none, or they no longer fit."""
    try:
        earlier = load.load_resolved(Path(cfg.run_dir) / RESOLVED)
    except ConfigError:
        return None
    if _hardware(earlier) != _hardware(cfg) or not set(automatic) <= set(earlier.automatic):
        return None
    values = {key: get_value(earlier, key) for key in automatic}
    if any(value is None for value in values.values()):
        return None
    kept = replace_values(cfg, values)
    fits = kept.cluster.gpu is None or _fits(kept, stage_memory(kept))
    return kept if fits and not validate(kept) else None


def _hardware(cfg: RunConfig) -> tuple[Gpu | None, int, int]:
    """The GPUs of a run, without their price."""
    cluster = cfg.cluster
    gpu = dataclasses.replace(cluster.gpu, cost_per_hour=None) if cluster.gpu else None
    return gpu, cluster.nodes, cluster.devices_per_node


def _limit(cfg: RunConfig) -> float:
    assert cfg.cluster.gpu is not None
    return cfg.cluster.gpu.memory_gib * GIB * (1 - MARGIN)


def _task(cfg: RunConfig, key: str, fixed: dict[str, Any]) -> Task:
    task = distillation(cfg)
    if key == CORRECTION:
        assert cfg.teacher_shape is not None
        assert cfg.distill.teacher_correction is not None
        bf16 = cfg.distill.teacher_correction.precision is Precision.bf16
        models = Models(cfg.teacher_family, cfg.teacher_shape, None)
        task = dataclasses.replace(task, key=key, models=models, machine=task.machine if bf16 else None)
    return dataclasses.replace(task, fixed=fixed)


def _best(task: Task, accept_nearest: bool) -> Layout:
    """The best layout whose stages all fit. Without a stated GPU the first that divides everything: least parallelism,
    one sequence at a time."""
    if task.cfg.cluster.gpu is None:
        fixed = {"micro_batch_size": 1, "recompute": Recompute.none, **task.fixed}
        fit = iter(fitting(dataclasses.replace(task, fixed=fixed), float("inf")))
    else:
        limit = _limit(task.cfg)
        fit = (layout for layout in fitting(task, limit) if task.key == CORRECTION or _all_fit(task, layout))
    best = next(fit, None)
    if best is not None:
        return best
    nearest = smallest_layout(task)
    if accept_nearest and nearest is not None:
        return nearest
    raise ConfigError([_nothing_fits(task, nearest)])


def _all_fit(task: Task, layout: Layout) -> bool:
    """Whether the other stages that have the distillation's layout fit as well."""
    cfg = replace_values(task.cfg, {f"{DISTILL}.{name}": value for name, value in layout.values.items()})
    return _fits(
        cfg,
        {stage: memory for stage, memory in _chosen_memory(cfg).items() if stage.startswith((DISTILL, cache_stage(0)))},
    )


def _nothing_fits(task: Task, smallest: Layout | None) -> Fault:
    """The fault of a training for which no layout fits: the nearest one, by how much it misses, and what to change."""
    key, gpu = f"{task.key}.parallel", task.cfg.cluster.gpu
    if gpu is None or smallest is None:
        given = ", ".join(f"{task.key}.{name}={getattr(value, 'value', value)}" for name, value in task.fixed.items())
        reasons = "".join(f"; {reason}" for reason in undivided(task)[:REASONS_SHOWN])
        message = (
            f"{key}=auto: no layout of {task.ranks} ranks{f' with {given}' if given else ''} divides the model and the "
            f"batch{reasons}; change the number of ranks, {task.key}.global_batch_size, or what is set"
        )
        return Fault("launch.layout", (key,), message)
    missing = smallest.peak / GIB - _limit(task.cfg) / GIB
    sizes = ", ".join(
        f"{name.rpartition('.')[2]}={getattr(value, 'value', value)}" for name, value in smallest.values.items()
    )
    problem = (
        f"no layout fits {gpu.name} with {MARGIN:.0%} to spare; the nearest ({sizes}) needs {smallest.peak / GIB:.1f} "
        f"GiB, {missing:.1f} GiB too much"
    )
    return Fault("launch.layout", (key,), f"{key}=auto: {problem}; {suggest_shorter(task, _limit(task.cfg))}")


def _choose_pruning(cfg: RunConfig, automatic: Collection[str], accept_nearest: bool) -> RunConfig:
    """The fewest pipeline stages, and then the largest micro batch, with which pruning fits."""
    if not {PRUNE_STAGES, PRUNE_BATCH} & set(automatic):
        return cfg
    devices = cfg.cluster.devices_per_node
    stages = [count for count in range(1, devices + 1) if devices % count == 0]
    sizes = [1] if cfg.cluster.gpu is None else list(MICRO_BATCHES)
    options = [
        replace_values(cfg, {PRUNE_STAGES: count, PRUNE_BATCH: size})
        for count in (stages if PRUNE_STAGES in automatic else [cfg.prune.pipeline_model_parallel_size])
        for size in (sizes if PRUNE_BATCH in automatic else [cfg.prune.micro_batch_size])
    ]
    if cfg.cluster.gpu is None:
        return options[0]
    assert cfg.model.shape is not None
    needed = [
        prune_memory(option.prune, cfg.model.shape, cfg.model.family, teacher_weight_bytes(cfg)).total
        for option in options
    ]
    fix = "lower prune.calibration_seq_length, or take GPUs of more memory"
    return _first_fit(options, needed, accept_nearest, PRUNE_STAGES, "pruning", fix)


def _choose_caching(cfg: RunConfig, automatic: Collection[str], accept_nearest: bool) -> RunConfig:
    """The least model parallelism, and then the largest micro batch, with which caching the teacher's logits fits."""
    keys = [key for key in (*CACHE_SIZES, CACHE_BATCH) if key in automatic]
    if not keys:
        return cfg
    devices = cfg.cluster.devices_per_node
    splits = sorted(
        ((tensor, pipeline) for tensor in divisors(devices) for pipeline in divisors(count_ranks(cfg) // tensor)),
        key=lambda split: (math.prod(split), split[1]),
    )
    sizes = [1] if cfg.cluster.gpu is None else MICRO_BATCHES
    choices = ({**dict(zip(CACHE_SIZES, split, strict=True)), CACHE_BATCH: size} for split in splits for size in sizes)
    tried = [replace_values(cfg, {key: choice[key] for key in keys}) for choice in choices]
    options = [option for option in tried if not validate(option)]
    if cfg.cluster.gpu is None or not options or cache_stage(0) not in stage_memory(options[0]):
        return (options or tried)[0]
    needed = [fullest(stage_memory(option)[cache_stage(0)]).total for option in options]
    fix = "lower distill.seq_length, or take more GPUs, or GPUs of more memory"
    return _first_fit(options, needed, accept_nearest, keys[0], "cache_logits", fix)


def _first_fit(
    options: Sequence[RunConfig], needed: Sequence[int], accept_nearest: bool, key: str, what: str, fix: str
) -> RunConfig:
    """The first option that fits, or the nearest; `needed`: bytes of each. Raises: ConfigError, where none fits."""
    cfg, least = options[0], min(needed)
    fit = next((option for option, size in zip(options, needed, strict=True) if size <= _limit(cfg)), None)
    if fit is not None:
        return fit
    if accept_nearest:
        return options[needed.index(least)]
    assert cfg.cluster.gpu is not None
    message = (
        f"{key}=auto: {what} needs at least {least / GIB:.1f} GiB a rank, {(least - _limit(cfg)) / GIB:.1f} GiB too "
        f"much for {cfg.cluster.gpu.name} with {MARGIN:.0%} to spare; {fix}"
    )
    raise ConfigError([Fault("launch.layout", (key,), message)])
