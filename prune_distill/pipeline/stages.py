"""The stage table: the stages of a run and their inputs. No torch, no NeMo.

A stage is a module with a dataclass `Inputs` and a function `run(cfg, inputs, out) -> metrics`, which the runner
imports and calls: `python -m recipes NAME --config RUN_DIR/resolved.yaml`. Stages know each other only through this
table: an input is the folder of another complete stage, or a file of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from prune_distill.config.values import (
    cache_stage_settings,
    count_ranks,
    on_policy_settings,
    replace_values,
    require,
)
from prune_distill.model.student import MOST_ROUNDS, needs_importance, round_settings
from prune_distill.pipeline import stage_inputs as inputs
from prune_distill.pipeline.names import REPORT, cache_stage
from prune_distill.pipeline.stage import Output, Source, Stage
from prune_distill.schema import (
    MOST_ON_POLICY_ROUNDS,
    MOST_SOURCE_TEACHERS,
    Engine,
    GenerationEngine,
    Init,
    Loss,
    Packing,
    QuantFormat,
    RunConfig,
    TeacherLogits,
)

# Settings for exporting and scoring a candidate. Successive halving depends on no other settings of the evaluation.
SCORING = ("evaluate.continuations", "evaluate.num_fewshot", "evaluate.task_limit", "convert.export_dtype")
CALIBRATION = ("prune.calibration_samples", "prune.calibration_seq_length")
# Values that only appear on model cards. A new name does not require writing the weights again.
ON_CARDS = ("name", "model.name", "model.hf_path")
# A control has no teacher, so settings of the teacher must not affect it.
NO_TEACHER = {
    "distill.loss": Loss.ce,
    "distill.teacher_logits": TeacherLogits.live,
    "distill.teacher_fp8": False,
    "distill.swap_teacher_at_step": None,
}
CONTROLS: Mapping[str, Mapping[str, Any]] = {"ce": NO_TEACHER, "scratch": {**NO_TEACHER, "distill.init": Init.random}}

# Only quantized models are measured with another engine.
UNQUANTIZED = {"evaluate.engine": Engine.transformers}

# Keys that stages read without hashing them, each with the reason (`Stage.reads`).
REVISION = {"model.revision": "part of the identity of the teacher's files, an input"}
LENGTH_OF_TRAINING = ("max_steps", "seq_length", "global_batch_size", "phases")
RATES = ("lr", "min_lr", "warmup_steps")
READ_BY_PREPARE_DATA = {
    **REVISION,
    **dict.fromkeys(
        (f"distill.{name}" for name in (*LENGTH_OF_TRAINING, *RATES)),
        "for a warning that documents are repeated",
    ),
}
SOURCES_OF_CACHES = {"data.sources": "which of them have other teachers, in the hash of the caches"}
READ_BY_SIGNAL = {
    **SOURCES_OF_CACHES,
    **dict.fromkeys(("teacher", "model.shape"), "for sources with teachers of their own, with which they are hashed"),
    "distill.phases": "null with cached logits, as prune_distill.config.rules.teacher checks",
    "distill.skip_steps": "empty with cached logits, as prune_distill.config.rules.teacher checks",
    "distill.val_batches": "for the check that there are enough validation documents",
    "distill.fp8": "the scales of a teacher in FP8, in the hash if distill.teacher_fp8 is set",
    **dict.fromkeys((f"distill.{name}" for name in RATES), "part of a phase, without changing its sequences"),
}
ORIGINAL_NAME = {"teacher.hf_path": "for the name of the model that is pruned, in a plot"}
READ_BY_SEARCH = {**ORIGINAL_NAME, "model.family": "in the hash of hf_to_nemo, an input"}
# Of `distill.quantize`, which needs them in the hash (`_fake_quantization`).
READ_BY_FAKE_QUANTIZERS = dict.fromkeys(
    ("quantize.int4_group_size", "quantize.keep"), "used with distill.quantize, which adds them to the hash"
)
READ_BY_HALVING = {
    **ORIGINAL_NAME,
    **READ_BY_FAKE_QUANTIZERS,
    **REVISION,
    "evaluate.tasks": "the available tasks; the measured one is in the prune section",
    "evaluate.seq_length": "for an estimate of memory",
    "model.name": "on the cards of exported candidates, which are removed after scoring",
}
# For the utilization in metrics.jsonl, which is computed from the sizes of the student and the teacher.
READ_BY_DISTILL = {
    **READ_BY_FAKE_QUANTIZERS,
    **SOURCES_OF_CACHES,
    **dict.fromkeys(
        ("model.shape", "model.family", "teacher", "prune", "convert.export_dtype"),
        "for the speed in metrics.jsonl; weights depend on the input models",
    ),
}
READ_BY_EXPORT = {
    **REVISION,
    **dict.fromkeys(("distill", "teacher", "data.sources"), "for cards; in the hash of the distillation, an input"),
}
READ_BY_QUANTIZE = {
    **dict.fromkeys(
        ("quantize.calibration_samples", "quantize.calibration_seq_length"),
        "for the number of sequences in the log, of which these formats use one to check the result",
    ),
    "quantize.int4_group_size": "used by int4, which has it in its hash",
    "distill.quantize": "in the hash of distill, whose student is the input",
}
READ_BY_EVALUATE = {
    **REVISION,
    "teacher.revision": "part of the identity of the teacher's files, an input",
    "convert.export_dtype": "in the hash of nemo_to_hf, an input",
    "distill": "for the recovery curve; in the hash of the distillation, whose checkpoints are then an input",
    "model.name": "on the cards of exported checkpoints, which are removed after the measurement",
}
READ_BY_REPORT = {
    "prune": "in the hash of prune, an input",
    "distill": "in the hash of distill, an input",
    "evaluate.seq_length": "in the hash of evaluate, an input",
    "evaluate.max_sequences": "in the hash of evaluate, an input",
    "model.shape": "read from the teacher's files, inputs of stages that are inputs",
    "teacher": "in the hash of hf_to_nemo.teacher, an input",
    "data.sources": "in the hash of prepare_data, an input; their teachers in those of the caches",
}


def _fake_quantization(cfg: RunConfig) -> tuple[str, ...]:
    """Return the keys that decide a distillation's fake quantization, besides `distill.quantize`."""
    if cfg.distill.quantize is None:
        return ()
    group = ("quantize.int4_group_size",) if cfg.distill.quantize is QuantFormat.int4 else ()
    return ("quantize.keep", *group)


