"""Stands for `transformer_engine.pytorch.cpp_extensions` (megatron/core/fp8_utils.py:274)."""

from typing import NoReturn

from .._refuse import refuse


def cast_to_fp8(*_: object, **__: object) -> NoReturn:
    """Refused: there is no FP8 on the CPU."""
    refuse("FP8", "leave fp8 unset in the precision plugin")
