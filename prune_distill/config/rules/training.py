"""Rules of each training: the demo's, the teacher's correction and the distillation."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

from prune_distill.config.data_files import sources
from prune_distill.config.rule import Finding, Rule
from prune_distill.config.rules.data import SOURCES
from prune_distill.config.rules.model import TEACHER
from prune_distill.config.rules.prune import SHAPE, STUDENT
from prune_distill.config.values import count_ranks, get_value, require
from prune_distill.config.wording import any_of, around, divisors, too_long
from prune_distill.model.student import shape_to_prune, student_shape
from prune_distill.schema import Packing, Phase, RunConfig, Schedule, Shape, Training
from prune_distill.schema.phases import TrainingPhase, training_phases

DEMO, DISTILL, CORRECTION = "model.demo.training", "distill", "distill.teacher_correction"
TRAININGS = (DEMO, DISTILL, CORRECTION)
# Keys that a rule of a training reads: relative ones, and those that depend on the training.
SIZES = ("{at}.phases", *(f"{{at}}.{name}" for name in ("seq_length", "global_batch_size", "micro_batch_size")))
PHASES = (*SIZES, *(f"{{at}}.{name}" for name in ("max_steps", "lr", "min_lr", "warmup_steps")))
TENSOR, PIPELINE, CONTEXT, EXPERT = (
    f"{{at}}.parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context", "expert_model")
)
SEQUENCE_PARALLEL = "{at}.parallel.sequence_parallel"
RANKS = "ranks"
MODELS = "models"
# The group with the layout in which cache_logits runs the teacher.
CACHE = "teacher"
# What decides whether the teacher runs in the layout of the distillation.
SHARED_LAYOUT = (
    "distill.loss",
    "distill.teacher_logits",
    "teacher.parallel?",
    "prune.rounds",
    "prune.successive_halving?",
)

Check = Callable[[RunConfig, str], Iterator[Finding]]


def training_rule(
    name: str, *reads: str, only: tuple[str, ...] = TRAININGS, on_machine: bool = False
) -> Callable[[Check], list[Rule]]:
    """Declare a function as a rule of each training, whose key it is given."""
    return lambda check: [
        Rule(name, tuple(key for read in reads for key in _keys(read, at)), _bind(check, at), on_machine) for at in only
    ]


def _bind(check: Check, at: str) -> Callable[[RunConfig], Iterator[Finding]]:
    return lambda cfg: check(cfg, at)


def _keys(read: str, at: str) -> tuple[str, ...]:
    if read == RANKS:
        return () if at == DEMO else ("cluster.nodes", "cluster.devices_per_node")
    if read == MODELS:
        models = (*STUDENT, *SHARED_LAYOUT) if at == DISTILL else SHAPE
        return (*models, *(TEACHER if at != DEMO else ()))
    return (read.format(at=at),)


@training_rule("training.schedule", "{at}.schedule", "{at}.decay_steps")
def schedule(cfg: RunConfig, at: str) -> Iterator[Finding]:
    training = get_training(cfg, at)
    key, decay = f"{at}.schedule", f"{at}.decay_steps"
    if training.schedule is Schedule.wsd and training.decay_steps is None:
        yield Finding(key, f"needs {decay}; set {decay} to a tenth of {at}.max_steps")
    if training.schedule is not Schedule.wsd and training.decay_steps is not None:
        yield Finding(key, f"does not use {decay}={training.decay_steps}; set {key}=wsd or {decay}=null")


@training_rule("training.warmup", *PHASES, "{at}.decay_steps")
def warmup(cfg: RunConfig, at: str) -> Iterator[Finding]:
    training = get_training(cfg, at)
    decay = training.decay_steps or 0
    for key, phase in _phases(training, at):
        length = f"{at}.max_steps={phase.steps}" if key == at else f"its {phase.steps} steps"
        if phase.steps and decay > phase.steps:
            fix = f"set {at}.decay_steps to less, such as {math.ceil(phase.steps / 10)}"
            yield Finding(f"{at}.decay_steps", f"too long for {length}; {fix}")
        # The learning rate is to reach its height, and to keep it for a step unless it falls at once.
        elif phase.steps and phase.warmup_steps + decay > phase.steps - (decay == 0):
            falling = f" with {at}.decay_steps={decay}" if decay else ""
            fitting = min(phase.steps // 20, phase.steps - decay)
            yield Finding(
                f"{key}.warmup_steps",
                f"too long for {length}{falling}; set {key}.warmup_steps to less, such as {fitting}",
                value=phase.warmup_steps,
            )


@training_rule("training.min_lr", *PHASES)
def min_lr(cfg: RunConfig, at: str) -> Iterator[Finding]:
    for key, phase in _phases(get_training(cfg, at), at):
        if phase.min_lr > phase.lr:
            yield Finding(
                f"{key}.min_lr",
                f"above {key}.lr={phase.lr}; set {key}.min_lr to at most {phase.lr}",
                value=phase.min_lr,
            )


@training_rule("training.phases", *PHASES)
def phases(cfg: RunConfig, at: str) -> Iterator[Finding]:
    training, key = get_training(cfg, at), f"{at}.phases"
    if training.phases is None:
        return
    if not training.phases:
        yield Finding(key, f"contains no phase; set {key}=null")
        return
    unclear = [number for number, phase in enumerate(training.phases) if not _has_length(phase)]
    for number in unclear:
        name = f"{key}[{number}]"
        yield Finding(name, f"its length must be given once; set either {name}.max_steps or {name}.tokens")
    steps = training_phases(training)[-1].end
    if not unclear and steps != training.max_steps:
        yield Finding(f"{at}.max_steps", f"the phases take {steps} steps; set {at}.max_steps={steps}")


def _has_length(phase: Phase) -> bool:
    return (phase.max_steps is None) != (phase.tokens is None)


@training_rule("training.phase_weights", "{at}.phases", *SOURCES, only=(DISTILL,))
def phase_weights(cfg: RunConfig, at: str) -> Iterator[Finding]:
    known = sorted(sources(cfg.data))
    for number, phase in enumerate(get_training(cfg, at).phases or ()):
        key, weights = f"{at}.phases[{number}].weights", phase.weights
        if weights is None:
            continue
        unknown = sorted(set(weights) - set(known))
        if unknown:
            yield Finding(key, f"{unknown} are not sources of the data; set weights of {known}")
        if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
            yield Finding(key, f"{weights} must contain no negative weight, and one above 0; set {key} to such weights")


@training_rule("training.skip_steps", "{at}.skip_steps", "{at}.max_steps")
def skip_steps(cfg: RunConfig, at: str) -> Iterator[Finding]:
    training, key = get_training(cfg, at), f"{at}.skip_steps"
    for span in training.skip_steps:
        if len(span) != 2 or not 1 <= span[0] <= span[1] <= training.max_steps:
            yield Finding(
                key,
                f"{span} is not a span [first, last] of steps from 1 to {training.max_steps}; set {key}=[[FIRST,LAST]]",
            )


@training_rule(
    "training.trackers",
    "{at}.wandb?",
    "{at}.mlflow?",
    "cluster.slurm?.container_image",
    only=(DISTILL,),
    on_machine=True,
)
def trackers(cfg: RunConfig, at: str) -> Iterator[Finding]:
    if cfg.cluster.slurm is not None and cfg.cluster.slurm.container_image is not None:
        return  # What a container has installed is not known here.
    for name in ("wandb", "mlflow"):
        if getattr(get_training(cfg, at), name) is not None and importlib.util.find_spec(name) is None:
            yield Finding(
                f"{at}.{name}", f"the package {name} is not installed; pip install {name}, or set {at}.{name}=null"
            )


@training_rule("training.overlap_param_gather", "{at}.overlap_param_gather", "{at}.use_distributed_optimizer")
def overlap_param_gather(cfg: RunConfig, at: str) -> Iterator[Finding]:
    training = get_training(cfg, at)
    # Megatron takes the overlap only with the distributed optimizer (distributed/distributed_data_parallel.py:368)
    # and asserts it when gathering (distributed/param_and_grad_buffer.py:280); otherwise it is silently left out.
    if training.overlap_param_gather and not training.use_distributed_optimizer:
        key, needed = f"{at}.overlap_param_gather", f"{at}.use_distributed_optimizer"
        yield Finding(key, f"needs {needed}=true; set that, or {key}=false")


@training_rule("training.ranks", TENSOR, PIPELINE, CONTEXT, RANKS, only=(*TRAININGS, CACHE))
def ranks(cfg: RunConfig, at: str) -> Iterator[Finding]:
    # megatron/core/parallel_state.py:698
    count, model_ranks = _ranks(cfg, at), _model_parallel(get_training(cfg, at))
    if count % model_ranks:
        least = math.ceil(count / model_ranks) * model_ranks
        yield Finding(
            f"{at}.parallel",
            f"one model takes {model_ranks} ranks (tensor x pipeline x context parallelism), which do not divide the "
            f"{'1 rank of the demo' if at == DEMO else f'{count} ranks of cluster.nodes x cluster.devices_per_node'}; "
            f"start {least} ranks, or lower {at}.parallel",
        )


@training_rule("training.global_batch_size", *SIZES, TENSOR, PIPELINE, CONTEXT, RANKS)
def global_batch_size(cfg: RunConfig, at: str) -> Iterator[Finding]:
    # megatron/core/num_microbatches_calculator.py:340
    replicas = max(_ranks(cfg, at) // _model_parallel(get_training(cfg, at)), 1)
    for where, training in with_phases(get_training(cfg, at), at):
        size, step = training.global_batch_size, training.micro_batch_size * replicas
        if size % step:
            key, micro = f"{where}.global_batch_size", f"{where}.micro_batch_size"
            yield Finding(
                key,
                f"not divisible by {step} ({micro}={training.micro_batch_size} x {replicas} data-parallel ranks); "
                f"set {key} to {any_of(around(size, step))}",
                value=size,
            )


@training_rule("training.max_length", *SIZES, "model.shape.max_position_embeddings", *TEACHER)
def max_length(cfg: RunConfig, at: str) -> Iterator[Finding]:
    limit = min(shape.max_position_embeddings for shape in _unpruned(cfg, at))
    for where, training in with_phases(get_training(cfg, at), at):
        if training.seq_length > limit:
            key = f"{where}.seq_length"
            yield Finding(key, too_long(key, limit), value=training.seq_length)


@training_rule("training.packing", *SIZES, "{at}.packing", CONTEXT)
def packing(cfg: RunConfig, at: str) -> Iterator[Finding]:
    """Transformer Engine's kernels for packed sequences take one row, and split it otherwise among ranks."""
    training, key = get_training(cfg, at), f"{at}.packing"
    if training.packing is Packing.concatenated:
        return
    fix = f"set %s=1, or {key}=concatenated"
    if (context := training.parallel.context_parallel_size) > 1:
        size = CONTEXT.format(at=at)
        yield Finding(key, f"cannot be combined with {size}={context}; {fix % size}")
    for where, one in with_phases(training, at):
        if one.micro_batch_size > 1:
            size = f"{where}.micro_batch_size"
            yield Finding(
                key, f"takes one sequence per forward pass, unlike {size}={one.micro_batch_size}; {fix % size}"
            )