def _cached_sequences(cfg: RunConfig) -> tuple[str, ...]:
    """Return the keys that decide cached logits where they are set."""
    fp8 = ("distill.fp8",) if cfg.distill.teacher_fp8 else ()
    own = () if cfg.cached_sources is None else ("cached_sources", "shared_vocabulary")
    return (*fp8, *(("distill.packing",) if cfg.distill.packing is Packing.documents else ()), *own)


def _is_verified(cfg: RunConfig) -> bool:
    return cfg.evaluate.verify_tokens > 0


def _as_model(cfg: RunConfig, number: int = 0) -> dict[str, Any]:
    """Return the settings of a stage for which a teacher of its own is the model; `number`: of one of sources."""
    teacher = [cfg.teacher, *cfg.source_teachers][number]
    return {f"model.{name}": getattr(teacher, name) for name in ("hf_path", "revision", "family", "shape")}


def _scoring_libraries(cfg: RunConfig) -> tuple[str, ...]:
    tasks = ("lm_eval",) if cfg.evaluate.tasks or cfg.evaluate.continuations is not None else ()
    return (*tasks, "vllm") if cfg.evaluate.engine is Engine.vllm else tasks


def _calibration_ranks(cfg: RunConfig) -> int:
    return cfg.prune.pipeline_model_parallel_size


def _prune_ranks(cfg: RunConfig) -> int:
    return cfg.prune.pipeline_model_parallel_size * cfg.prune.tensor_model_parallel_size


def _is_control(cfg: RunConfig, name: str) -> bool:
    return name in cfg.distill.controls


