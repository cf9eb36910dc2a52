"""Rules of FP8: what Transformer Engine's FP8 products need of the precision, the sizes and the GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prune_distill.config.rule import Finding, rule
from prune_distill.config.rules.model import OWN_LAYOUT, TEACHER
from prune_distill.config.rules.prune import SHAPE
from prune_distill.config.rules.training import (
    CACHE,
    CONTEXT,
    DISTILL,
    MODELS,
    SEQUENCE_PARALLEL,
    SHARED_LAYOUT,
    SIZES,
    TENSOR,
    get_training,
    list_models,
    teacher_shares_layout,
    training_rule,
    with_phases,
)
from prune_distill.config.values import require
from prune_distill.config.wording import any_of, around
from prune_distill.model.student import student_shapes
from prune_distill.schema import Fp8, Loss, Precision, RunConfig, Shape

TEACHER_FP8 = "distill.teacher_fp8"
KEYS = ("{at}.fp8", TEACHER_FP8, "distill.loss")
# The lowest compute capability (transformer_engine/pytorch/quantization.py: check_fp8_support,
# check_fp8_block_scaling_support).
CAPABILITY = {Fp8.hybrid: 8.9, Fp8.blockwise: 9.0}
# What tokens and features come in multiples of. FP8 products need 16: transformer_engine/pytorch/utils.py:438 asserts
# 16 features, and 8 tokens, over which the gradient of a weight is summed as another product. With blocks, inputs that
# are not whole ones are gathered in bf16 (transformer_engine/pytorch/tensor/float8_blockwise_tensor.py:is_quantizable).
MULTIPLE = {Fp8.hybrid: 16, Fp8.blockwise: 128}


@rule("distill.teacher_fp8", TEACHER_FP8, "distill.loss")
def teacher(cfg: RunConfig) -> Iterator[Finding]:
    if cfg.distill.teacher_fp8 and cfg.distill.loss is Loss.ce:
        yield Finding(TEACHER_FP8, f"distill.loss=ce uses no teacher; set {TEACHER_FP8}=false")


@training_rule("training.fp8_precision", *KEYS, "{at}.precision")
def precision(cfg: RunConfig, at: str) -> Iterator[Finding]:
    for key in _requested(cfg, at):
        if get_training(cfg, at).precision is not Precision.bf16:
            yield Finding(key, f"needs {at}.precision=bf16; set that, or {_without(key)}")


@training_rule(
    "training.fp8_gpu", *KEYS, *(f"cluster.gpu?.{name}" for name in ("fp8_tflops", "compute_capability", "name"))
)
def gpu(cfg: RunConfig, at: str) -> Iterator[Finding]:
    gpu = cfg.cluster.gpu
    if gpu is None:
        return
    for key, fp8 in _requested(cfg, at).items():
        found, needed = gpu.compute_capability, CAPABILITY[fp8]
        if gpu.fp8_tflops is None:
            yield Finding(
                key,
                f"the GPU ({gpu.name}) has no FP8, as cluster.gpu.fp8_tflops=null says; choose another cluster.gpu, or "
                f"set {_without(key)}",
            )
        elif found is not None and found < needed:
            yield Finding(
                key,
                f"{fp8.value} scales need a GPU of compute capability {needed}, and cluster.gpu.compute_capability="
                f"{found} ({gpu.name}); choose another cluster.gpu, or set {_without(key)}",
            )


@training_rule("training.fp8_sizes", *KEYS, TENSOR, MODELS)
def sizes(cfg: RunConfig, at: str) -> Iterator[Finding]:
    tensor = get_training(cfg, at).parallel.tensor_model_parallel_size
    for key, fp8 in _in_layout(cfg, at).items():
        yield from _odd_sizes(key, fp8, _models(cfg, at, key), f"{at}.parallel", tensor)


@rule("teacher.fp8_sizes", "distill.fp8", TEACHER_FP8, "distill.loss", TENSOR.format(at=CACHE), *SHAPE, *TEACHER)
def cache_sizes(cfg: RunConfig) -> Iterator[Finding]:
    tensor = get_training(cfg, CACHE).parallel.tensor_model_parallel_size
    if (fp8 := _requested(cfg, DISTILL).get(TEACHER_FP8)) is not None:
        yield from _odd_sizes(TEACHER_FP8, fp8, list_models(cfg, CACHE), f"{CACHE}.parallel", tensor)


def _odd_sizes(key: str, fp8: Fp8, models: list[tuple[str, Shape]], parallel: str, tensor: int) -> Iterator[Finding]:
    """Report sizes on a rank that FP8 products cannot have; `parallel`: the key of the layout."""
    multiple = MULTIPLE[fp8]
    odd = [
        f"the {who}'s {name} {size}" + (f" / {shares} = {size // shares}" if shares > 1 else "")
        for who, shape in models
        for name, size, shares in _features(shape, tensor)
        # Another rule refuses what is not divided.
        if size % shares == 0 and size // shares % multiple
    ]
    if odd:
        lower = f"lower {parallel}.tensor_model_parallel_size={tensor}, " if tensor > 1 else ""
        yield Finding(
            key,
            f"{fp8.value} FP8 needs multiples of {multiple} on a rank, unlike {', '.join(dict.fromkeys(odd))}; "
            f"{lower}prune to other sizes, or set {_without(key)}",
        )


@rule(
    "teacher.fp8_tokens",
    *("distill.fp8", TEACHER_FP8, "distill.loss", "distill.seq_length", "distill.micro_batch_size", *OWN_LAYOUT),
)
def cache_tokens(cfg: RunConfig) -> Iterator[Finding]:
    fp8, own = _requested(cfg, DISTILL).get(TEACHER_FP8), cfg.teacher
    if fp8 is None or (own.parallel is None and own.micro_batch_size is None):
        return
    length, micro = cfg.distill.seq_length, own.micro_batch_size or cfg.distill.micro_batch_size
    if length * micro % MULTIPLE[fp8]:
        fitting = any_of(around(micro, MULTIPLE[fp8] // math.gcd(MULTIPLE[fp8], length)))
        yield Finding(
            TEACHER_FP8,
            f"{fp8.value} FP8 needs multiples of {MULTIPLE[fp8]} tokens on a rank, unlike {micro} sequences of "
            f"distill.seq_length={length}; set teacher.micro_batch_size to {fitting}, or {_without(TEACHER_FP8)}",
        )


@training_rule("training.fp8_tokens", *KEYS, *SIZES, TENSOR, CONTEXT, SEQUENCE_PARALLEL, *SHARED_LAYOUT)
def tokens(cfg: RunConfig, at: str) -> Iterator[Finding]:
    parallel = get_training(cfg, at).parallel
    tensor = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    shares = parallel.context_parallel_size * tensor
    for key, fp8 in _in_layout(cfg, at).items():
        for where, training in with_phases(get_training(cfg, at), at):
            step = MULTIPLE[fp8] * shares
            length, micro = training.seq_length, training.micro_batch_size
            if length % shares == 0 and length * micro % step:
                fitting = any_of(around(length, step // math.gcd(step, micro)))
                among = f", shared by {shares} context- and sequence-parallel ranks" if shares > 1 else ""
                yield Finding(
                    key,
                    f"{fp8.value} FP8 needs multiples of {MULTIPLE[fp8]} tokens on a rank, unlike {where}.seq_length="
                    f"{length} x {where}.micro_batch_size={micro}{among}; set {where}.seq_length to {fitting}, or "
                    f"{_without(key)}",
                )
                break


def _requested(cfg: RunConfig, at: str) -> dict[str, Fp8]:
    """The FP8 scales of a training by the key that asks for them, of the model that is trained and of its teacher."""
    asked = {f"{at}.fp8": get_training(cfg, at).fp8}
    if at == DISTILL and cfg.distill.loss is Loss.kd:
        asked[TEACHER_FP8] = cfg.distill.fp8_of_teacher
    return {key: fp8 for key, fp8 in asked.items() if fp8 is not None}


def _in_layout(cfg: RunConfig, at: str) -> dict[str, Fp8]:
    """Those of the models that run in the layout of a training."""
    shared = at != DISTILL or teacher_shares_layout(cfg)
    return {key: fp8 for key, fp8 in _requested(cfg, at).items() if shared or key != TEACHER_FP8}


def _models(cfg: RunConfig, at: str, key: str) -> list[tuple[str, Shape]]:
    """The models whose products are in FP8 by a key: the teacher, or all models that are trained."""
    if at != DISTILL or key == TEACHER_FP8:
        return list_models(cfg, at)[:1]
    between = [model for model in list_models(cfg, at) if model[0] not in ("teacher", "student")]
    return [*between, *(("student", shape) for shape in student_shapes(cfg))]


def _features(shape: Shape, tensor: int) -> Iterator[tuple[str, int, int]]:
    """Name, size, and the ranks that share it, of everything that a layer's products read or write."""
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    yield "hidden_size", shape.hidden_size, 1
    yield "num_attention_heads x kv_channels", heads * shape.kv_channels, tensor
    yield "(num_attention_heads + 2 x num_query_groups) x kv_channels", (heads + 2 * groups) * shape.kv_channels, tensor
    if shape.num_moe_experts:
        yield "moe_ffn_hidden_size", require(shape.moe_ffn_hidden_size), 1
    else:
        yield "ffn_hidden_size", shape.ffn_hidden_size, tensor


def _without(key: str) -> str:
    return f"{key}=false" if key == TEACHER_FP8 else f"{key}=null"
