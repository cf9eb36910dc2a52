"""Rules across fields. Pure functions of a config; each fault names a key, its value and the value to set instead.

Where upstream would refuse (or silently ignore) something hours later, the rule names the line that does.
"""

from __future__ import annotations

import dataclasses
import math
import os.path
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

from prune_distill.config.bounds import out_of_bounds
from prune_distill.config.data_files import sources
from prune_distill.config.rules import data as data_rules
from prune_distill.config.rules import evaluation as evaluation_rules
from prune_distill.config.rules import kd as kd_rules
from prune_distill.config.rules import prune as prune_rules
from prune_distill.config.rules import slurm as slurm_rules
from prune_distill.config.rules import teacher as teacher_rules
from prune_distill.config.rules import training as training_rules
from prune_distill.config.values import count_ranks
from prune_distill.config.wording import any_of, around, divisors, too_long
from prune_distill.model import model_folder
from prune_distill.model.flops import Meter
from prune_distill.model.hf_shape import local_folder, may_be_hub_id
from prune_distill.model.hf_tokenizer import faults as tokenizer_faults
from prune_distill.model.model_size import EXPERT_SIZES
from prune_distill.model.student import shape_to_prune, student_shape
from prune_distill.schema import DocumentFormat, Family, Loss, Precision, RunConfig, Shape, Training
from prune_distill.schema.phases import phase_sizes
from prune_distill.units import seconds_of_time_limit

# Linux's limits of a file name and a path; below a run's folder there are up to 500 bytes more.
LONGEST_FILE_NAME = 255
LONGEST_RUN_DIR = 4096 - 500
# Further students that the stage table knows.
CONTROLS = ("ce", "scratch")


class _UnreadableError(Exception):
    """A rule asked for a value that is itself at fault."""


class _View:
    """A config whose unreadable keys raise when read, so that no rule judges what is already known to be wrong."""

    def __init__(self, value: Any, unreadable: Collection[str], prefix: str = "") -> None:
        self._value, self._unreadable, self._prefix = value, unreadable, prefix

    def __getattr__(self, name: str) -> Any:
        key = self._prefix + name
        if any(bad == key or bad.startswith(f"{key}[") for bad in self._unreadable):
            raise _UnreadableError(key)
        value = getattr(self._value, name)
        if isinstance(value, dict) and any(bad.startswith(f"{key}.") for bad in self._unreadable):
            raise _UnreadableError(key)
        return _View(value, self._unreadable, f"{key}.") if dataclasses.is_dataclass(value) else value


Rule = Callable[[RunConfig], Iterator[str]]


def validate(cfg: RunConfig, unreadable: Collection[str] = ()) -> list[str]:
    """The faults of a config, all of them, one sentence each.

    Args:
        cfg: the config.
        unreadable: dotted keys that hold no usable value; rules that need one of them are left out.
    """
    bad = set(unreadable)
    faults = []
    for key, sentence in out_of_bounds(cfg, bad):
        faults.append(sentence)
        bad.add(key)
    for rule in RULES:
        faults += _apply(rule, cfg, bad)
    return faults


def layout_faults(cfg: RunConfig, training: Training) -> list[str]:
    """The faults that `cfg` would have with `training` in the place of its distillation."""
    run = TrainingRun(training, "distill", _shapes(cfg), count_ranks(cfg))
    return [fault for rule in TRAINING_RULES for fault in rule(run)]


def missing_files(cfg: RunConfig, unreadable: Collection[str] = ()) -> list[str]:
    """The user's files and folders that a run reads and that are not there."""
    return [fault for rule in RULES_OF_FILES for fault in _apply(rule, cfg, unreadable)]


def meter(cfg: RunConfig) -> Meter | None:
    """What the distillation's speed is held against; None where the GPU or the model is not stated, or not in bf16.

    With a budget it is computed for the largest candidate.
    """
    gpu, teacher = cfg.cluster.gpu, cfg.model.shape
    if gpu is None or teacher is None or cfg.distill.precision is not Precision.bf16:
        return None
    peak = gpu.bf16_tflops * 1e12 * count_ranks(cfg)
    beside = teacher if cfg.distill.runs_teacher else None
    return Meter(cfg.distill.loss, cfg.model.family, student_shape(cfg), beside, peak)


