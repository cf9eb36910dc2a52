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

from prune_distill.quantization.reader import FP8_LARGEST
from prune_distill.schema import QuantFormat
from prune_distill.schema.quantize import AWQ_PASSES, AWQ_TOKENS


def quantize(
    model: Any,
    quant_format: QuantFormat,
    group_size: int,
    keep: Sequence[str],
    batches: Iterable[torch.Tensor],
    *,
    learned: bool = False,
    fp8_kv_cache: bool = False,
) -> None:
    """Insert quantizers into a model and calibrate them. The model then computes with simulated quantization.

    Args:
        model: a causal language model of transformers.
        group_size: weights of `int4` that share a scale.
        keep: patterns of the names of linear layers that are not quantized, besides the output layer and routers.
        batches: calibration sequences `[b, s]`, on the model's device.
        learned: whether the model was trained with the fake quantizers of the format. They have no state: the range
            of each channel or group is its absolute maximum, so none is searched.
        fp8_kv_cache: whether keys and values are quantized too.
    """
    batches = list(batches)
    settings = _settings(quant_format, group_size)
    if learned:
        settings["algorithm"] = "max"
    elif quant_format is QuantFormat.int4:
        batches = batches[:: -(-len(batches) // AWQ_PASSES)]
        settings["algorithm"]["max_tokens_per_batch"] = -(-AWQ_TOKENS // len(batches))
    if fp8_kv_cache:
        settings["quant_cfg"] |= copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    # ModelOpt's patterns match names of quantizers, such as `lm_head.weight_quantizer`, and later ones win.
    kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in keep)]
    settings["quant_cfg"] |= {f"{name}.*": {"enable": False} for name in kept}

    def calibrate(model: Any) -> None:
        for batch in batches:
            model(batch)

    calibrated = quant_format.needs_calibration(learned=learned, fp8_kv_cache=fp8_kv_cache)
    with torch.no_grad():
        mtq.quantize(model, settings, calibrate if calibrated else None)
    for _, module in _linear_layers(model):
        if module.weight_quantizer.amax is not None:
            # AWQ's search leaves out experts that no token reached; their groups keep their largest values as ranges.
            module.weight_quantizer.enable()
    for quantizer in _kv_quantizers(model).values():
        # ModelOpt exports scales of a KV cache of at least 1 (modelopt/torch/export/quant_utils.py:930).
        quantizer.amax = quantizer.amax.clamp(min=FP8_LARGEST)


def _settings(quant_format: QuantFormat, group_size: int) -> dict[str, Any]:
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
        settings["algorithm"] = {"method": "awq_clip"}
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


def kv_scales(model: Any) -> dict[str, torch.Tensor]:
    """Return the scales of an FP8 KV cache by their names in ModelOpt's exports, such as
    model.layers.0.self_attn.k_proj.k_scale; empty without one."""
    return {name: quantizer.amax.float() / FP8_LARGEST for name, quantizer in _kv_quantizers(model).items()}


def _kv_quantizers(model: Any) -> dict[str, Any]:
    return {
        f"{name}.{kind}_proj.{kind}_scale": quantizer
        for name, module in model.named_modules()
        for kind in "kv"
        if (quantizer := getattr(module, f"{kind}_bmm_quantizer", None)) is not None and quantizer.is_enabled
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
