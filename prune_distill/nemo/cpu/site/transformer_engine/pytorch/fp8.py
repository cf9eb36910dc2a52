"""Stands for `transformer_engine.pytorch.fp8`: no FP8 on the CPU (megatron/core/tensor_parallel/random.py:28)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from .._refuse import refuse


class FP8GlobalStateManager:
    """Answers that FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Always False."""
        return False


def fp8_autocast(enabled: bool = True, **_: object) -> AbstractContextManager[None]:
    """Does nothing if `enabled` is False; raises NotImplementedError otherwise."""
    if enabled:
        refuse("FP8", "leave fp8 unset in the precision plugin")
    return nullcontext()


def fp8_model_init(enabled: bool = True, **_: object) -> AbstractContextManager[None]:
    """Does nothing if `enabled` is False; raises NotImplementedError otherwise."""
    if enabled:
        refuse("FP8 parameters", "leave fp8_params unset in the precision plugin")
    return nullcontext()
