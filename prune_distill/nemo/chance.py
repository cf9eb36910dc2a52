"""Check that a teacher is better than chance. No NeMo."""

from __future__ import annotations

import math

from prune_distill.errors import InputError


def require_better_than_chance(loss: float, vocab_size: int, source: str, fix: str) -> None:
    """Reject a teacher whose loss is not below that of a uniform distribution over its vocabulary.

    Such a teacher has damaged weights, or a different tokenizer than the data.

    Args:
        loss: in nats per token; NaN is rejected too.
        source: the data on which the loss was measured, for the message.
        fix: what to check, for the message.

    Raises:
        InputError: the loss is not below the chance level.
    """
    chance = math.log(vocab_size)
    if not loss < chance:  # not `>=`, which is false for NaN
        raise InputError(
            f"the teacher's loss on {source} is {loss:.3f} nats per token, no better than chance ({chance:.3f}); {fix}"
        )