@training_rule("training.seq_length", *SIZES, TENSOR, CONTEXT, SEQUENCE_PARALLEL)
def seq_length(cfg: RunConfig, at: str) -> Iterator[Finding]:
    parallel = get_training(cfg, at).parallel
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    # Each context-parallel rank takes two pieces of a sequence (megatron/core/utils.py:1835), and sequence
    # parallelism divides a rank's tokens among the tensor-parallel ranks.
    pieces = 2 * context if context > 1 else 1
    if tensor > 1 and parallel.sequence_parallel:
        pieces = math.lcm(pieces, context * tensor)
    for where, training in with_phases(get_training(cfg, at), at):
        if training.seq_length % pieces:
            key = f"{where}.seq_length"
            yield Finding(
                key,
                f"not divisible by the {pieces} pieces of a sequence in {at}.parallel (context parallel {context}, "
                f"tensor parallel {tensor}); set {key} to {any_of(around(training.seq_length, pieces))}",
                value=training.seq_length,
            )


@training_rule("training.layers", PIPELINE, MODELS, only=(*TRAININGS, CACHE))
def layers(cfg: RunConfig, at: str) -> Iterator[Finding]:
    # megatron/core/transformer/transformer_block.py:156
    stages, models = get_training(cfg, at).parallel.pipeline_model_parallel_size, _placed_models(cfg, at)
    uneven = [f"the {who}'s {shape.num_layers}" for who, shape in models if shape.num_layers % stages]
    if uneven:
        key = f"{at}.parallel.pipeline_model_parallel_size"
        fitting = any_of(_common_divisors(models, ("num_layers",)))
        yield Finding(key, f"does not divide {' and '.join(uneven)} layers; set {key} to {fitting}")


