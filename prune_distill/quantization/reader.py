"""Read quantized models with plain PyTorch, without ModelOpt, compressed-tensors or an engine.

Weights are dequantized, and activations of quantized layers are rounded as the engine rounds them before each product.
The model then measures what quantization costs, on any machine, with the same code as all other models. It is neither
small nor fast.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prune_distill.errors import InputError
from prune_distill.model import hf_config
from prune_distill.model.hf_weights import ITEM_BYTES, read_folder
from prune_distill.nemo import devices, hf_models
from prune_distill.schema import QuantFormat

log = logging.getLogger("recipes.hf_models")

# ModelOpt's `quant_algo` of each format that it writes.
MODELOPT_NAMES = {
    "FP8_PER_CHANNEL_PER_TOKEN": QuantFormat.fp8,
    "FP8": QuantFormat.fp8_tensor,
    "NVFP4": QuantFormat.nvfp4,
}
FP8_LARGEST = 448.0
# The values of FP4 (E2M1) by their lowest three bits; the fourth is the sign.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_BLOCK = 16
# transformers' name of the attention below, which rounds keys and values.
FP8_KV_ATTENTION = "sdpa_fp8_kv_cache"
# Tensors next to a quantized weight.
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_shape", "input_scale")


@dataclass(frozen=True)
class Quantized:
    """What `config.json` says of a quantized model: its format, and the weights that share a scale in `int4`."""

    quant_format: QuantFormat
    group_size: int | None = None


def is_quantized(folder: Path) -> bool:
    """Return whether a Hugging Face folder contains a quantized model."""
    return bool(hf_config.parse(folder / "config.json").get("quantization_config"))


def read_format(folder: Path) -> Quantized:
    """Read the format of a quantized model. Raises: InputError, if it is not one that this module reads."""
    config = hf_config.parse(folder / "config.json")["quantization_config"]
    method = config.get("quant_method")
    if method == "modelopt" and config.get("quant_algo") in MODELOPT_NAMES:
        return Quantized(MODELOPT_NAMES[config["quant_algo"]])
    if method == "compressed-tensors":
        weights = config["config_groups"]["group_0"]["weights"]
        if config["format"] == "int-quantized" and weights["strategy"] == "channel":
            return Quantized(QuantFormat.int8)
        if config["format"] == "pack-quantized" and weights["num_bits"] == 4 and weights["strategy"] == "group":
            return Quantized(QuantFormat.int4, weights["group_size"])
    raise InputError(
        f"{folder}: quantized by {method} as {config.get('quant_algo') or config.get('format')}, which is not read; use"
        " a model that the stage quantize wrote"
    )


def load(folder: Path) -> Any:
    """Load a quantized model to this process's device, for inference, with dequantized weights.

    Raises:
        InputError: its format is not one that the stage quantize writes, or tensors are missing.
    """
    found, config = read_format(folder), read_config(folder)
    dtype = getattr(torch, config.to_dict().get("torch_dtype") or config.to_dict()["dtype"])
    weights, scales, kv_scales = _read_weights(folder, found, dtype)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=weights, torch_dtype=dtype, **hf_models.generation_options(folder)
    )
    missing = [name for name in model.state_dict() if name not in weights and not _is_tied(model, name)]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing[:3])}; run the stage quantize again")
    for name, scale in kv_scales.items():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], scale)
    if kv_scales:
        AttentionInterface.register(FP8_KV_ATTENTION, _fp8_kv_attention)
        AttentionMaskInterface.register(FP8_KV_ATTENTION, sdpa_mask)
        model.set_attn_implementation(FP8_KV_ATTENTION)
    for name, scale in scales.items():
        round_input = make_rounding(found.quant_format, scale)
        if round_input is not None:
            model.get_submodule(name).register_forward_pre_hook(functools.partial(_round_first, round_input))
    return model.to(devices.torch_device()).eval()


def read_config(folder: Path) -> Any:
    """Return the transformers config of a quantized model, without its quantization."""
    content = hf_config.parse(folder / "config.json")
    content.pop("quantization_config")
    return AutoConfig.for_model(**hf_config.make_compatible(hf_config.normalize(content)))


def count_parameters(config: Any) -> int:
    """Return the number of parameters of the model before quantization, from `read_config`."""
    with torch.device("meta"):
        return int(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).num_parameters())


def dequantized_bytes(folder: Path) -> int:
    """Return the memory of a folder's weights in bytes once they are dequantized to its type."""
    config = hf_config.parse(folder / "config.json")
    size = 4 if (config.get("torch_dtype") or config.get("dtype")) == "float32" else 2
    # Weights per stored element.
    counts = {"U8": 2, "I32": 8}
    return sum(
        entry.bytes // ITEM_BYTES[entry.dtype] * counts.get(entry.dtype, 1) * size
        for entry in read_folder(folder).values()
    )