def _apply(rule: Rule, cfg: RunConfig, unreadable: Collection[str]) -> list[str]:
    try:
        return list(rule(cast(RunConfig, _View(cfg, unreadable))))
    except _UnreadableError:
        return []


# Contradictions.


def _run_dir(cfg: RunConfig) -> Iterator[str]:
    long = [part for part in cfg.run_dir.split("/") if len(os.fsencode(part)) > LONGEST_FILE_NAME]
    if long:
        yield (
            f"run_dir holds the name {long[0][:20]}..., which is longer than the {LONGEST_FILE_NAME} bytes of a file "
            "name; set run_dir, or the name that it is made of, to a shorter one"
        )
    if len(os.fsencode(os.path.abspath(cfg.run_dir))) > LONGEST_RUN_DIR:
        yield f"run_dir is a path longer than {LONGEST_RUN_DIR} bytes; set run_dir to a shorter one"
    if cfg.run_dir.startswith("-"):
        yield f"run_dir={cfg.run_dir} would be read as an option by other commands; set run_dir=./{cfg.run_dir}"


def _model(cfg: RunConfig) -> Iterator[str]:
    if cfg.model.demo is None and cfg.model.hf_path is None:
        yield "model.hf_path=null names no teacher; set model.hf_path to a Hugging Face folder or a Hub id"
    if cfg.model.demo is not None and cfg.model.hf_path is not None:
        yield (
            f"model.hf_path={cfg.model.hf_path} and model.demo are both set, but the teacher is one or the other; "
            "set model.hf_path=null, or model.demo=null"
        )
    if cfg.model.demo is not None and cfg.model.shape is None:
        yield "model.shape=null, but a model made on the spot needs one; set model.shape (as in model=demo)"


def _shape(cfg: RunConfig) -> Iterator[str]:
    shape = cfg.model.shape
    if shape is not None and shape.num_attention_heads % shape.num_query_groups:
        yield (
            f"model.shape.num_attention_heads={shape.num_attention_heads} is not divisible by "
            f"model.shape.num_query_groups={shape.num_query_groups}; "
            f"set model.shape.num_query_groups to {any_of(divisors(shape.num_attention_heads))}"
        )
    if shape is not None:
        yield from _mixture(cfg.model.family, shape)


def _mixture(family: Family, shape: Shape) -> Iterator[str]:
    """Experts where the family has them, and nowhere else."""
    sizes = {f"model.shape.{name}": getattr(shape, name) for name in EXPERT_SIZES}
    if family is Family.qwen3_moe:
        lacking = [key for key, size in sizes.items() if size is None]
        if lacking:
            yield (
                f"model.family={family.value} is a mixture of experts, but {', '.join(lacking)} is null; set all of "
                f"{', '.join(sizes)}"
            )
        elif sizes["model.shape.moe_router_topk"] > sizes["model.shape.num_moe_experts"]:
            yield (
                f"model.shape.moe_router_topk={shape.moe_router_topk} experts a token are more than "
                f"model.shape.num_moe_experts={shape.num_moe_experts}; set it to at most {shape.num_moe_experts}"
            )
        return
    given = [f"{key}={size}" for key, size in sizes.items() if size is not None]
    if given:
        yield f"{', '.join(given)} describes experts, which model.family={family.value} has not; set null"


def _cluster(cfg: RunConfig) -> Iterator[str]:
    limit = cfg.cluster.time_limit
    if limit is not None:
        try:
            seconds_of_time_limit(limit)
        except ValueError as error:
            number = " (without quotes YAML reads 4:00:00 as a number)" if limit.isdecimal() else ""
            yield f"cluster.time_limit: {error}{number}; set cluster.time_limit='4:00:00' or '1-12:00:00'"


def _controls(cfg: RunConfig) -> Iterator[str]:
    controls = cfg.distill.controls
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        yield f"distill.controls={controls} names {unknown}, which is not known; set distill.controls={[*CONTROLS]}"
    if len(set(controls)) < len(controls):
        yield f"distill.controls={controls} names one twice; set distill.controls={sorted(set(controls))}"
    if cfg.distill.loss is Loss.ce and "ce" in controls:
        yield "distill.controls=['ce'] repeats what distill.loss=ce already trains; set distill.controls=[]"


