"""Stand-in for `transformer_engine.pytorch.distributed` (megatron/core/tensor_parallel/random.py:27)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from .._refuse import refuse


class CudaRNGStatesTracker:
    """Base class of Megatron's `TECudaRNGStatesTracker` (extensions/transformer_engine.py:1827); raises when built."""

    def __init__(self, *_: object, **__: object) -> None:
        refuse("Transformer Engine RNG tracker", "set use_te_rng_tracker=False")


def checkpoint(*_: object, **__: object) -> NoReturn:
    """Raise NotImplementedError: Megatron calls it only for activation recompute with FP8."""
    refuse("activation recompute under FP8", "leave fp8 unset in the precision plugin")


def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> AbstractContextManager[None]:
    """Return an empty context: it separates FP8 scales during recompute, and there are none."""
    return nullcontext()
