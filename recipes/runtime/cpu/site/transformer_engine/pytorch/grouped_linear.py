"""Stands for `transformer_engine.pytorch.GroupedLinear` (megatron/core/extensions/transformer_engine.py:1086)."""

from .._refuse import refuse
from .base import BaseModule


class GroupedLinear(BaseModule):
    """The experts of a mixture in one module; Megatron derives classes from it on import. Refused when built."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        refuse("grouped linear layer", "set moe_grouped_gemm=False")
