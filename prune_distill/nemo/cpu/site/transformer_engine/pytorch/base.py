"""Stand-in for `transformer_engine.pytorch.module.base.TransformerEngineBaseModule`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._refuse import refuse
from ..common.recipe import Recipe
from .fp8_linear import round_weight


class BaseModule(nn.Module):
    """Base of all modules: holds the tensor-parallel group, rounded weights and an empty `_extra_state` entry.

    Transformer Engine keeps FP8 scales in `_extra_state`. Megatron's sharded checkpoints hold that key for every module
    (megatron/core/transformer/utils.py, `make_sharded_tensors_for_checkpoint`), so it exists here too, as None.
    """

    tp_group: ProcessGroup | None = None

    def __init__(self) -> None:
        super().__init__()
        self._fp8_workspaces: dict[str, Tensor] = {}

    def rounded_weight(self, name: str, recipe: Recipe, is_first_microbatch: bool | None) -> Tensor:
        """Return the weight `name` rounded to FP8.

        Like Transformer Engine's `get_weight_workspace` (pytorch/module/base.py:1333), it keeps the result where
        `is_first_microbatch` is given, and rounds again only in a first micro batch: weights do not change between.
        """
        if is_first_microbatch is not None and not is_first_microbatch and name in self._fp8_workspaces:
            return self._fp8_workspaces[name]
        rounded = round_weight(getattr(self, name), recipe)
        if is_first_microbatch is not None:
            self._fp8_workspaces[name] = rounded
        return rounded

    def get_extra_state(self) -> None:
        """Return None: current and block scaling have no state."""

    def set_extra_state(self, state: object) -> None:
        """Ignore the FP8 scales of a checkpoint written on a GPU: weights are never stored in FP8 there."""

    def set_tensor_parallel_group(self, tp_group: ProcessGroup | None) -> None:
        """Set the group after construction (nemo/collections/llm/gpt/model/base.py:427)."""
        self.tp_group = tp_group


def parameter_options(params_dtype: torch.dtype | None, device: torch.device | str) -> dict[str, Any]:
    """Return keyword arguments for `torch.empty` and similar factories.

    NeMo builds models on "meta" before it fills them from a checkpoint (nemo/lightning/_strategy_lib.py:193); any other
    device than "meta" and the CPU raises NotImplementedError.
    """
    if torch.device(device).type not in ("cpu", "meta"):
        refuse(f"parameters on device {device!r}", "set use_cpu_initialization=True in the model config")
    return {"dtype": params_dtype or torch.get_default_dtype(), "device": device}


def divide(total: int, parts: int) -> int:
    """Return `total / parts`. Raises: ValueError, if it is not an integer."""
    if total % parts:
        raise ValueError(f"{total} features cannot be split over {parts} tensor-parallel ranks")
    return total // parts
