"""ModelOpt's search space: where importance is measured, and where it is given back for every later pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from modelopt.torch.nas.plugins.megatron import _DynamicMCoreLanguageModel
from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.prune.pruning import PruneModeRegistry

from recipes.runtime.pruning.importance import Importance, refuse_infinite


def to_search_space(model: Any) -> Any:
    """Converts a model in place to ModelOpt's search space, in which forward passes are recorded; returns its core."""
    apply_mode(model, mode="mcore_minitron", registry=PruneModeRegistry)
    return dynamic_core(model)


def dynamic_core(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, _DynamicMCoreLanguageModel))


def measure(model: Any, forward_loop: Callable[[], None]) -> Importance:
    """Importance over all pipeline ranks, from the forward passes that `forward_loop` makes. Converts the model.

    Raises:
        InputError: activations that are not finite; names the layer.
    """
    core = to_search_space(model).eval()
    with torch.no_grad():
        forward_loop()
    own = []
    for layer in core.decoder.layers:
        norms = [core._activations[id(norm)].cpu() for norm in _norms(layer)]
        parts = (layer.mlp._activations.cpu(), layer.self_attention._activations.cpu())
        own.append((layer.layer_number, layer._scores, norms, *parts))
    everyones: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    torch.distributed.all_gather_object(everyones, own, group=parallel_state.get_pipeline_model_parallel_group())
    rows = sorted((row for rows in everyones for row in rows), key=lambda row: row[0])
    importance = Importance(
        {number: float(score) for number, score, _, _, _ in rows},
        {number: norms for number, _, norms, _, _ in rows},
        {number: ffn for number, _, _, ffn, _ in rows},
        {number: heads for number, _, _, _, heads in rows},
    )
    refuse_infinite(importance)
    return importance


def give(importance: Importance, core: Any) -> None:
    """Sets a search space's scores to what was measured before, on this rank's layers."""
    core._activations = {}
    for layer in core.decoder.layers:
        number = layer.layer_number
        layer._scores = importance.layers[number]
        layer.mlp._activations = importance.ffn[number]
        layer.self_attention._activations = importance.heads[number]
        for norm, values in zip(_norms(layer), importance.hidden[number], strict=True):
            core._activations[id(norm)] = values


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.pre_mlp_layernorm
