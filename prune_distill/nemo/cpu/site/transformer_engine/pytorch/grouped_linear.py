"""Stand-in for `transformer_engine.pytorch.GroupedLinear` (megatron/core/extensions/transformer_engine.py:1086)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._refuse import refuse, refuse_options
from .base import BaseModule, parameter_options
from .fp8 import FP8GlobalStateManager
from .fp8_linear import check_dimensions, fp8_linear
from .linear import default_init, mark_tensor_parallel, rng_state


class GroupedLinear(BaseModule):
    """The experts of an MoE layer in one module: `y_i = x_i W_i^T`, where `x_i` are the tokens of expert i.

    Megatron shards experts over tensor-parallel ranks itself and then passes no group; a group of several ranks is
    not supported.

    Args:
        num_gemms: number of experts; their weights are the parameters `weight0`, `weight1`, ...
        in_features, out_features: sizes of each layer.
        parallel_mode: "column", "row" or None: marks how a parameter would be sharded.
        device, params_dtype, init_method, get_rng_state_tracker, rng_tracker_name: as in `Linear`.
        sequence_parallel, ub_name: ignored.
        fuse_wgrad_accumulation, bias, return_bias: not supported.
    """

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cpu",
        ub_name: str | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if tp_size > 1:
            refuse("grouped linear layer over several ranks", "set expert_tensor_parallel_size=1")
        if bias or return_bias or fuse_wgrad_accumulation:
            refuse("grouped linear layer with biases or fused gradients", "set add_bias_linear=False")
        refuse_options(type(self).__name__, options)
        self.num_gemms = num_gemms
        self.use_bias = False
        # Megatron reads this (megatron/core/extensions/transformer_engine.py:1297).
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False
        for expert in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, **parameter_options(params_dtype, device)))
            if not weight.is_meta:
                with rng_state(get_rng_state_tracker, rng_tracker_name):
                    (init_method or default_init)(weight)
            mark_tensor_parallel(weight, dim=1 if parallel_mode == "row" else 0)
            self.register_parameter(f"weight{expert}", weight)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Do nothing: there is no FP8 state."""

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        """`[tokens, in_features]`, sorted by expert, `m_splits[i]` for expert i -> `[tokens, out_features]`."""
        shares = x.split(m_splits)
        return torch.cat([self._product(share, f"weight{i}", is_first_microbatch) for i, share in enumerate(shares)])

    def _product(self, x: Tensor, name: str, is_first_microbatch: bool | None) -> Tensor:
        weight: Tensor = getattr(self, name)
        if not FP8GlobalStateManager.is_fp8_enabled():
            return F.linear(x, weight)
        check_dimensions(x, weight)
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        return fp8_linear(x, weight, self.rounded_weight(name, recipe, is_first_microbatch), recipe)