def _is_tied(model: Any, name: str) -> bool:
    return name == "lm_head.weight" and bool(model.config.tie_word_embeddings)


def _read_weights(
    folder: Path, found: Quantized, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None], dict[str, torch.Tensor]]:
    """Return the dequantized weights, the static scale of the input by quantized layer (None: dynamic), and the scales
    of an FP8 KV cache by name."""
    tensors = dict(_read_tensors(folder))
    kv_scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith((".k_scale", ".v_scale"))}
    layers = sorted({name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")})
    scales: dict[str, torch.Tensor | None] = {}
    for layer in layers:
        parts = {part: tensors.pop(f"{layer}.{part}") for part in _PARTS if f"{layer}.{part}" in tensors}
        scales[layer] = parts.get("input_scale")
        tensors[f"{layer}.weight"] = dequantize(found, parts).to(dtype)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}, scales, kv_scales


def _read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def dequantize(found: Quantized, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight `[n, k]` of a layer in fp32 from its tensors."""
    scale = parts["weight_scale"].float()
    if found.quant_format is QuantFormat.fp8:
        return parts["weight"].float() * scale.reshape(-1, 1)
    if found.quant_format is QuantFormat.fp8_tensor:
        return parts["weight"].float() * scale
    if found.quant_format is QuantFormat.int8:
        return parts["weight"].float() * scale
    if found.quant_format is QuantFormat.int4:
        assert found.group_size is not None
        rows, columns = parts["weight_shape"].tolist()
        shifts = torch.arange(0, 32, 4)
        weight = ((parts["weight_packed"][..., None] >> shifts) & 0xF).reshape(rows, columns) - 8
        return weight.float() * scale.repeat_interleave(found.group_size, 1)
    packed = parts["weight"]
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2).long()
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])[codes]
    return values * scale.repeat_interleave(FP4_BLOCK, 1) * parts["weight_scale_2"].float()


def make_rounding(
    quant_format: QuantFormat, scale: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that rounds activations `[..., k]` as engines do; None where they are not quantized.

    Args:
        scale: the static scale of the input, of `fp8_tensor` and `nvfp4`.
    """
    if quant_format is QuantFormat.int4:
        return None
    if quant_format is QuantFormat.int8:
        return round_int8
    if quant_format is QuantFormat.fp8:
        return round_fp8
    assert scale is not None, "calibration finds the scale of the input"
    by_format = {QuantFormat.fp8_tensor: round_fp8_tensor, QuantFormat.nvfp4: round_nvfp4}
    return functools.partial(by_format[quant_format], scale=scale.float())


def _round_first(
    round_input: Callable[[torch.Tensor], torch.Tensor], _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return (round_input(inputs[0].float()).to(inputs[0].dtype), *inputs[1:])


def _fp8_kv_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Attention on keys and values as an FP8 cache returns them."""
    key, value = (
        round_fp8_tensor(states.float(), module.get_buffer(name)).to(states.dtype)
        for states, name in ((key, "k_proj.k_scale"), (value, "v_proj.v_scale"))
    )
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def round_int8(values: torch.Tensor) -> torch.Tensor:
    """Round to INT8 with a scale per token (the last axis)."""
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (values / scale).round().clamp(-128, 127) * scale


def round_fp8(values: torch.Tensor) -> torch.Tensor:
    """Round to FP8 (E4M3) with a scale per token (the last axis)."""
    return _round_fp8(values, values.abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_LARGEST)


def round_fp8_tensor(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to FP8 (E4M3) with a static scale; larger values are clamped."""
    return _round_fp8(values, scale.to(values.device))


def _round_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).to(values.dtype) * scale


def round_nvfp4(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to FP4 in blocks of 16 along the last axis, each with a scale in FP8, which itself has a static scale."""
    scale = scale.to(values.device)
    blocks = values.unflatten(-1, (-1, FP4_BLOCK))
    block_scale = blocks.abs().amax(-1, keepdim=True) / FP4_VALUES[-1] / scale
    block_scale = block_scale.clamp(max=FP8_LARGEST).to(torch.float8_e4m3fn).float() * scale
    units = blocks / torch.where(block_scale == 0, 1, block_scale)
    # The grid is 0.5 wide up to 2, 1 up to 4 and 2 beyond. torch rounds halves to even, as the format does.
    size = units.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((units / step).round() * step).clamp(-FP4_VALUES[-1], FP4_VALUES[-1]).mul(block_scale).flatten(-2)
