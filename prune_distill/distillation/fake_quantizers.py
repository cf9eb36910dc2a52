"""Fake quantizers in the student, for quantization-aware distillation.

Weights and activations are rounded to a format in each forward pass, and gradients pass the rounding unchanged (the
straight-through estimator). The quantizers are ModelOpt's. They compute their ranges from the tensors of each forward
pass, as the formats define them: an absolute maximum for each output channel or group of a weight, and for each token
of an activation. So they have no state: checkpoints contain plain weights, and the ranges of an export are those of the
trained weights.

ModelOpt's `mtq.quantize` is not called, because it also changes how Megatron stores the model: layers are no longer
stacked, and each gets a pickled `_extra_state` (modelopt/torch/quantization/plugins/megatron.py:208). Converted layers
sum the gradients of their weights without the fused kernel (line 255 there).

Import this module after `backend.activate()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
from torch import Tensor

from prune_distill.schema import QuantFormat

# Megatron's linear layers of a transformer layer, and the Hugging Face layers that each joins.
LINEAR_LAYERS = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
BITS: dict[QuantFormat, Any] = {QuantFormat.fp8: (4, 3), QuantFormat.int8: 8, QuantFormat.int4: 4}
# Largest values of tensors that are all zero would be divided by.
SMALLEST_RANGE = 1e-12


@dataclass(frozen=True)
class FakeQuantization:
    """What is quantized, and how.

    Attributes:
        quant_format: one of `BITS`.
        group_size: weights of `int4` that share a scale.
        keep: patterns of the Hugging Face names of linear layers that are not quantized.
    """

    quant_format: QuantFormat
    group_size: int
    keep: tuple[str, ...] = ()

    def insert(self, model: Any) -> None:
        """Insert fake quantizers into the linear layers of a Megatron model with ModelOpt's layer spec.

        Transformer Engine's layers would not do: ModelOpt has no quantized version of its LayerNormLinear
        (modelopt/torch/quantization/plugins/transformer_engine.py).
        """
        for layer in model.decoder.layers:
            prefix = f"model.layers.{layer.layer_number - 1}"
            for name, joined in LINEAR_LAYERS.items():
                if not any(fnmatchcase(f"{prefix}.{part}", pattern) for part in joined for pattern in self.keep):
                    self._quantize(layer.get_submodule(name))

    def _quantize(self, linear: Any) -> None:
        # A rank has a part of each output channel and token of these layers.
        split = isinstance(linear, RowParallelLinear)
        QuantModuleRegistry.convert(linear)
        bits = BITS[self.quant_format]
        options = {"type": "dynamic", "pass_through_bwd": True}
        if self.quant_format is QuantFormat.int4:
            weight = QuantizerAttributeConfig(num_bits=bits, block_sizes={-1: self.group_size}, **options)
            linear.weight_quantizer = TensorQuantizer(weight)
            linear.input_quantizer.disable()
            return
        weight = QuantizerAttributeConfig(num_bits=bits, axis=0, **options)
        activation = QuantizerAttributeConfig(num_bits=bits, block_sizes={-1: None}, **options)
        linear.weight_quantizer, linear.input_quantizer = _Quantizer(weight, split), _Quantizer(activation, split)


class _Quantizer(TensorQuantizer):  # type: ignore[misc]
    """A quantizer with the ranges of whole channels or tokens, of which each tensor-parallel rank may have a part.

    ModelOpt's has the ranges of the parts, and divides by zero where all values are zero
    (modelopt/torch/quantization/tensor_quant.py:48).
    """

    def __init__(self, config: QuantizerAttributeConfig, split: bool) -> None:
        super().__init__(config)
        self.split = split

    def _get_amax(self, inputs: Tensor) -> Tensor:
        amax: Tensor = super()._get_amax(inputs).float().clamp_min(SMALLEST_RANGE)
        if self.split and parallel_state.get_tensor_model_parallel_world_size() > 1:
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
        return amax
