"""Stand-in for `transformer_engine.common.recipe`: FP8 recipes, which need a GPU.

Megatron derives a class from `DelayedScaling` on import (megatron/core/extensions/transformer_engine.py:1791), NeMo
imports both names (nemo/collections/llm/gpt/model/megatron/hyena/hyena_mixer.py:47).
"""

from enum import Enum

from .._refuse import refuse


class Format(Enum):
    """Stand-in for `transformer_engine.common.recipe.Format`: names of the FP8 formats."""

    E4M3 = "E4M3"
    E5M2 = "E5M2"
    HYBRID = "HYBRID"


class DelayedScaling:
    """Stand-in for `transformer_engine.common.recipe.DelayedScaling`; the constructor raises."""

    def __init__(self, *_: object, **__: object) -> None:
        refuse("FP8", "leave fp8 unset in the precision plugin")
