"""ModelOpt's search space: measure importance in it, and restore the scores for later pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from modelopt.torch.nas.plugins.megatron import _DynamicMCoreLanguageModel
from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.prune.pruning import PruneModeRegistry

from prune_distill.pruning.importance import Importance, refuse_infinite

# What ModelOpt records of experts (modelopt/torch/nas/plugins/megatron.py:729), in the order of `Importance.experts`.
EXPERT_SCORES = ("expert_l2_scores", "expert_sample_counts")


def convert_to_search_space(model: Any) -> Any:
    """Convert a model in place to ModelOpt's search space, whose hooks record activations; return its core."""
    apply_mode(model, mode="mcore_minitron", registry=PruneModeRegistry)
    return dynamic_core(model)


def dynamic_core(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, _DynamicMCoreLanguageModel))


def measure(model: Any, forward_loop: Callable[[], None]) -> Importance:
    """Measure importance in the forward passes of `forward_loop`, over all pipeline ranks. Converts the model.

    Raises:
        InputError: non-finite activations; names the layer.
    """
    core = convert_to_search_space(model).eval()
    for layer in core.decoder.layers:
        _skip_idle(_experts(layer))
    with torch.no_grad():
        forward_loop()
    local = []
    for layer in core.decoder.layers:
        norms = [core._activations[id(norm)].cpu() for norm in _norms(layer)]
        parts = (_ffn(layer).cpu(), layer.self_attention._activations.cpu(), _expert_scores(layer))
        local.append((layer.layer_number, layer._scores, norms, *parts))
    gathered: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    torch.distributed.all_gather_object(gathered, local, group=parallel_state.get_pipeline_model_parallel_group())
    rows = sorted((row for rows in gathered for row in rows), key=lambda row: row[0])
    importance = Importance(
        {number: float(score) for number, score, *_ in rows},
        {number: norms for number, _, norms, *_ in rows},
        {number: ffn for number, _, _, ffn, *_ in rows},
        {number: heads for number, _, _, _, heads, _ in rows},
        {number: experts for number, *_, experts in rows if experts is not None},
    )
    refuse_infinite(importance)
    return importance


def restore_scores(importance: Importance, core: Any) -> None:
    """Set the scores of this rank's layers in a search space to those measured earlier."""
    core._activations = {}
    for layer in core.decoder.layers:
        number = layer.layer_number
        layer._scores = importance.layers[number]
        if experts := _experts(layer):
            scores = dict(zip(EXPERT_SCORES, importance.experts[number].cpu(), strict=True))
            layer.mlp.experts._activations = scores
            for expert, values in zip(experts, importance.ffn[number], strict=True):
                expert._activations = values
        else:
            layer.mlp._activations = importance.ffn[number]
        layer.self_attention._activations = importance.heads[number]
        for norm, values in zip(_norms(layer), importance.hidden[number], strict=True):
            core._activations[id(norm)] = values


def _experts(layer: Any) -> list[Any]:
    """Return a layer's experts in the search space; an empty list for a dense layer."""
    return list(layer.mlp.experts.local_experts) if hasattr(layer.mlp, "experts") else []


def _skip_idle(experts: list[Any]) -> None:
    """Skip the record of an expert without tokens: ModelOpt would record a mean of nothing, which is NaN
    (modelopt/torch/nas/plugins/megatron.py:293)."""
    for expert in experts:
        record = expert._linear_fc2_forward_hook
        expert.hook_handle.remove()
        expert.hook_handle = expert.linear_fc2.register_forward_hook(functools.partial(_record_tokens, record))


def _record_tokens(record: Callable[[Any, Any, Any], None], module: Any, inputs: Any, output: Any) -> None:
    if inputs[0].numel():
        record(module, inputs, output)


def _ffn(layer: Any) -> torch.Tensor:
    """Return the activations of the FFN's channels, stacked over experts."""
    experts = _experts(layer)
    if not experts:
        return layer.mlp._activations  # type: ignore[no-any-return]
    zeros = torch.zeros(experts[0].get_hparam("moe_ffn_hidden_size").max)
    return torch.stack([zeros if e._activations is None else e._activations.cpu() for e in experts])


def _expert_scores(layer: Any) -> torch.Tensor | None:
    if not _experts(layer):
        return None
    return torch.stack([layer.mlp.experts._activations[name].cpu() for name in EXPERT_SCORES])


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.pre_mlp_layernorm
