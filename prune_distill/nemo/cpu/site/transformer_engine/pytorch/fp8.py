"""Stand-in for `transformer_engine.pytorch.fp8` (megatron/core/tensor_parallel/random.py:28); FP8 is always off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from .._refuse import refuse


class FP8GlobalStateManager:
    """Reports that FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Return False."""
        return False


def fp8_autocast(enabled: bool = True, **_: object) -> AbstractContextManager[None]:
    """Return an empty context. Raises: NotImplementedError, if `enabled`."""
    if enabled:
        refuse("FP8", "leave fp8 unset in the precision plugin")
    return nullcontext()


def fp8_model_init(enabled: bool = True, **_: object) -> AbstractContextManager[None]:
    """Return an empty context. Raises: NotImplementedError, if `enabled`."""
    if enabled:
        refuse("FP8 parameters", "leave fp8_params unset in the precision plugin")
    return nullcontext()
