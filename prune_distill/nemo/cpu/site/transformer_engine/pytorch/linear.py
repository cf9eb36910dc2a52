"""Stand-in for `transformer_engine.pytorch.Linear` (megatron/core/extensions/transformer_engine.py:242)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._refuse import refuse, refuse_options
from .base import BaseModule, divide, parameter_options
from .collectives import copy_to_group, gather_sequence, sum_and_scatter_sequence, sum_over_group
from .fp8 import FP8GlobalStateManager
from .fp8_linear import check_dimensions, fp8_linear


def mark_tensor_parallel(parameter: nn.Parameter, dim: int) -> None:
    """Mark how a parameter is sharded, for Megatron's gradient norm (megatron/core/tensor_parallel/layers.py:87)."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def default_init(weight: Tensor) -> None:
    nn.init.normal_(weight, mean=0.0, std=0.023)


class Linear(BaseModule):
    """`y = x W^T + b`, with `W` sharded over the tensor-parallel group by rows ("column") or columns ("row").

    Args:
        in_features, out_features: sizes of the whole layer; each rank holds its shard.
        sequence_parallel: "column" all-gathers its input `[s / tp, b, h]`, "row" reduce-scatters its output to it.
        fuse_wgrad_accumulation: not supported.
        tp_group, tp_size: the tensor-parallel group; with the size alone, call `set_tensor_parallel_group` later.
        get_rng_state_tracker, rng_tracker_name: the tracker, and its state, for initializing the weight.
        init_method: fills the weight in place; normal with a standard deviation of 0.023 if None.
        bias: whether there is a bias.
        return_bias: return `(y, bias)` without adding the bias.
        params_dtype: type of the parameters; PyTorch's default type if None.
        parallel_mode: "column", "row" or None.
        device: the CPU, or "meta" for a weight that is loaded later.
        ub_name: name of the layer's communication buffer, kept as an attribute.
        **options: other options of Transformer Engine 1.9 (communication overlap, parameter split) raise.
    """

    def __init__(
        self,
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
        if fuse_wgrad_accumulation:
            refuse(
                "fused accumulation of weight gradients", "set gradient_accumulation_fusion=False in the model config"
            )
        if parallel_mode not in ("column", "row", None):
            raise ValueError(f"parallel_mode={parallel_mode!r}: unknown; use 'column', 'row' or None")
        refuse_options(type(self).__name__, options)
        self.tp_group = tp_group
        self.tp_size = dist.get_world_size(tp_group) if tp_group is not None else tp_size
        self.parallel_mode = parallel_mode
        self.sequence_parallel = sequence_parallel and self.tp_size > 1
        self.in_features = divide(in_features, self.tp_size) if parallel_mode == "row" else in_features
        self.out_features = divide(out_features, self.tp_size) if parallel_mode == "column" else out_features
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.ub_name = ub_name

        parameters = parameter_options(params_dtype, device)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **parameters))
        if not self.weight.is_meta:
            with rng_state(get_rng_state_tracker, rng_tracker_name):
                (init_method or default_init)(self.weight)
        mark_tensor_parallel(self.weight, dim=1 if parallel_mode == "row" else 0)
        # Without a bias Transformer Engine keeps an empty tensor here, which is not a parameter.
        self.bias = self._new_bias(parameters) if bias else torch.empty(0, **parameters)

    def _new_bias(self, parameters: dict[str, Any]) -> nn.Parameter:
        bias = nn.Parameter(torch.zeros(self.out_features, **parameters))
        if self.parallel_mode == "column":
            mark_tensor_parallel(bias, dim=0)
        elif self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel
        return bias

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`[s, b, in_features]` -> `[s, b, out_features]`; with sequence parallelism one of the two is `[s / tp, ...]`.

        `is_first_microbatch`: see `rounded_weight`; without FP8 it is ignored.
        """
        bias = self.bias if self.apply_bias else None
        if FP8GlobalStateManager.is_fp8_enabled():
            check_dimensions(x, self.weight)
        if self.tp_size == 1 or self.parallel_mode is None:
            y = self._product(x, bias, is_first_microbatch)
        elif self.parallel_mode == "column":
            y = self._product(self._distribute_input(x), bias, is_first_microbatch)
        else:
            y = self._reduce_output(self._product(x, None, is_first_microbatch))
            y = y if bias is None else y + bias
        return (y, self.bias) if self.return_bias else y

    def _product(self, x: Tensor, bias: Tensor | None, is_first_microbatch: bool | None) -> Tensor:
        """The input of a sequence-parallel layer is rounded with one scale over all ranks, as if it were gathered first
        (Transformer Engine's pytorch/module/linear.py:1649)."""
        if not FP8GlobalStateManager.is_fp8_enabled():
            return F.linear(x, self.weight, bias)
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        rounded = self.rounded_weight("weight", recipe, is_first_microbatch)
        y = fp8_linear(x, self.weight, rounded, recipe)
        return y if bias is None else y + bias

    def _distribute_input(self, x: Tensor) -> Tensor:
        return (gather_sequence if self.sequence_parallel else copy_to_group)(x, self._group())

    def _reduce_output(self, y: Tensor) -> Tensor:
        return (sum_and_scatter_sequence if self.sequence_parallel else sum_over_group)(y, self._group())

    def _group(self) -> ProcessGroup:
        assert self.tp_group is not None, "set_tensor_parallel_group was not called"
        return self.tp_group


def rng_state(get_tracker: Callable[[], Any] | None, name: str | None) -> AbstractContextManager[Any]:
    if get_tracker is None:
        return nullcontext()
    return get_tracker().fork(name) if name else get_tracker().fork()
