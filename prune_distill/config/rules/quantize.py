"""Rules of the group `quantize`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from prune_distill.config.rule import Finding, rule
from prune_distill.config.rules.prune import STUDENT
from prune_distill.config.values import require
from prune_distill.config.wording import any_of, quote_for_hydra, too_long
from prune_distill.model.student import student_shapes
from prune_distill.schema import QuantFormat, RunConfig, Shape

LIMIT = "model.shape.max_position_embeddings"
NVFP4_BLOCK = 16
# Sizes of groups for which engines have kernels (vllm/model_executor/layers/quantization/utils/marlin_utils.py).
INT4_GROUPS = (32, 64, 128)
# The linear layers that engines join to one product, and so quantize alike or not at all.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Layer:
    """A linear layer: its Hugging Face name, the size of its input with the name of that size, and of its output."""

    name: str
    inputs: int
    size: str
    outputs: int


def linear_layers(shape: Shape, gated: bool) -> Iterator[Layer]:
    """Yield the linear layers of a model that are quantized unless the config keeps them.

    Args:
        gated: whether the FFN has a gate.
    """
    up = ("gate_proj", "up_proj") if gated else ("up_proj",)
    if shape.num_moe_experts is None:
        ffns, width = ["mlp"], ("FFN size", shape.ffn_hidden_size)
    else:
        ffns = [f"mlp.experts.{expert}" for expert in range(shape.num_moe_experts)]
        width = ("FFN size of an expert", require(shape.moe_ffn_hidden_size))
    for number in range(shape.num_layers):
        prefix = f"model.layers.{number}"
        queries, keys = (heads * shape.kv_channels for heads in (shape.num_attention_heads, shape.num_query_groups))
        for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield Layer(f"{prefix}.self_attn.{name}", shape.hidden_size, "hidden size", outputs)
        yield Layer(f"{prefix}.self_attn.o_proj", queries, "attention heads times kv_channels", shape.hidden_size)
        for ffn in ffns:
            for name in up:
                yield Layer(f"{prefix}.{ffn}.{name}", shape.hidden_size, "hidden size", width[1])
            yield Layer(f"{prefix}.{ffn}.down_proj", width[1], width[0], shape.hidden_size)


def is_kept(cfg: RunConfig, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in cfg.quantize.keep)


@rule("quantize.formats", "quantize.formats")
def formats(cfg: RunConfig) -> Iterator[Finding]:
    names = [found.value for found in cfg.quantize.formats]
    if len(set(names)) < len(names):
        yield Finding(
            "quantize.formats",
            f"a format is named twice; set quantize.formats={quote_for_hydra(sorted(set(names)))}",
        )


@rule("quantize.nvfp4", "quantize.formats", "cluster.gpu?")
def nvfp4(cfg: RunConfig) -> Iterator[Finding]:
    # modelopt/torch/quantization/tensor_quant.py:173 asserts CUDA.
    if QuantFormat.nvfp4 in cfg.quantize.formats and cfg.cluster.gpu is None:
        yield Finding(
            "quantize.formats",
            "ModelOpt quantizes to nvfp4 on GPUs only, and cluster.gpu=null states none; choose a cluster with GPUs,"
            " such as cluster=one_node, or remove nvfp4",
        )


@rule("quantize.calibration_seq_length", "quantize.formats", "quantize.calibration_seq_length", LIMIT)
def calibration_seq_length(cfg: RunConfig) -> Iterator[Finding]:
    limit = require(cfg.model.shape).max_position_embeddings
    if cfg.quantize.formats and cfg.quantize.calibration_seq_length > limit:
        yield Finding("quantize.calibration_seq_length", too_long("quantize.calibration_seq_length", limit))


@rule("quantize.int4_group_size", "quantize.formats", "quantize.int4_group_size")
def int4_group_size(cfg: RunConfig) -> Iterator[Finding]:
    if QuantFormat.int4 in cfg.quantize.formats and cfg.quantize.int4_group_size not in INT4_GROUPS:
        yield Finding(
            "quantize.int4_group_size",
            f"engines have no kernel for it; set quantize.int4_group_size to {any_of(list(INT4_GROUPS))}",
        )


@rule("quantize.blocks", "quantize.formats", "quantize.keep", "quantize.int4_group_size", *STUDENT)
def blocks(cfg: RunConfig) -> Iterator[Finding]:
    """Report layers whose input the size of a block does not divide."""
    sizes = {QuantFormat.int4: cfg.quantize.int4_group_size, QuantFormat.nvfp4: NVFP4_BLOCK}
    for quant_format, block in sizes.items():
        if quant_format not in cfg.quantize.formats:
            continue
        key = "quantize.int4_group_size" if quant_format is QuantFormat.int4 else "quantize.formats"
        uneven = {
            (layer.name.rpartition(".")[2], layer.size, layer.inputs)
            for shape in student_shapes(cfg)
            for layer in linear_layers(shape, cfg.model.family.traits.gated_mlp)
            if layer.inputs % block and not is_kept(cfg, layer.name)
        }
        if uneven:
            names = sorted({name for name, _, _ in uneven})
            found = ", ".join(sorted({f"{size} {inputs}" for _, size, inputs in uneven}))
            fits = [size for size in INT4_GROUPS if not any(inputs % size for _, _, inputs in uneven)]
            smaller = f"set {key} to {any_of(fits)}, " if fits and quant_format is QuantFormat.int4 else ""
            keep = quote_for_hydra([*cfg.quantize.keep, *(f"*.{name}" for name in names)])
            yield Finding(
                key,
                f"{quant_format.value} has blocks of {block} weights, which do not divide the student's {found};"
                f" {smaller}set quantize.keep={keep}, or remove {quant_format.value} from quantize.formats",
            )


@rule("quantize.keep", "quantize.formats", "quantize.keep", *STUDENT)
def keep(cfg: RunConfig) -> Iterator[Finding]:
    """Report patterns that match no layer, and joined layers of which only some are kept."""
    patterns = cfg.quantize.keep
    if not cfg.quantize.formats or not patterns:
        return
    shape = max(student_shapes(cfg), key=lambda found: found.num_layers)
    names = [layer.name for layer in linear_layers(shape, cfg.model.family.traits.gated_mlp)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in [*names, "lm_head"]):
            yield Finding(
                "quantize.keep",
                f"{pattern} matches no linear layer of the student; use names such as {names[0]}, or patterns such as"
                " model.layers.0.* or *.down_proj",
            )
    for joined in JOINED:
        kept: dict[str, set[str]] = {}
        for name in names:
            parent, _, own = name.rpartition(".")
            if own in joined and is_kept(cfg, name):
                kept.setdefault(parent, set()).add(own)
        present = {own for name in names if (own := name.rpartition(".")[2]) in joined}
        partly = sorted(parent for parent, own in kept.items() if own != present)
        if partly:
            yield Finding(
                "quantize.keep",
                f"keeps only {', '.join(sorted(kept[partly[0]]))} of {partly[0]}, but engines join"
                f" {', '.join(sorted(present))} to one product; keep all of them, or none",
            )
