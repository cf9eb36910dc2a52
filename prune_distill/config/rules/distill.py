"""Rules of the group `distill`, except for those of every training."""

from __future__ import annotations

from collections.abc import Iterator

from prune_distill.config.rule import Finding, rule
from prune_distill.config.rules.model import TEACHER
from prune_distill.config.rules.prune import STUDENT
from prune_distill.config.rules.quantize import is_kept, linear_layers
from prune_distill.config.rules.training import list_models
from prune_distill.config.values import require
from prune_distill.config.wording import any_of, quote_for_hydra
from prune_distill.model.student import student_shapes
from prune_distill.schema import (
    Divergence,
    Loss,
    LossImplementation,
    QuantFormat,
    Recompute,
    RunConfig,
    TeacherLogits,
)

# Further students that the stage table knows.
CONTROLS = ("ce", "scratch")
TOP_K, PAIRS, IMPLEMENTATION = (f"distill.kd.{name}" for name in ("top_k", "intermediate_pairs", "implementation"))
SWAP = "distill.swap_teacher_at_step"
PIPELINE = "distill.parallel.pipeline_model_parallel_size"
TENSOR = "distill.parallel.tensor_model_parallel_size"
QUANTIZE = "distill.quantize"
# Layers whose inputs tensor parallelism splits.
SPLIT_INPUTS = ("o_proj", "down_proj")
# Formats whose ranges follow from the weights and activations of each forward pass, without calibration.
LEARNED_FORMATS = (QuantFormat.fp8, QuantFormat.int8, QuantFormat.int4)


@rule("distill.controls", "distill.controls", "distill.loss")
def controls(cfg: RunConfig) -> Iterator[Finding]:
    key, names = "distill.controls", cfg.distill.controls
    unknown = [name for name in names if name not in CONTROLS]
    if unknown:
        yield Finding(key, f"contains the unknown names {unknown}; set {key}={quote_for_hydra([*CONTROLS])}")
    if len(set(names)) < len(names):
        yield Finding(key, f"a control is named twice; set {key}={quote_for_hydra(sorted(set(names)))}")
    if cfg.distill.loss is Loss.ce and "ce" in names:
        yield Finding(key, f"distill.loss=ce trains the same student; set {key}=[]")


@rule(
    "distill.teacher_logits", *(f"distill.{name}" for name in ("teacher_logits", "loss", "phases", "skip_steps", "kd"))
)
def cached_logits(cfg: RunConfig) -> Iterator[Finding]:
    """Refuse what needs more than the stored part of the teacher's distributions."""
    distill, kd, key = cfg.distill, cfg.distill.kd, "distill.teacher_logits"
    if distill.teacher_logits is TeacherLogits.live:
        return
    if distill.loss is Loss.ce:
        yield Finding(key, f"distill.loss=ce uses no teacher; set {key}=live")
    unsupported = {
        "distill.phases": (bool(distill.phases), "null"),
        "distill.skip_steps": (bool(distill.skip_steps), "[]"),
        "distill.kd.divergence": (kd.divergence is not Divergence.forward_kl, "forward_kl"),
        TOP_K: (kd.top_k is not None, "null (distill.cached_logits_top_k is the number of stored tokens)"),
        PAIRS: (bool(kd.intermediate_pairs), "[]"),
        IMPLEMENTATION: (kd.implementation is not LossImplementation.chunked, "chunked"),
    }
    for other, (is_set, supported) in unsupported.items():
        if is_set:
            fix = f"set {other}={supported}, or {key}=live"
            yield Finding(other, f"not supported by {key}=cached; {fix}")


@rule(
    "distill.cached_logits_top_k",
    *("distill.teacher_logits", "distill.cached_logits_top_k", "model.shape.vocab_size", *TEACHER),
)
def cached_logits_top_k(cfg: RunConfig) -> Iterator[Finding]:
    key, vocabulary = "distill.cached_logits_top_k", cfg.shared_vocabulary
    if cfg.distill.teacher_logits is TeacherLogits.cached and cfg.distill.cached_logits_top_k >= vocabulary:
        yield Finding(
            key,
            f"no less than the vocabulary of {vocabulary} tokens; set {key} to at most {vocabulary - 1}, such as 64",
        )