# Training runs. Each rule is applied to each of them.


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What a rule needs to know of a training run: `at` is its config key, `shapes` the models it lays out, by role.

    `layout_at` is the key of what its phases share, where `at` is that of a phase.
    """

    training: Training
    at: str
    shapes: list[tuple[str, Shape]]
    ranks: int
    layout_at: str | None = None


TrainingRule = Callable[[TrainingRun], Iterator[str]]


def _plain(rule: Callable[[Training, str], Iterator[str]]) -> TrainingRule:
    return lambda run: rule(run.training, run.at)


class _With:
    """A training with the sizes of one of its phases."""

    def __init__(self, training: Training, sizes: dict[str, Any]) -> None:
        self._training, self._sizes = training, sizes

    def __getattr__(self, name: str) -> Any:
        return self._sizes[name] if name in self._sizes else getattr(self._training, name)


def _in_phases(rule: TrainingRule) -> TrainingRule:
    """A rule of sizes, applied to every phase as well: validation keeps to the training's own."""

    def apply(run: TrainingRun) -> Iterator[str]:
        yield from rule(run)
        for number, phase in enumerate(run.training.phases or ()):
            training = cast(Training, _With(run.training, phase_sizes(run.training, phase)))
            key = training_rules.phase_key(run.at, number)
            yield from rule(dataclasses.replace(run, training=training, at=key, layout_at=run.at))

    return apply


def _overlaps(run: TrainingRun) -> Iterator[str]:
    training, at = run.training, run.at
    # Megatron takes the overlap only with the distributed optimizer (distributed/distributed_data_parallel.py:368)
    # and asserts it when gathering (distributed/param_and_grad_buffer.py:280); otherwise it is silently left out.
    if training.overlap_param_gather and not training.use_distributed_optimizer:
        yield (
            f"{at}.overlap_param_gather=True needs {at}.use_distributed_optimizer=True; set that, or "
            f"{at}.overlap_param_gather=False"
        )


def _ranks(run: TrainingRun) -> Iterator[str]:
    training, at = run.training, run.at
    # megatron/core/parallel_state.py:698
    ranks, a_model = run.ranks, _model_parallel(training)
    if ranks % a_model:
        least = math.ceil(ranks / a_model) * a_model
        yield (
            f"cluster.nodes x cluster.devices_per_node={ranks} ranks is not a multiple of {a_model}, the product of "
            f"tensor, pipeline and context parallelism in {at}.parallel; start {least} ranks, or lower {at}.parallel"
        )


def _batches(run: TrainingRun) -> Iterator[str]:
    training, at = run.training, run.at
    # megatron/core/num_microbatches_calculator.py:340
    replicas = run.ranks // _model_parallel(training)
    step = training.micro_batch_size * max(replicas, 1)
    if training.global_batch_size % step:
        yield (
            f"{at}.global_batch_size={training.global_batch_size} is not divisible by {step} ({at}.micro_batch_size="
            f"{training.micro_batch_size} x {max(replicas, 1)} data-parallel ranks); "
            f"set {at}.global_batch_size to {any_of(around(training.global_batch_size, step))}"
        )


def _sequence(run: TrainingRun) -> Iterator[str]:
    training, at = run.training, run.at
    context, tensor = training.parallel.context_parallel_size, training.parallel.tensor_model_parallel_size
    for _, shape in run.shapes[:1]:
        if training.seq_length > shape.max_position_embeddings:
            yield too_long(f"{at}.seq_length", training.seq_length, shape)
    # Each context-parallel rank takes two pieces of a sequence (megatron/core/utils.py:1835), and sequence
    # parallelism cuts what a rank holds among the tensor-parallel ranks.
    pieces = 2 * context if context > 1 else 1
    if tensor > 1 and training.parallel.sequence_parallel:
        pieces = math.lcm(pieces, context * tensor)
    if training.seq_length % pieces:
        yield (
            f"{at}.seq_length={training.seq_length} is not divisible by the {pieces} pieces of a sequence that "
            f"{run.layout_at or at}.parallel asks for (context parallel {context}, tensor parallel {tensor}); "
            f"set {at}.seq_length to {any_of(around(training.seq_length, pieces))}"
        )


