"""Stand-in for `transformer_engine.pytorch.cpp_extensions` (megatron/core/fp8_utils.py:274)."""

from typing import NoReturn

from .._refuse import refuse


def cast_to_fp8(*_: object, **__: object) -> NoReturn:
    """Raise NotImplementedError: Megatron casts parameters with it, which are never FP8 here."""
    refuse("FP8 parameters", "leave fp8_param_gather unset in the precision plugin")
