"""Write INT8 and INT4 weights in the format of the library compressed-tensors, as llm-compressor does.

vLLM reads ModelOpt's own exports of FP8 and FP4, but not of these two
(vllm/model_executor/layers/quantization/modelopt.py:143, 0.32).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from prune_distill.schema import QuantFormat

# Formats that are written here.
FORMATS = (QuantFormat.int8, QuantFormat.int4)
KV_CACHE_SCHEME = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}


def write_weights(
    folder: Path,
    quant_format: QuantFormat,
    tensors: dict[str, torch.Tensor],
    scales: dict[str, torch.Tensor],
    kv_scales: dict[str, torch.Tensor],
) -> None:
    """Write safetensors files.

    Args:
        tensors: all weights of the model by name.
        scales: by name of a layer whose weight `[n, k]` is to be quantized, its scales in fp32, `[n, groups]`.
        kv_scales: those of an FP8 KV cache, by the names of their tensors.
    """
    tensors = tensors | kv_scales
    for layer, scale in scales.items():
        weight = tensors.pop(f"{layer}.weight")
        integers = quantize_weight(weight, scale, 8 if quant_format is QuantFormat.int8 else 4)
        if quant_format is QuantFormat.int8:
            tensors |= {f"{layer}.weight": integers, f"{layer}.weight_scale": scale}
        else:
            tensors |= {
                f"{layer}.weight_packed": pack(integers),
                f"{layer}.weight_shape": torch.tensor(weight.shape),
                # Engines load the scales in the type of the model.
                f"{layer}.weight_scale": scale.to(weight.dtype),
            }
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, folder)


def quantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a weight `[n, k]` to int8 with values of `bits` bits; `scale`: `[n, groups]`, in fp32."""
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    limit = 2 ** (bits - 1)
    return (groups / scale[..., None]).round().clamp(-limit, limit - 1).flatten(1).to(torch.int8)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack `[n, k]` int8 from -8 to 7 to `[n, k / 8]` int32, the first in the lowest four bits, as value + 8.

    As in compressed_tensors/compressors/pack_quantized/helpers.py:pack_to_int32.
    """
    nibbles = (weight + 8).to(torch.uint8)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int32)


def build_config(quant_format: QuantFormat, group_size: int, kept: list[str], *, fp8_kv_cache: bool) -> dict[str, Any]:
    """Return the key `quantization_config` of a `config.json`.

    Args:
        group_size: weights of `int4` that share a scale.
        kept: names of the linear layers that are not quantized.
    """
    integers = {"type": "int", "symmetric": True}
    if quant_format is QuantFormat.int8:
        weights = {**integers, "num_bits": 8, "strategy": "channel", "dynamic": False}
        activations = {**integers, "num_bits": 8, "strategy": "token", "dynamic": True}
    else:
        weights = {**integers, "num_bits": 4, "strategy": "group", "group_size": group_size, "dynamic": False}
        activations = None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if quant_format is QuantFormat.int8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
        "kv_cache_scheme": KV_CACHE_SCHEME if fp8_kv_cache else None,
    }
