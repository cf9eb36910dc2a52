"""Stand-in for `transformer_engine.pytorch.cpp_extensions` (megatron/core/fp8_utils.py:274)."""

from typing import NoReturn

from .._refuse import refuse


def cast_to_fp8(*_: object, **__: object) -> NoReturn:
    """Raise NotImplementedError: the CPU has no FP8."""
    refuse("FP8", "leave fp8 unset in the precision plugin")