# Rows with variants.
IMPORTANCE = Stage(
    "importance",
    "recipes.importance",
    CALIBRATION,
    inputs.importance_inputs,
    _calibration_ranks,
    wanted=lambda cfg: needs_importance(cfg.prune),
    needs_nemo=True,
)
PRUNE = Stage("prune", "recipes.prune", ("prune",), inputs.prune_inputs, _prune_ranks, needs_nemo=True)
DISTILL = Stage(
    "distill",
    "recipes.distill",
    ("distill",),
    inputs.distill_inputs,
    count_ranks,
    trains=True,
    more_sections=_fake_quantization,
    reads=READ_BY_DISTILL,
    needs_nemo=True,
)
CACHE_LOGITS = Stage(
    "cache_logits",
    "recipes.cache_logits",
    (
        *("distill.max_steps", "distill.seq_length", "distill.global_batch_size", "distill.precision"),
        *("distill.float32_matmul_precision", "distill.kd.temperature", "distill.cached_logits_top_k"),
        "distill.teacher_fp8",
    ),
    inputs.cache_logits_inputs,
    count_ranks,
    more_sections=_cached_sequences,
    wanted=lambda cfg: cfg.distill.reads_cached_logits and 0 in (cfg.teacher_numbers.values() or [0]),
    settings=partial(cache_stage_settings, number=0),
    trains=True,
    reads=READ_BY_SIGNAL,
    needs_nemo=True,
)
HF_TO_NEMO = Stage(
    "hf_to_nemo",
    "convert.hf_to_nemo",
    ("model.family", "convert.allow_pickle"),
    inputs.hf_to_nemo_inputs,
    reads=REVISION,
)
VERIFY_IMPORT = Stage(
    "verify_import",
    "convert.verify",
    ("evaluate.verify_tokens",),
    inputs.verify_import_inputs,
    wanted=_is_verified,
    reads=REVISION,
    gate=True,
    needs_nemo=True,
)
NEMO_TO_HF = Stage(
    "nemo_to_hf",
    "convert.nemo_to_hf",
    ("convert.export_dtype",),
    inputs.nemo_to_hf_inputs,
    shows=ON_CARDS,
    reads=READ_BY_EXPORT,
)
# Its variants are the rounds.
GENERATE = Stage(
    "generate",
    "recipes.generate",
    ("distill.on_policy", "distill.seq_length"),
    partial(inputs.generate_inputs, number=1),
    # A node for each task.
    lambda cfg: cfg.cluster.devices_per_node,
    libraries=lambda cfg: ("vllm",) if require(cfg.distill.on_policy).engine is GenerationEngine.vllm else (),
    tasks=lambda cfg: require(cfg.distill.on_policy).array_tasks,
)
EVALUATE = Stage(
    "evaluate",
    "recipes.evaluate",
    ("evaluate",),
    inputs.evaluate_inputs,
    count_ranks,
    settings=lambda cfg: UNQUANTIZED,
    libraries=_scoring_libraries,
    reads=READ_BY_EVALUATE,
)
# Of a model that has no recovery curve.
EVALUATE_OTHER = replace(EVALUATE, settings=lambda cfg: {"evaluate.recovery": False, **UNQUANTIZED})


def _train_control(name: str, settings: Mapping[str, Any]) -> Stage:
    """Return the stage that trains a control, a student without a teacher, which the report compares."""
    wanted = partial(_is_control, name=name)
    return replace(DISTILL, name=f"distill.{name}", wanted=wanted, settings=lambda cfg: settings)


def _export_control(name: str) -> Stage:
    sources = partial(inputs.export_control_inputs, name=name)
    return replace(NEMO_TO_HF, name=f"nemo_to_hf.{name}", inputs=sources, wanted=partial(_is_control, name=name))


def _evaluate_control(name: str) -> Stage:
    sources = partial(inputs.evaluate_control_inputs, name=name)
    return replace(EVALUATE_OTHER, name=f"evaluate.{name}", inputs=sources, wanted=partial(_is_control, name=name))


def _is_quantized(cfg: RunConfig, quant_format: QuantFormat) -> bool:
    return quant_format in cfg.quantize.formats


def _quantize(quant_format: QuantFormat) -> Stage:
    """Return the stage that writes the student in a quantized format."""
    calibration = ("quantize.calibration_samples", "quantize.calibration_seq_length")
    group = ("quantize.int4_group_size",) if quant_format is QuantFormat.int4 else ()

    def calibrated(cfg: RunConfig) -> tuple[str, ...]:
        return calibration if quant_format.calibrated or cfg.quantize.fp8_kv_cache else ()

    return Stage(
        f"quantize.{quant_format.value}",
        "recipes.quantize",
        ("quantize.formats", "quantize.keep", "quantize.fp8_kv_cache", *group),
        inputs.quantize_inputs,
        more_sections=calibrated,
        wanted=partial(_is_quantized, quant_format=quant_format),
        settings=lambda cfg: {"quantize.formats": [quant_format]},
        shows=("name",),
        reads=READ_BY_QUANTIZE,
        needs_nemo=True,
    )


