"""Quantization of the exported student after training."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from prune_distill.schema.fields import PositiveInt, placement

# Tokens on which the ranges of INT4 groups are searched, as in AWQ (modelopt/torch/quantization/config.py:1085), and
# the forward passes that they come from. In each pass the search quantizes each weight with AWQ_RANGES ranges, once for
# each 1,024 output channels of its layer, and for each token it multiplies all weights without matrix products.
AWQ_TOKENS, AWQ_PASSES, AWQ_RANGES = 512, 32, 11


class QuantFormat(Enum):
    """A format of quantized weights and activations:

    - `fp8`: FP8 weights with a scale per output channel, FP8 activations with a scale per token.
    - `fp8_tensor`: FP8 weights and activations with one scale per tensor. Engines need a GPU.
    - `nvfp4`: FP4 weights and activations in blocks of 16. Quantization needs CUDA, engines a Blackwell GPU.
    - `int8`: INT8 weights with a scale per output channel, INT8 activations with a scale per token.
    - `int4`: INT4 weights in groups, with AWQ's search of the range of each group; activations stay in bf16.
    """

    fp8 = "fp8"
    fp8_tensor = "fp8_tensor"
    nvfp4 = "nvfp4"
    int8 = "int8"
    int4 = "int4"

    @property
    def calibrated(self) -> bool:
        """Whether calibration text affects the result. Engines compute the ranges of activations of the others for each
        token, and the ranges of weights are known."""
        return self not in (QuantFormat.fp8, QuantFormat.int8)

    def needs_calibration(self, *, learned: bool, fp8_kv_cache: bool) -> bool:
        """Whether calibration text affects a model; `learned`: one that was trained with the format."""
        return fp8_kv_cache or (self.calibrated and not learned)


@dataclass
class QuantizeConfig:
    """Formats in which the exported student is also written, as further models for engines such as vLLM."""

    # Formats of further models; empty: the run has no stage quantize. Each has its own stages, quantize.FORMAT and
    # evaluate.FORMAT.
    formats: list[QuantFormat] = field(default_factory=list)
    # Training sequences on which ranges are calibrated. Without fp8_kv_cache, fp8 and int8 need none, because their
    # engines compute the ranges of activations for each token. int4's search uses a part of them.
    calibration_samples: PositiveInt = 512
    # Tokens per calibration sequence.
    calibration_seq_length: PositiveInt = 512
    # Sequences per forward pass.
    micro_batch_size: PositiveInt = placement(1)
    # Weights of int4 that share a scale.
    int4_group_size: PositiveInt = 128
    # Whether engines keep keys and values in FP8 (E4M3), with a calibrated scale per layer, in half the memory of bf16.
    fp8_kv_cache: bool = False
    # Linear layers that keep the type of the export, as patterns of their Hugging Face names, such as
    # model.layers.0.* or *.down_proj. The output layer (lm_head) and routers always keep it.
    keep: list[str] = field(default_factory=list)
