"""Rules of the loss of distillation (`distill.kd`); see prune_distill.config.validate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prune_distill.schema import Divergence, LossImplementation, Recompute, RunConfig, Shape

# The models by role; none where the teacher's shape is not known.
Shapes = Mapping[str, Shape]
Rule = Callable[[RunConfig, Shapes], Iterator[str]]


def _top_k(cfg: RunConfig, shapes: Shapes) -> Iterator[str]:
    kd = cfg.distill.kd
    if kd.top_k is None:
        return
    if any(kd.top_k >= shape.vocab_size for shape in shapes.values()):
        yield (
            f"distill.kd.top_k={kd.top_k} takes the whole vocabulary, or more; set distill.kd.top_k="
            "null for that, or to less"
        )
    if kd.divergence is not Divergence.forward_kl:
        yield (
            f"distill.kd.top_k={kd.top_k} goes with forward KL only, not with distill.kd.divergence="
            f"{kd.divergence.value}; set distill.kd.divergence=forward_kl, or distill.kd.top_k=null"
        )


def _upstream(cfg: RunConfig, shapes: Shapes) -> Iterator[str]:
    """What LogitsKLLoss cannot do (nemo/collections/llm/modelopt/distill/loss.py:138)."""
    kd = cfg.distill.kd
    if kd.implementation is not LossImplementation.upstream:
        return
    lacking = []
    if kd.divergence is Divergence.jensen_shannon:
        lacking.append("distill.kd.divergence=jensen_shannon")
    if kd.top_k is not None:
        lacking.append(f"distill.kd.top_k={kd.top_k}")
    if lacking:
        yield (
            f"distill.kd.implementation=upstream has no {' and no '.join(lacking)}; set distill.kd.implementation="
            "chunked"
        )


def _pairs(cfg: RunConfig, shapes: Shapes) -> Iterator[str]:
    """Layers that are there, once each: ModelOpt's hooks hand a layer's output on to one loss
    (modelopt/torch/distill/distillation_model.py:237)."""
    pairs = cfg.distill.kd.intermediate_pairs
    for who, shape in shapes.items():
        named = [getattr(pair, who) for pair in pairs]
        outside = [layer for layer in named if not 1 <= layer <= shape.num_layers]
        if outside:
            yield (
                f"distill.kd.intermediate_pairs names layers {outside} of the {who}, which has 1 to "
                f"{shape.num_layers}; set them within"
            )
        twice = sorted({layer for layer in named if named.count(layer) > 1})
        if twice:
            yield f"distill.kd.intermediate_pairs names layers {twice} of the {who} more than once; name each once"


def _pairs_are_seen(cfg: RunConfig, shapes: Shapes) -> Iterator[str]:
    """Hooks see what passes on their pipeline stage, and gradients only where activations are kept: a layer that is
    computed again ran without them the first time (megatron/core/tensor_parallel/random.py:CheckpointFunction)."""
    distill = cfg.distill
    pairs, stages = distill.kd.intermediate_pairs, distill.parallel.pipeline_model_parallel_size
    if not pairs:
        return
    if distill.recompute is Recompute.full:
        yield (
            "distill.kd.intermediate_pairs teach nothing with distill.recompute=full; set distill.recompute=selective, "
            "or distill.kd.intermediate_pairs=[]"
        )
    for who, shape in shapes.items():
        first = shape.num_layers - shape.num_layers // stages + 1
        early = [layer for pair in pairs if (layer := getattr(pair, who)) < first]
        if stages > 1 and early:
            yield (
                f"distill.kd.intermediate_pairs names layers {early} of the {who}, but the loss is on the last of "
                f"distill.parallel.pipeline_model_parallel_size={stages} stages, which has its layers {first} to "
                f"{shape.num_layers}; name those, or set the size to 1"
            )


RULES: tuple[Rule, ...] = (_top_k, _upstream, _pairs, _pairs_are_seen)