def _layers(run: TrainingRun) -> Iterator[str]:
    training, at = run.training, run.at
    # megatron/core/transformer/transformer_block.py:156
    stages = training.parallel.pipeline_model_parallel_size
    uneven = [f"the {who}'s {shape.num_layers}" for who, shape in run.shapes if shape.num_layers % stages]
    if uneven:
        yield (
            f"{at}.parallel.pipeline_model_parallel_size={stages} does not divide {' and '.join(uneven)} layers; "
            f"set it to {any_of(_common_divisors(run.shapes, ('num_layers',)))}"
        )


def _tensor(run: TrainingRun) -> Iterator[str]:
    training, at = run.training, run.at
    # megatron/core/transformer/transformer_config.py:742 and :758. NeMo takes the vocabulary as config.json has it, so
    # that nothing pads it (nemo/collections/llm/gpt/model/base.py:343, megatron/core/tensor_parallel/utils.py:108).
    size = training.parallel.tensor_model_parallel_size
    # Experts are not cut.
    mlp_sizes = () if _experts_of(run) else ("ffn_hidden_size",)
    names = ("num_attention_heads", "num_query_groups", *mlp_sizes, "vocab_size")
    uneven = [
        f"the {who}'s {name} {getattr(shape, name)}"
        for who, shape in run.shapes
        for name in names
        if getattr(shape, name) % size
    ]
    if uneven:
        yield (
            f"{at}.parallel.tensor_model_parallel_size={size} does not divide {', '.join(uneven)}; "
            f"set it to {any_of(_common_divisors(run.shapes, names))}"
        )


def _experts(run: TrainingRun) -> Iterator[str]:
    parallel, key = run.training.parallel, f"{run.at}.parallel.expert_model_parallel_size"
    size, stages = parallel.expert_model_parallel_size, parallel.pipeline_model_parallel_size
    if not run.shapes:
        return
    if not _experts_of(run):
        if size > 1:
            yield f"{key}={size} shares out experts, but the model has none; set {key}=1"
        return
    # megatron/core/transformer/moe/moe_layer.py:60
    if any(experts % size for experts in _experts_of(run)):
        counts = " and ".join(f"the {who}'s {shape.num_moe_experts}" for who, shape in run.shapes)
        fitting = any_of(divisors(math.gcd(*_experts_of(run))))
        yield f"{key}={size} does not divide {counts} experts; set {key} to {fitting}"
    # A pipeline stage's ranks share them, whatever else these divide (megatron/core/parallel_state.py:749, with experts
    # that are not cut).
    if run.ranks % stages == 0 and run.ranks // stages % size:
        yield (
            f"{key}={size} does not divide the {run.ranks // stages} ranks of a pipeline stage; set {key} to "
            f"{any_of(divisors(math.gcd(run.ranks // stages, *_experts_of(run))))}"
        )
    # megatron/core/transformer/moe/moe_layer.py:265
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            f"{run.at}.parallel.sequence_parallel=False does not go with tensor parallelism where there are experts; "
            f"set {run.at}.parallel.sequence_parallel=True"
        )


def _experts_of(run: TrainingRun) -> list[int]:
    """How many experts a layer of each model has; empty of dense models."""
    return [shape.num_moe_experts for _, shape in run.shapes if shape.num_moe_experts]


TRAINING_RULES: tuple[TrainingRule, ...] = (
    *(
        _plain(rule)
        for rule in (
            training_rules.schedule,
            training_rules.phases,
            training_rules.skip_steps,
        )
    ),
    _overlaps,
    _ranks,
    _in_phases(_batches),
    _in_phases(_sequence),
    _layers,
    _tensor,
    _experts,
)


def _of_distillation(rule: TrainingRule) -> Rule:
    def apply(cfg: RunConfig) -> Iterator[str]:
        yield from rule(TrainingRun(cfg.distill, "distill", _shapes(cfg), count_ranks(cfg)))

    return apply