@training_rule("training.tensor_parallel", TENSOR, MODELS, only=(*TRAININGS, CACHE))
def tensor_parallel(cfg: RunConfig, at: str) -> Iterator[Finding]:
    # megatron/core/transformer/transformer_config.py:742 and :758. NeMo takes the vocabulary as config.json has it, so
    # that nothing pads it (nemo/collections/llm/gpt/model/base.py:343, megatron/core/tensor_parallel/utils.py:108).
    size, models = get_training(cfg, at).parallel.tensor_model_parallel_size, _placed_models(cfg, at)
    # Experts are not divided.
    mlp_sizes = () if _experts_of(models) else ("ffn_hidden_size",)
    names = ("num_attention_heads", "num_query_groups", *mlp_sizes, "vocab_size")
    uneven = [
        f"the {who}'s {name} {getattr(shape, name)}"
        for who, shape in models
        for name in names
        if getattr(shape, name) % size
    ]
    if uneven:
        key = f"{at}.parallel.tensor_model_parallel_size"
        fitting = any_of(_common_divisors(models, names))
        yield Finding(key, f"does not divide {', '.join(uneven)}; set {key} to {fitting}")


@training_rule("training.experts", PIPELINE, EXPERT, RANKS, MODELS)
def expert_parallel(cfg: RunConfig, at: str) -> Iterator[Finding]:
    parallel, models, key = (
        get_training(cfg, at).parallel,
        _placed_models(cfg, at),
        f"{at}.parallel.expert_model_parallel_size",
    )
    size, stages, experts = (
        parallel.expert_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        _experts_of(models),
    )
    # megatron/core/transformer/transformer_config.py:808, of every model that takes the layout.
    dense = [who for who, shape in models if not shape.num_moe_experts]
    if dense and size > 1:
        yield Finding(key, f"the {dense[0] if experts else 'model'} has no experts; set {key}=1")
    if dense:
        return
    # megatron/core/transformer/moe/moe_layer.py:60
    if any(count % size for count in experts):
        counts = " and ".join(f"the {who}'s {shape.num_moe_experts}" for who, shape in models)
        yield Finding(key, f"does not divide {counts} experts; set {key} to {any_of(divisors(math.gcd(*experts)))}")
    # A pipeline stage's ranks share them, whatever else these divide (megatron/core/parallel_state.py:749, with experts
    # that are not divided).
    stage_ranks, rest = divmod(_ranks(cfg, at), stages)
    if rest == 0 and stage_ranks % size:
        fitting = any_of(divisors(math.gcd(stage_ranks, *experts)))
        yield Finding(key, f"does not divide the {stage_ranks} ranks of a pipeline stage; set {key} to {fitting}")


