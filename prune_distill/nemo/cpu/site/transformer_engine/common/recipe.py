"""Stand-in for `transformer_engine.common.recipe`: the FP8 recipes that Megatron makes
(megatron/core/fp8_utils.py:get_fp8_recipe).

Megatron derives a class from `DelayedScaling` on import (megatron/core/extensions/transformer_engine.py:1791), NeMo
imports it and `Format` (nemo/collections/llm/gpt/model/megatron/hyena/hyena_mixer.py:47).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from .._refuse import refuse


class Format(Enum):
    """Stand-in for `transformer_engine.common.recipe.Format`: names of the FP8 formats."""

    E4M3 = "E4M3"
    E5M2 = "E5M2"
    HYBRID = "HYBRID"


@dataclass(frozen=True)
class Recipe:
    """How tensors are quantized.

    Attributes:
        fp8_format: E4M3, or HYBRID: e4m3 for inputs and weights, e5m2 for the gradients of outputs.
        fp8_dpa: attention in FP8; not supported.
    """

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False

    def __post_init__(self) -> None:
        if self.fp8_dpa:
            refuse("attention in FP8", "set fp8_dot_product_attention=False")

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The type of quantized gradients of outputs; inputs and weights are e4m3."""
        return torch.float8_e5m2 if self.fp8_format is Format.HYBRID else torch.float8_e4m3fn


@dataclass(frozen=True)
class Float8CurrentScaling(Recipe):
    """One scale per tensor, from the tensor's own maximum."""


@dataclass(frozen=True)
class Float8BlockScaling(Recipe):
    """One scale, a power of two, per 128 elements of inputs and gradients and per 128 x 128 elements of weights."""

    fp8_format: Format = Format.E4M3


class DelayedScaling:
    """Stand-in for `transformer_engine.common.recipe.DelayedScaling`; the constructor raises."""

    def __init__(self, *_: object, **__: object) -> None:
        refuse("FP8 with delayed scaling", "set fp8_recipe='tensorwise' or 'blockwise' in the precision plugin")
