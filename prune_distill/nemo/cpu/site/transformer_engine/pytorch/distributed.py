"""Stand-in for `transformer_engine.pytorch.distributed` (megatron/core/tensor_parallel/random.py:27)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint

from .._refuse import refuse
from .fp8 import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker:
    """Base class of Megatron's `TECudaRNGStatesTracker` (extensions/transformer_engine.py:1827); raises when built."""

    def __init__(self, *_: object, **__: object) -> None:
        refuse("Transformer Engine RNG tracker", "set use_te_rng_tracker=False")


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[[], Any],
    tp_group: object = None,
) -> Any:
    """Call a function whose activations are computed again in the backward pass, in FP8 where FP8 is on.

    Megatron calls it for activation recompute with FP8 (megatron/core/transformer/transformer_block.py:443).
    """
    if distribute_saved_activations:
        refuse("distributed saved activations", "set distribute_saved_activations=False")
    tracker = get_rng_state_tracker()
    states, enabled = tracker.get_states(), FP8GlobalStateManager.is_fp8_enabled()
    recipe = FP8GlobalStateManager.get_fp8_recipe() if enabled else None

    @contextmanager
    def recompute() -> Iterator[None]:
        outside = tracker.get_states()
        tracker.set_states(states)
        try:
            with fp8_autocast(enabled, fp8_recipe=recipe):
                yield
        finally:
            tracker.set_states(outside)

    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), recompute())
    )


def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> AbstractContextManager[None]:
    """Return an empty context: it separates the state of delayed scaling during recompute, and there is none."""
    return nullcontext()
