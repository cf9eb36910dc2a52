"""Stand-in for `transformer_engine.pytorch`, with the names that Megatron, NeMo and Model Optimizer import."""

from . import distributed, float8_tensor, fp8, optimizers
from .attention import DotProductAttention
from .fp8 import fp8_autocast, fp8_model_init
from .fp8_padding import Fp8Padding, Fp8Unpadding
from .grouped_linear import GroupedLinear
from .layernorm_linear import LayerNormLinear
from .linear import Linear
from .norm import LayerNorm, RMSNorm

__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "float8_tensor",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "optimizers",
]
