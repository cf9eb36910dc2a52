"""Quantize a transformers model with ModelOpt, and export it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import get_weight_scaling_factor

from prune_distill.schema import QuantFormat

# Tokens on which the ranges of INT4 groups are searched, as in AWQ (modelopt/torch/quantization/config.py:1085). For
# each of them and for 11 ranges, the search multiplies all weights without matrix products.
AWQ_TOKENS = 512


def quantize(
    model: Any,
    quant_format: QuantFormat,
    group_size: int,
    keep: Sequence[str],
    batches: Iterable[torch.Tensor],
    *,
    learned: bool = False,
) -> None:
    """Insert quantizers into a model and calibrate them. The model then computes with simulated quantization.

    Args:
        model: a causal language model of transformers.
        group_size: weights of `int4` that share a scale.
        keep: patterns of the names of linear layers that are not quantized, besides the output layer and routers.
        batches: calibration sequences `[b, s]`, on the model's device.
        learned: whether the model was trained with the fake quantizers of the format. They have no state: the range
            of each channel or group is its absolute maximum, so none is searched.
    """
    batches = list(batches)
    settings = _settings(quant_format, group_size, len(batches))
    if learned:
        settings["algorithm"] = "max"
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    # ModelOpt's patterns match names of quantizers, such as `lm_head.weight_quantizer`, and later ones win.
    kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in keep)]
    settings["quant_cfg"] |= {f"{name}.*": {"enable": False} for name in kept}

    def calibrate(model: Any) -> None:
        for batch in batches:
            model(batch)

    with torch.no_grad():
        mtq.quantize(model, settings, calibrate if quant_format.calibrated and not learned else None)


def _settings(quant_format: QuantFormat, group_size: int, batches: int) -> dict[str, Any]:
    """Return ModelOpt's settings of a format. Its defaults exclude the output layer and routers
    (modelopt/torch/quantization/config.py:147)."""
    if quant_format is QuantFormat.int8:
        # ModelOpt's own INT8 formats have one range for all tokens; this one is like its FP8 per channel and token.
        settings = copy.deepcopy(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
        for name in ("*weight_quantizer", "*input_quantizer"):
            settings["quant_cfg"][name]["num_bits"] = 8
        return settings
    if quant_format is QuantFormat.int4:
        # Without AWQ's scaling of channels: it has to be folded into the layer before, and ModelOpt folds it into norms
        # (modelopt/torch/export/unified_export_hf.py:204), which changes layers and routers that read the same norm
        # and are not quantized.
        settings = copy.deepcopy(mtq.INT4_AWQ_CFG)
        settings["quant_cfg"]["*weight_quantizer"]["block_sizes"][-1] = group_size
        settings["algorithm"] = {"method": "awq_clip", "max_tokens_per_batch": -(-AWQ_TOKENS // batches)}
        return settings
    return copy.deepcopy(
        {
            QuantFormat.fp8: mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
            QuantFormat.fp8_tensor: mtq.FP8_DEFAULT_CFG,
            QuantFormat.nvfp4: mtq.NVFP4_DEFAULT_CFG,
        }[quant_format]
    )


def list_kept(model: Any) -> list[str]:
    """Return the names of the linear layers that are not quantized."""
    return [name for name, module in _linear_layers(model) if not module.weight_quantizer.is_enabled]


def weight_scales(model: Any) -> dict[str, torch.Tensor]:
    """Return the scales of integer weights by the name of the layer, `[n, groups]` in fp32."""
    return {
        name: get_weight_scaling_factor(module).reshape(len(module.weight), -1)
        for name, module in _linear_layers(model)
        if module.weight_quantizer.is_enabled
    }


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the model by their Hugging Face names, without tied ones and without quantizers."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    return {name: tensor for name, tensor in model.state_dict().items() if "_quantizer" not in name and name != tied}


def _linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "weight_quantizer"))


def export(model: Any, folder: Path) -> None:
    """Write an FP8 or FP4 model in ModelOpt's format. The model cannot be used afterwards."""
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=folder)
