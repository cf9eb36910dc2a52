"""The plan of a run: what it will need, computed once; `launch.planning.output` renders it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass

from launch.planning.advice import suggest_fix, warnings
from launch.planning.deployment import PartialTime, estimate_parts
from launch.planning.disk import Disk, estimate_disk, teacher_weight_bytes
from launch.planning.hours import StageHours, estimate_hours
from launch.planning.layouts import DISTILL, Layout, Task, fitting, undivided
from launch.planning.machine import describe_machine
from launch.planning.memory import (
    Memory,
    Models,
    cached_logits_memory,
    distilled_models,
    fullest,
    prune_memory,
    training_memory,
)
from launch.planning.time import Seconds, step_seconds
from prune_distill.config.values import cached_share, caching_layout, count_ranks, require, sources_of_teacher
from prune_distill.errors import ConfigError
from prune_distill.model.flops import TokenFlops, forward_flops, training_flops
from prune_distill.model.model_size import active_parameters, parameters
from prune_distill.model.student import student_shape, student_shapes
from prune_distill.pipeline.stages import Stage, select_stages
from prune_distill.schema import (
    ClusterConfig,
    DistillConfig,
    Family,
    Loss,
    LossImplementation,
    Precision,
    RunConfig,
    Shape,
)
from prune_distill.schema.phases import phase_sizes, training_tokens
from prune_distill.units import GIB


@dataclass(frozen=True)
class Model:
    """A model and its size. A token of a mixture of experts passes through its active parameters."""

    parameters: int
    active_parameters: int
    shape: Shape


@dataclass(frozen=True)
class SourceTeacher:
    """A teacher of single sources.

    Attributes:
        hf_path: its folder or Hub id.
        sources: the sources of the data whose sequences it teaches.
        tensor, pipeline, micro_batch_size: the layout in which its logits are cached.
    """

    hf_path: str
    sources: list[str]
    tensor: int
    pipeline: int
    micro_batch_size: int
    model: Model


@dataclass(frozen=True)
class Candidates:
    """The candidates of a search: how many shapes there are, and the parameters of the smallest and the largest."""

    shapes: int
    least: int
    most: int


@dataclass(frozen=True)
class Work:
    """The work of the distillation, in tokens and FLOP."""

    steps: int
    tokens: int
    tokens_a_step: int
    flops: int
    flops_a_token: TokenFlops


@dataclass(frozen=True)
class CachedLogits:
    """The cost of caching the teacher's logits.

    Attributes:
        tensor, pipeline, micro_batch_size: the layout of the teacher.
        bytes: on disk, at most.
        flops_a_token: of the teacher's forward pass; of several teachers the mean over all tokens, or the largest
            where the shares of their sources are not known.
        spared_share: of the FLOP of a step with the teacher, what each further student saves.
    """

    tensor: int
    pipeline: int
    micro_batch_size: int
    top_k: int
    bytes: int
    flops_a_token: int
    spared_share: float


@dataclass(frozen=True)
class KvCache:
    """Bytes of the student's KV cache in an engine, in 16 bits. Quantized models have half with `fp8_kv_cache`.

    Attributes:
        halved: whether quantized models keep it in FP8.
        longest: of a sequence of `max_position_embeddings` tokens.
        benchmark: of the benchmark's sequences, if the run has that stage.
    """

    token: int
    longest: int
    benchmark: int | None
    halved: bool


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        automatic: the keys for which values were chosen.
        original: the model that is pruned, where it is not the teacher.
        student: with a budget, the largest candidate.
        source_teachers: those of single sources, by the suffix of their stages.
        candidates: None without a budget.
        fp8: the scales of FP8 by model, of those whose layers compute in FP8 in the distillation.
        signal: None where the teacher runs next to the student.
        stages: every stage of the run in order, with its hours.
        partial: of stages without hours, the time of the parts that are known.
        memory: for each stage that is estimated, the memory of a rank of each pipeline stage; for `prune`, of its
            fullest rank. It always has `distill` and `prune`.
        layout: the configured layout of the distillation.
        loss_chunk: tokens of a chunk of the loss; None with implementation=upstream.
        step: what one of its steps takes, the first phase's; None where the GPU's figures are not stated.
        layouts: those that divide everything and fit the GPU, best first; empty where no GPU is stated.
        undivided: why other layouts are not possible.
        kv_cache: None for a run that neither quantizes nor benchmarks the student.
        fix: what to set where the plan does not fit.
    """

    experiment: str
    cluster: ClusterConfig
    ranks: int
    automatic: list[str]
    teacher: Model
    original: Model | None
    student: Model
    source_teachers: dict[str, SourceTeacher]
    candidates: Candidates | None
    work: Work
    fp8: dict[str, str]
    signal: CachedLogits | None
    stages: list[StageHours]
    partial: list[PartialTime]
    memory: dict[str, list[Memory]]
    layout: Layout
    loss_chunk: int | None
    step: Seconds | None
    layouts: list[Layout]
    undivided: list[str]
    kv_cache: KvCache | None
    disk: Disk
    warnings: list[str]
    fix: str | None

    @property
    def cut(self) -> float:
        """The share of the parameters that pruning removes."""
        return 1 - self.student.parameters / (self.original or self.teacher).parameters

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank of all stages."""
        return max(fullest(memory).total for memory in self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits the GPU; None where no GPU is stated."""
        gpu = self.cluster.gpu
        return None if gpu is None else self.peak <= gpu.memory_gib * GIB

    @property
    def mfu(self) -> float | None:
        """The share of the GPUs' peak that the distillation's models take; see `prune_distill.model.flops`."""
        gpu, seconds = self.cluster.gpu, self.layout.seconds
        if gpu is None:
            return None
        if gpu.mfu is not None or seconds is None:
            return gpu.mfu
        flops = self.work.flops_a_token.student + self.work.flops_a_token.teacher
        return self.work.tokens / self.work.steps * flops / (seconds * self.ranks * gpu.bf16_tflops * 1e12)

    @property
    def impossible(self) -> dict[str, str]:
        """A sentence by stage: those whose tensors alone, without the reserve, are more than the GPU holds."""
        gpu = self.cluster.gpu
        if gpu is None:
            return {}
        tensors = {stage: fullest(memory).tensors for stage, memory in self.memory.items()}
        return {
            stage: f"{stage} needs {size / GIB:.1f} GiB a GPU for its tensors alone, and "
            f"cluster.gpu.memory_gib={gpu.memory_gib} ({gpu.name})"
            for stage, size in tensors.items()
            if size > gpu.memory_gib * GIB
        }

    def refuse_impossible(self, stages: Collection[str]) -> None:
        """Raises: ConfigError, where one of these stages cannot fit the GPU, however its memory is used."""
        faults = [fault for stage, fault in self.impossible.items() if stage in stages]
        if faults:
            # The plan may be wrong: whoever knows better has a way past it.
            raise ConfigError([f"{fault}; {self.fix}; or set cluster.gpu=null to go unchecked" for fault in faults])