def _evaluate_quantized(quant_format: QuantFormat) -> Stage:
    sources = partial(inputs.evaluate_quantized_inputs, quant_format=quant_format)
    wanted = partial(_is_quantized, quant_format=quant_format)
    settings = {"evaluate.recovery": False}
    name = f"evaluate.{quant_format.value}"
    return replace(EVALUATE, name=name, inputs=sources, wanted=wanted, settings=lambda cfg: settings)


def _round(number: int) -> tuple[Stage, ...]:
    """Return the stages of a round of pruning before the last one."""
    suffix = f".round{number}"
    settings = partial(round_settings, number=number)

    def is_wanted(cfg: RunConfig) -> bool:
        return len(cfg.prune.rounds) >= number

    def is_importance_wanted(cfg: RunConfig) -> bool:
        return is_wanted(cfg) and needs_importance(replace_values(cfg, settings(cfg)).prune)

    prune_inputs = partial(inputs.prune_inputs, suffix=suffix)
    distill_inputs = partial(inputs.distill_inputs, suffix=suffix)
    return (
        replace(IMPORTANCE, name=f"importance{suffix}", wanted=is_importance_wanted, settings=settings),
        replace(PRUNE, name=f"prune{suffix}", inputs=prune_inputs, wanted=is_wanted, settings=settings),
        replace(DISTILL, name=f"distill{suffix}", inputs=distill_inputs, wanted=is_wanted, settings=settings),
    )


def _import_source_teacher(number: int) -> tuple[Stage, ...]:
    """Return the stages that convert and check a teacher of single sources."""

    def is_wanted(cfg: RunConfig) -> bool:
        return len(cfg.source_teachers) >= number

    suffix, settings = f".source_teacher{number}", partial(_as_model, number=number)
    converted = partial(inputs.import_source_teacher_inputs, number=number)
    checked = partial(inputs.verify_source_teacher_inputs, number=number)
    return (
        replace(HF_TO_NEMO, name=f"hf_to_nemo{suffix}", inputs=converted, wanted=is_wanted, settings=settings),
        replace(
            VERIFY_IMPORT,
            name=f"verify_import{suffix}",
            inputs=checked,
            wanted=lambda cfg: is_wanted(cfg) and _is_verified(cfg),
            settings=settings,
        ),
    )


def _cache_source_teacher(number: int) -> Stage:
    """Return the stage that caches the logits of a teacher of single sources, of their sequences."""
    return replace(
        CACHE_LOGITS,
        name=cache_stage(number),
        inputs=partial(inputs.cache_source_teacher_inputs, number=number),
        wanted=lambda cfg: cfg.distill.reads_cached_logits and len(cfg.source_teachers) >= number,
        settings=partial(cache_stage_settings, number=number),
    )


def _on_policy_round(number: int) -> tuple[Stage, ...]:
    """Return the stages of an on-policy round: its student's export, the completions, and the training on them."""

    def is_wanted(cfg: RunConfig, row: Stage) -> bool:
        rounds = 0 if cfg.distill.on_policy is None else cfg.distill.on_policy.rounds
        return rounds >= number and row.wanted(cfg)

    def variant(row: Stage, sources: Callable[..., inputs.Sources], **changes: Any) -> Stage:
        wanted, sources = partial(is_wanted, row=row), partial(sources, number=number)
        return replace(row, name=f"{row.name}.on_policy{number}", inputs=sources, wanted=wanted, **changes)

    settings = partial(on_policy_settings, number=number)
    # The share of completions is the weight of a phase.
    cached = replace(CACHE_LOGITS, sections=(*CACHE_LOGITS.sections, "distill.phases"), settings=settings)
    return (
        variant(NEMO_TO_HF, inputs.export_on_policy_inputs),
        variant(GENERATE, inputs.generate_inputs, settings=settings),
        variant(cached, inputs.cache_on_policy_inputs),
        variant(DISTILL, inputs.distill_on_policy_inputs, settings=settings),
    )


def _report_inputs(cfg: RunConfig) -> dict[str, Source]:
    # Metrics and model cards, not weights.
    read = ("*.json", "*.jsonl", "*README.md")
    return {stage.name: Output(stage.name, files=read) for stage in select_stages(cfg) if stage.name != REPORT}