@rule("distill.teacher_correction", "distill.teacher_correction?", "distill.loss")
def correct_teacher(cfg: RunConfig) -> Iterator[Finding]:
    key = "distill.teacher_correction"
    if cfg.distill.teacher_correction is not None and cfg.distill.loss is Loss.ce:
        yield Finding(key, f"distill.loss=ce uses no teacher; set {key}=null")


@rule("distill.swap_teacher", SWAP, "distill.teacher_correction?", "distill.teacher_logits", "distill.max_steps")
def swap_teacher(cfg: RunConfig) -> Iterator[Finding]:
    distill, step = cfg.distill, cfg.distill.swap_teacher_at_step
    if step is None:
        return
    if distill.teacher_correction is None:
        other = "distill.teacher_correction"
        yield Finding(SWAP, f"no teacher is corrected; set {other}, or {SWAP}=null")
    if distill.teacher_logits is TeacherLogits.cached:
        fix = f"set distill.teacher_logits=live, or {SWAP}=null"
        yield Finding(SWAP, f"distill.teacher_logits=cached runs no teacher; {fix}")
    if step >= distill.max_steps:
        yield Finding(
            SWAP, f"not below distill.max_steps={distill.max_steps}; set {SWAP} to at most {distill.max_steps - 1}"
        )


@rule("kd.top_k", TOP_K, "model.shape.vocab_size", *TEACHER)
def top_k(cfg: RunConfig) -> Iterator[Finding]:
    count, vocabulary = cfg.distill.kd.top_k, cfg.shared_vocabulary
    if count is not None and count >= vocabulary:
        yield Finding(TOP_K, f"covers the whole vocabulary of {vocabulary} tokens; set {TOP_K} to null or to less")


@rule("kd.divergence", TOP_K, "distill.kd.divergence")
def divergence(cfg: RunConfig) -> Iterator[Finding]:
    kd, other = cfg.distill.kd, "distill.kd.divergence"
    if kd.top_k is not None and kd.divergence is not Divergence.forward_kl:
        yield Finding(
            TOP_K,
            f"supported with forward KL only, not with {other}={kd.divergence.value}; set {other}=forward_kl, or "
            f"{TOP_K}=null",
        )


@rule("kd.implementation", TOP_K, "distill.kd.divergence", IMPLEMENTATION)
def implementation(cfg: RunConfig) -> Iterator[Finding]:
    """Refuse what LogitsKLLoss (nemo/collections/llm/modelopt/distill/loss.py:138) and the kernels do not support."""
    kd = cfg.distill.kd
    if kd.implementation is LossImplementation.chunked:
        return
    upstream = kd.implementation is LossImplementation.upstream
    unsupported = {
        "distill.kd.divergence=jensen_shannon": upstream and kd.divergence is Divergence.jensen_shannon,
        f"{TOP_K}={kd.top_k}": kd.top_k is not None,
    }
    settings = [setting for setting, is_set in unsupported.items() if is_set]
    if settings:
        yield Finding(IMPLEMENTATION, f"does not support {' and '.join(settings)}; set {IMPLEMENTATION}=chunked")


@rule("kd.pairs", PAIRS, *STUDENT, *TEACHER)
def pairs(cfg: RunConfig) -> Iterator[Finding]:
    """Require layers that exist, once each.

    ModelOpt's hooks pass a layer's output to one loss only (modelopt/torch/distill/distillation_model.py:237).
    """
    for side, who, count in _layers(cfg):
        named = [getattr(pair, side) for pair in cfg.distill.kd.intermediate_pairs]
        outside = [layer for layer in named if not 1 <= layer <= count]
        if outside:
            yield Finding(PAIRS, f"the {who} has no layers {outside}; set numbers from 1 to {count}")
    for side in ("teacher", "student"):
        named = [getattr(pair, side) for pair in cfg.distill.kd.intermediate_pairs]
        repeated = sorted({layer for layer in named if named.count(layer) > 1})
        if repeated:
            yield Finding(PAIRS, f"layers {repeated} of the {side} are named more than once; name each once")


