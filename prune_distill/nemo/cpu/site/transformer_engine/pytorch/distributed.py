"""Stands for `transformer_engine.pytorch.distributed` (megatron/core/tensor_parallel/random.py:27)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from .._refuse import refuse


class CudaRNGStatesTracker:
    """Base class of Megatron's `TECudaRNGStatesTracker` (extensions/transformer_engine.py:1827); refused when built."""

    def __init__(self, *_: object, **__: object) -> None:
        refuse("Transformer Engine RNG tracker", "set use_te_rng_tracker=False")


def checkpoint(*_: object, **__: object) -> NoReturn:
    """Activation recompute under FP8, the only case in which Megatron asks for it here."""
    refuse("activation recompute under FP8", "leave fp8 unset in the precision plugin")


def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> AbstractContextManager[None]:
    """Keeps FP8 scales apart while activations are recomputed; without FP8 there is nothing to keep."""
    return nullcontext()