def make_plan(cfg: RunConfig) -> Plan:
    """The plan of a run whose config was checked."""
    original, teacher = require(cfg.model.shape), require(cfg.teacher_shape)
    family, ranks, gpu = cfg.model.family, count_ranks(cfg), cfg.cluster.gpu
    student, task = student_shape(cfg), distillation(cfg)
    limit = gpu.memory_gib * GIB if gpu else math.inf
    layouts = fitting(task, limit) if gpu else []
    memory = stage_memory(cfg)
    full = {stage for stage, stage_memory in memory.items() if fullest(stage_memory).total > limit}
    steps, tokens = cfg.distill.max_steps, training_tokens(cfg.distill)
    shapes = student, task.models.teacher, cfg.teacher_family
    flops = training_flops(cfg.distill, cfg.distill.loss, family, *shapes)
    disk = estimate_disk(cfg)
    return Plan(
        experiment=cfg.name,
        cluster=cfg.cluster,
        ranks=ranks,
        automatic=cfg.automatic,
        teacher=_model(teacher, cfg.teacher_family),
        original=_model(original, family) if cfg.has_own_teacher else None,
        student=_model(student, family),
        source_teachers=_source_teachers(cfg),
        candidates=_candidates(cfg),
        work=Work(steps, tokens, tokens // steps, tokens * flops.total, flops),
        fp8=_fp8(cfg.distill),
        signal=_cached_logits(cfg, flops.total, disk),
        stages=estimate_hours(cfg),
        partial=estimate_parts(cfg),
        memory=memory,
        layout=task.layout(),
        loss_chunk=_loss_chunk(cfg),
        step=_step(task),
        layouts=layouts,
        undivided=undivided(task),
        kv_cache=_kv_cache(cfg),
        disk=disk,
        warnings=warnings(cfg, disk),
        fix=suggest_fix(task, layouts, full, limit) if full else None,
    )


def distillation(cfg: RunConfig) -> Task:
    """The last distillation of a run as a training that needs a layout; with a budget, of the largest candidate."""
    # Only the speed of bf16 is stated.
    machine = describe_machine(cfg.cluster) if cfg.distill.precision is Precision.bf16 else None
    return Task(cfg, DISTILL, distilled_models(cfg), count_ranks(cfg), machine)


def _loss_chunk(cfg: RunConfig) -> int | None:
    kd = cfg.distill.kd
    return None if kd.implementation is LossImplementation.upstream else kd.chunk_tokens


def _kv_cache(cfg: RunConfig) -> KvCache | None:
    shape, benchmark = student_shape(cfg), cfg.benchmark
    if not cfg.quantize.formats and not benchmark.enabled:
        return None
    token = 2 * 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels
    sequences = benchmark.batch_size * (benchmark.prompt_tokens + benchmark.new_tokens)
    return KvCache(
        token,
        token * shape.max_position_embeddings,
        token * sequences if benchmark.enabled else None,
        bool(cfg.quantize.formats) and cfg.quantize.fp8_kv_cache,
    )


def _step(task: Task) -> Seconds | None:
    if task.machine is None:
        return None
    training = task.training
    if training.phases:
        training = dataclasses.replace(training, phases=None, **phase_sizes(training, training.phases[0]))
    return step_seconds(training, task.loss, task.models, task.machine, task.ranks)


def stage_memory(cfg: RunConfig) -> dict[str, list[Memory]]:
    """The memory of a rank by stage: of the last distillation and of pruning; of the distillations of earlier rounds,
    whose students are larger; of on-policy rounds; of the stages that run the teacher alone."""
    original, teacher, ranks = require(cfg.model.shape), require(cfg.teacher_shape), count_ranks(cfg)
    memory = {
        "distill": training_memory(cfg.distill, cfg.distill.loss, distilled_models(cfg), ranks),
        "prune": [prune_memory(cfg.prune, original, cfg.model.family, teacher_weight_bytes(cfg))],
    }
    for stage in select_stages(cfg):
        if stage.module == "recipes.distill" and (".round" in stage.name or ".on_policy" in stage.name):
            own = stage.configure(cfg)
            memory[stage.name] = training_memory(own.distill, own.distill.loss, distilled_models(own), ranks)
    if cfg.distill.teacher_correction is not None:
        models = Models(cfg.teacher_family, teacher, None)
        memory["correct_teacher"] = training_memory(cfg.distill.teacher_correction, Loss.ce, models, ranks)
    for stage in _caching_stages(cfg):
        own = stage.configure(cfg)
        shape, family = require(own.teacher_shape), own.teacher_family
        memory[stage.name] = [cached_logits_memory(own.teacher, own.distill, shape, family)]
    return memory


def _caching_stages(cfg: RunConfig) -> list[Stage]:
    """The stages that cache the logits of the distillation's sequences. Those of on-policy rounds need the same."""
    stages = select_stages(cfg)
    return [stage for stage in stages if stage.module == "recipes.cache_logits" and ".on_policy" not in stage.name]


def _model(shape: Shape, family: Family) -> Model:
    return Model(parameters(shape, family), active_parameters(shape, family), shape)


def _source_teachers(cfg: RunConfig) -> dict[str, SourceTeacher]:
    found = {}
    for number, teacher in enumerate(cfg.source_teachers, 1):
        parallel, micro_batch_size = caching_layout(teacher, cfg.distill)
        found[f"source_teacher{number}"] = SourceTeacher(
            str(teacher.hf_path),
            sources_of_teacher(cfg, number),
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            micro_batch_size,
            _model(require(teacher.shape), require(teacher.family)),
        )
    return found


def _fp8(distill: DistillConfig) -> dict[str, str]:
    scales = {"student": distill.fp8, "teacher": distill.fp8_of_teacher if distill.loss is Loss.kd else None}
    return {model: fp8.value for model, fp8 in scales.items() if fp8 is not None}


def _candidates(cfg: RunConfig) -> Candidates | None:
    if cfg.prune.budget is None:
        return None
    sizes = [parameters(shape, cfg.model.family) for shape in student_shapes(cfg)]
    return Candidates(len(sizes), min(sizes), max(sizes))


def _cached_logits(cfg: RunConfig, student_flops: int, disk: Disk) -> CachedLogits | None:
    if not cfg.distill.reads_cached_logits:
        return None
    runs = [stage.configure(cfg) for stage in _caching_stages(cfg)]
    each = [forward_flops(require(own.teacher_shape), own.teacher_family, own.distill.seq_length) for own in runs]
    shares = [share for own in runs if (share := cached_share(own)) is not None]
    known = len(shares) == len(runs)
    flops = round(sum(share * one for share, one in zip(shares, each, strict=True))) if known else max(each)
    parallel, micro_batch_size = caching_layout(cfg.teacher, cfg.distill)
    return CachedLogits(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        micro_batch_size,
        cfg.distill.cached_logits_top_k,
        disk.needed["signal"],
        flops,
        flops / (flops + student_flops),
    )