@rule("kd.pairs_recompute", PAIRS, "distill.recompute")
def pairs_recompute(cfg: RunConfig) -> Iterator[Finding]:
    """A layer that is computed again runs without gradients the first time, when hooks see its output
    (megatron/core/tensor_parallel/random.py:CheckpointFunction)."""
    if cfg.distill.kd.intermediate_pairs and cfg.distill.recompute is Recompute.full:
        fix = f"set distill.recompute=selective, or {PAIRS}=[]"
        yield Finding(PAIRS, f"without effect with distill.recompute=full; {fix}")


@rule("kd.pairs_pipeline", PAIRS, PIPELINE, *STUDENT, *TEACHER)
def pairs_pipeline(cfg: RunConfig) -> Iterator[Finding]:
    """Hooks see the layers of their own pipeline stage only."""
    stages = cfg.distill.parallel.pipeline_model_parallel_size
    for side, who, count in _layers(cfg):
        first = count - count // stages + 1
        early = [layer for pair in cfg.distill.kd.intermediate_pairs if (layer := getattr(pair, side)) < first]
        if stages > 1 and early:
            yield Finding(
                PAIRS,
                f"layers {early} of the {who} are not on the last of {PIPELINE}={stages} stages, where the loss is; "
                f"name layers from {first} to {count}, or set {PIPELINE}=1",
            )


@rule("distill.quantize", QUANTIZE, "quantize.formats", "model.shape.num_moe_experts", "distill.fp8")
def quantize(cfg: RunConfig) -> Iterator[Finding]:
    found = cfg.distill.quantize
    if found is None:
        return
    if found not in LEARNED_FORMATS:
        known = any_of([name.value for name in LEARNED_FORMATS])
        yield Finding(QUANTIZE, f"its ranges come from a calibration before training; set {QUANTIZE} to {known}")
    elif found not in cfg.quantize.formats:
        formats = quote_for_hydra([name.value for name in (*cfg.quantize.formats, found)])
        yield Finding(
            QUANTIZE,
            f"the student learns a format that no stage writes; set quantize.formats={formats}, or {QUANTIZE}=null",
        )
    if cfg.distill.fp8 is not None:
        # ModelOpt's layer spec has Megatron's own linear layers, which know no FP8.
        yield Finding(
            QUANTIZE, f"distill.fp8={cfg.distill.fp8.value} computes with other scales; set one of the two to null"
        )
    if require(cfg.model.shape).num_moe_experts is not None:
        # ModelOpt's layer spec computes one expert after the other (megatron's model_specs.py:171).
        yield Finding(QUANTIZE, f"not supported for mixtures of experts; set {QUANTIZE}=null")


@rule("distill.quantize_split", QUANTIZE, "quantize.int4_group_size", "quantize.keep", TENSOR, *STUDENT)
def quantize_split(cfg: RunConfig) -> Iterator[Finding]:
    """Report groups of weights that tensor parallelism would split."""
    group, ranks = cfg.quantize.int4_group_size, cfg.distill.parallel.tensor_model_parallel_size
    if cfg.distill.quantize is not QuantFormat.int4 or ranks == 1:
        return
    split = {
        f"{layer.size} {layer.inputs}"
        for shape in student_shapes(cfg)
        for layer in linear_layers(shape, cfg.model.family.traits.gated_mlp)
        if layer.name.endswith(SPLIT_INPUTS) and layer.inputs % (group * ranks) and not is_kept(cfg, layer.name)
    }
    if split:
        yield Finding(
            TENSOR,
            f"splits groups of quantize.int4_group_size={group} weights of the student's {', '.join(sorted(split))};"
            " lower one of the two",
        )


def _layers(cfg: RunConfig) -> list[tuple[str, str, int]]:
    """The number of layers of each model, with its side of a pair and its role."""
    return [("teacher" if who == "teacher" else "student", who, shape.num_layers) for who, shape in list_models(cfg)]
