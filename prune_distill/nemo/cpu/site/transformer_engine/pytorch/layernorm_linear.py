"""Stand-in for `transformer_engine.pytorch.LayerNormLinear` (megatron/core/extensions/transformer_engine.py:454)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._refuse import refuse
from .base import parameter_options
from .linear import Linear
from .norm import layer_norm, new_beta, new_gamma, rms_norm


class LayerNormLinear(Linear):
    """A norm followed by `Linear`; with sequence parallelism the norm runs on each rank's part of the sequence.

    Args:
        in_features, out_features: as in `Linear`.
        eps: of the norm.
        normalization: "LayerNorm" or "RMSNorm".
        return_layernorm_output: not supported.
        zero_centered_gamma: the norm's weight holds `gamma - 1`.
        sequence_parallel, params_dtype, device, **linear: as in `Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **linear: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            params_dtype=params_dtype,
            device=device,
            **linear,
        )
        if normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization={normalization!r}: unknown; use 'LayerNorm' or 'RMSNorm'")
        if return_layernorm_output:
            refuse("LayerNormLinear with return_layernorm_output", "leave the option off")
        self.eps = eps
        self.normalization = normalization
        self.zero_centered_gamma = zero_centered_gamma
        parameters = parameter_options(params_dtype, device)
        self.layer_norm_weight = new_gamma(in_features, zero_centered_gamma, self.sequence_parallel, parameters)
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = new_beta(in_features, self.sequence_parallel, parameters)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`[s, b, in_features]` -> `Linear.forward` of the normalized input."""
        return super().forward(self._norm(x), is_first_microbatch)

    def _norm(self, x: Tensor) -> Tensor:
        if self.layer_norm_bias is None:
            return rms_norm(x, self.layer_norm_weight, self.eps, self.zero_centered_gamma)
        return layer_norm(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma)