def _of_demo(rule: TrainingRule) -> Rule:
    def apply(cfg: RunConfig) -> Iterator[str]:
        if cfg.model.demo is not None:
            yield from rule(TrainingRun(cfg.model.demo.training, "model.demo.training", _shapes(cfg)[:1], ranks=1))

    return apply


def _of_correction(rule: TrainingRule) -> Rule:
    def apply(cfg: RunConfig) -> Iterator[str]:
        training = cfg.distill.correct_teacher
        if training is not None:
            yield from rule(TrainingRun(training, "distill.correct_teacher", _shapes(cfg)[:1], count_ranks(cfg)))

    return apply


def _phase_weights(cfg: RunConfig) -> Iterator[str]:
    yield from training_rules.phase_weights(cfg.distill, "distill", sources(cfg.data))


def _tracker_packages(cfg: RunConfig) -> Iterator[str]:
    # What a container has is not to be seen from here.
    if cfg.cluster.slurm is None or cfg.cluster.slurm.container_image is None:
        yield from training_rules.tracker_packages(cfg.distill, "distill")


def _of_loss(rule: kd_rules.Rule) -> Rule:
    return lambda cfg: rule(cfg, dict(_shapes(cfg)))


def _shapes(cfg: RunConfig) -> list[tuple[str, Shape]]:
    """The models that a training run lays out; empty where the teacher's shape is not known."""
    if cfg.model.shape is None:
        return []
    between = [
        (f"model after round {number}", shape_to_prune(cfg, number)) for number in range(1, len(cfg.prune.rounds) + 1)
    ]
    return [("teacher", cfg.model.shape), *between, ("student", student_shape(cfg))]


def _missing_files(cfg: RunConfig) -> Iterator[str]:
    path = cfg.model.hf_path
    # Where the shape had to be read from it, its absence is known already.
    if path is not None and cfg.model.shape is not None and not may_be_hub_id(path) and not os.path.exists(_home(path)):
        yield f"model.hf_path={path} does not exist; set model.hf_path to a Hugging Face folder or a Hub id"


def _model_folder(cfg: RunConfig) -> Iterator[str]:
    path = cfg.model.hf_path
    folder = None if path is None else local_folder(path, cfg.model.revision)
    if path is None or folder is None:
        return
    # A folder in the Hub's cache may still lack what the run will download.
    complete = os.path.exists(_home(path))
    yield from model_folder.faults(folder, complete=complete, allow_pickle=cfg.convert.allow_pickle)


def _source_tokenizer(cfg: RunConfig) -> Iterator[str]:
    folder = cfg.data.source_tokenizer
    reads_ids = any(source.format is DocumentFormat.tokens for source in sources(cfg.data).values())
    if reads_ids and folder is not None and os.path.isdir(_home(folder)):
        yield from tokenizer_faults(Path(_home(folder)))


def _home(path: str) -> str:
    return os.path.expanduser(path)


def _model_parallel(run: Training) -> int:
    """Ranks that one copy of a model takes."""
    parallel = run.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _common_divisors(shapes: list[tuple[str, Shape]], names: tuple[str, ...]) -> list[int]:
    return divisors(math.gcd(*(getattr(shape, name) for _, shape in shapes for name in names)))


RULES: tuple[Rule, ...] = (
    _run_dir,
    _model,
    _shape,
    *data_rules.RULES,
    *prune_rules.RULES,
    *evaluation_rules.RULES,
    _cluster,
    _controls,
    *teacher_rules.RULES,
    *(_of_demo(rule) for rule in TRAINING_RULES),
    *(_of_distillation(rule) for rule in TRAINING_RULES),
    _phase_weights,
    *(_of_correction(rule) for rule in TRAINING_RULES),
    *(_of_loss(rule) for rule in kd_rules.RULES),
    *slurm_rules.RULES,
)

RULES_OF_FILES: tuple[Rule, ...] = (
    _missing_files,
    _model_folder,
    _source_tokenizer,
    _tracker_packages,
    *data_rules.RULES_OF_FILES,
    *evaluation_rules.RULES_OF_FILES,
    *slurm_rules.RULES_OF_FILES,
)