@training_rule("training.sequence_parallel", TENSOR, SEQUENCE_PARALLEL, MODELS)
def sequence_parallel(cfg: RunConfig, at: str) -> Iterator[Finding]:
    parallel, key = get_training(cfg, at).parallel, f"{at}.parallel.sequence_parallel"
    # megatron/core/transformer/moe/moe_layer.py:265
    if (
        _experts_of(_placed_models(cfg, at))
        and parallel.tensor_model_parallel_size > 1
        and not parallel.sequence_parallel
    ):
        yield Finding(key, f"experts with tensor parallelism need sequence parallelism; set {key}=true")


def list_models(cfg: RunConfig, at: str = DISTILL) -> list[tuple[str, Shape]]:
    """The models that a training distributes over its ranks, by role: the teacher and all students, or it alone."""
    teacher = [("teacher", require(cfg.model.shape if at == DEMO else cfg.teacher_shape))]
    if at != DISTILL:
        return teacher
    count = len(cfg.prune.rounds)
    between = [(f"model after round {number}", shape_to_prune(cfg, number)) for number in range(1, count + 1)]
    return [*teacher, *between, ("student", student_shape(cfg))]


def _placed_models(cfg: RunConfig, at: str) -> list[tuple[str, Shape]]:
    """The models that take the layout at a key, by role."""
    models = list_models(cfg, at)
    return models[1:] if at == DISTILL and not teacher_shares_layout(cfg) else models