STAGES: tuple[Stage, ...] = (
    Stage(
        "demo_model",
        "recipes.demo_model",
        ("model",),
        lambda cfg: {},
        wanted=lambda cfg: cfg.model.demo is not None,
        trains=True,
        needs_nemo=True,
    ),
    Stage(
        "prepare_data",
        "recipes.prepare_data",
        ("data",),
        inputs.prepare_data_inputs,
        limits={"data.max_invalid_fraction": "worst_bad_share"},
        reads=READ_BY_PREPARE_DATA,
        tasks=lambda cfg: cfg.data.array_tasks,
    ),
    HF_TO_NEMO,
    replace(
        HF_TO_NEMO,
        name="hf_to_nemo.teacher",
        inputs=inputs.import_teacher_inputs,
        wanted=lambda cfg: cfg.has_own_teacher,
        settings=_as_model,
    ),
    VERIFY_IMPORT,
    replace(
        VERIFY_IMPORT,
        name="verify_import.teacher",
        inputs=inputs.verify_teacher_inputs,
        wanted=lambda cfg: cfg.has_own_teacher and _is_verified(cfg),
        settings=_as_model,
    ),
    *(stage for number in range(1, MOST_SOURCE_TEACHERS + 1) for stage in _import_source_teacher(number)),
    Stage(
        "correct_teacher",
        "recipes.correct_teacher",
        ("distill.teacher_correction",),
        inputs.correct_teacher_inputs,
        count_ranks,
        wanted=lambda cfg: cfg.distill.teacher_correction is not None,
        trains=True,
        needs_nemo=True,
    ),
    *(stage for number in range(1, MOST_ROUNDS + 1) for stage in _round(number)),
    IMPORTANCE,
    Stage(
        "search",
        "recipes.search",
        # Parallelism is placement elsewhere, but here it restricts the candidates to shapes that it divides.
        ("prune", "model.shape", "convert.export_dtype", "distill.parallel"),
        inputs.search_inputs,
        _calibration_ranks,
        wanted=lambda cfg: cfg.prune.budget is not None,
        reads=READ_BY_SEARCH,
        needs_nemo=True,
    ),
    Stage(
        "successive_halving",
        "recipes.successive_halving",
        ("prune", "distill"),
        inputs.successive_halving_inputs,
        count_ranks,
        wanted=lambda cfg: cfg.prune.successive_halving is not None,
        trains=True,
        more_sections=lambda cfg: (*_fake_quantization(cfg), *(SCORING if inputs.is_scored(cfg) else ())),
        libraries=lambda cfg: ("lm_eval",) if inputs.is_scored(cfg) else (),
        reads=READ_BY_HALVING,
        needs_nemo=True,
    ),
    PRUNE,
    CACHE_LOGITS,
    *map(_cache_source_teacher, range(1, MOST_SOURCE_TEACHERS + 1)),
    DISTILL,
    *(stage for number in range(1, MOST_ON_POLICY_ROUNDS + 1) for stage in _on_policy_round(number)),
    *(_train_control(name, settings) for name, settings in CONTROLS.items()),
    NEMO_TO_HF,
    replace(
        NEMO_TO_HF,
        name="nemo_to_hf.teacher",
        inputs=inputs.export_teacher_inputs,
        wanted=lambda cfg: cfg.has_own_teacher and cfg.distill.teacher_correction is not None,
        settings=_as_model,
    ),
    *(_export_control(name) for name in CONTROLS),
    Stage(
        "verify",
        "convert.verify",
        ("evaluate.verify_tokens",),
        inputs.verify_inputs,
        wanted=_is_verified,
        reads=REVISION,
        needs_nemo=True,
    ),
    *map(_quantize, QuantFormat),
    EVALUATE,
    *(_evaluate_control(name) for name in CONTROLS),
    *map(_evaluate_quantized, QuantFormat),
    Stage(
        "benchmark",
        "recipes.benchmark",
        ("benchmark",),
        inputs.benchmark_inputs,
        wanted=lambda cfg: cfg.benchmark.enabled,
        libraries=lambda cfg: ("vllm",) if cfg.benchmark.engine is Engine.vllm else (),
        reads=REVISION,
    ),
    Stage(
        REPORT,
        "recipes.report",
        ("name", "model.name", "benchmark.cost_per_hour"),
        _report_inputs,
        folder=REPORT,
        reads=READ_BY_REPORT,
    ),
)


def select_stages(cfg: RunConfig) -> list[Stage]:
    """Select the stages that a config needs, in order."""
    return [stage for stage in STAGES if stage.wanted(cfg)]


def find(name: str) -> Stage:
    """Find a stage by name. Raises: KeyError, with all names."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise KeyError(f"no stage {name!r}; use one of {', '.join(stage.name for stage in STAGES)}")
