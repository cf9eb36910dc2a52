"""Stands for `transformer_engine.pytorch.float8_tensor` (megatron/core/fp8_utils.py:41)."""

from .._refuse import refuse


class Float8Tensor:
    """Megatron and NeMo ask whether a parameter is one; none ever is. Refused when built."""

    def __init__(self, *_: object, **__: object) -> None:
        refuse("FP8 tensors", "leave fp8_params unset in the precision plugin")