def teacher_shares_layout(cfg: RunConfig) -> bool:
    """Whether the teacher runs in the layout of the distillation. Earlier rounds and successive halving run it beside
    the student even if the last distillation reads cached logits."""
    distill, prune = cfg.distill, cfg.prune
    beside_student = not distill.reads_cached_logits or bool(prune.rounds) or prune.successive_halving is not None
    return beside_student or cfg.teacher.parallel is None


def _unpruned(cfg: RunConfig, at: str) -> list[Shape]:
    """The shapes of the teacher and of the model that is pruned, of those that a training runs or descends from."""
    shapes = {DEMO: [cfg.model.shape], CORRECTION: [cfg.teacher_shape]}
    if at in shapes:
        return [require(shape) for shape in shapes[at]]
    found = (cfg.model.shape, cfg.teacher_shape, *(teacher.shape for teacher in cfg.source_teachers))
    return [shape for shape in found if shape is not None]


def get_training(cfg: RunConfig, at: str) -> Any:
    """The training at a key."""
    return get_value(cfg, at)


def _phases(training: Training, at: str) -> list[tuple[str, TrainingPhase]]:
    """The phases of a training, by key; a training without any is one phase."""
    found = enumerate(training_phases(training))
    return [(f"{at}.phases[{number}]" if training.phases else at, phase) for number, phase in found]


def with_phases(training: Training, at: str) -> Iterator[tuple[str, Training]]:
    """The training, whose sizes validation uses, and the training with the sizes of each phase, by key."""
    yield at, training
    for number, phase in enumerate(training.phases or ()):
        sizes = {name: getattr(phase, name) for name in ("seq_length", "global_batch_size", "micro_batch_size")}
        own = {name: size for name, size in sizes.items() if size is not None}
        yield f"{at}.phases[{number}]", dataclasses.replace(training, **own)


def _ranks(cfg: RunConfig, at: str) -> int:
    return 1 if at == DEMO else count_ranks(cfg)


def _model_parallel(training: Training) -> int:
    """Ranks that one copy of a model takes."""
    parallel = training.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _experts_of(models: list[tuple[str, Shape]]) -> list[int]:
    """How many experts a layer of each model has; empty for dense models."""
    return [shape.num_moe_experts for _, shape in models if shape.num_moe_experts]


def _common_divisors(models: list[tuple[str, Shape]], names: tuple[str, ...]) -> list[int]:
    return divisors(math.gcd(*(getattr(shape, name) for _, shape in models for name in names)))
