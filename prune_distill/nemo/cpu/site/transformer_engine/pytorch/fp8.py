"""Stand-in for `transformer_engine.pytorch.fp8`: whether FP8 is on, and with which recipe.

Megatron enters `fp8_autocast` around each layer (megatron/core/transformer/transformer_block.py:683). The modules then
compute their products with `fp8_linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from .._refuse import refuse
from ..common.recipe import Recipe


class FP8GlobalStateManager:
    """The recipe of the innermost `fp8_autocast`; None: FP8 is off."""

    _recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls._recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        if cls._recipe is None:
            raise RuntimeError("FP8 is off: there is no recipe outside fp8_autocast")
        return cls._recipe

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        """Return True, and no reason why not: FP8 is emulated."""
        return True, ""

    is_fp8_block_scaling_available = is_fp8_available


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: object = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Compute the products of the modules in FP8, or not, inside.

    Args:
        fp8_recipe: current or block scaling. Without one Transformer Engine takes delayed scaling, which is not
            supported.
        fp8_group: where delayed scaling exchanges its maxima; ignored.

    Raises:
        NotImplementedError: for delayed scaling, and for `calibrating`.
    """
    if calibrating or (enabled and fp8_recipe is None):
        refuse("FP8 with delayed scaling", "pass Float8CurrentScaling or Float8BlockScaling")
    outside = FP8GlobalStateManager._recipe
    FP8GlobalStateManager._recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager._recipe = outside


def fp8_model_init(enabled: bool = True, **_: object) -> AbstractContextManager[None]:
    """Return an empty context. Raises: NotImplementedError, if `enabled`."""
    if enabled:
        refuse("FP8 parameters", "leave fp8_param_gather unset in the precision plugin")
    return nullcontext()
