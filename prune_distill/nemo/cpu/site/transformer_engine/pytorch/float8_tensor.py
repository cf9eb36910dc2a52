"""Stand-in for `transformer_engine.pytorch.float8_tensor` (megatron/core/fp8_utils.py:41)."""

from .._refuse import refuse


class Float8Tensor:
    """Type for the `isinstance` checks of Megatron and NeMo. The constructor raises NotImplementedError."""

    def __init__(self, *_: object, **__: object) -> None:
        refuse("FP8 tensors", "leave fp8_param_gather unset in the precision plugin")
