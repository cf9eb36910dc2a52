"""Forward pass of the teacher, whose distributions are reduced to the most probable tokens immediately."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from prune_distill.distillation.loss_terms import TopK, Vocabulary, select_top_k
from prune_distill.nemo.forward import run_forward

# Number of tokens whose logits are in memory in fp32 at the same time.
CHUNK_TOKENS = 256


def compute_top_k(
    model: Any,
    sequences: Sequence[torch.Tensor],
    *,
    micro_batch_size: int,
    top_k: int,
    temperature: float,
    receive: Callable[[TopK], None],
    boundaries: Sequence[torch.Tensor] | None = None,
    shared: int | None = None,
) -> None:
    """Run a model over sequences. All ranks of a replica pass the same sequences.

    Args:
        model: a Megatron model, or this rank's pipeline stage of it.
        sequences: token ids, `[s]` each, all of the same length.
        receive: called on the last pipeline stage for each sequence in order, with the most probable tokens of
            `softmax(logits / temperature)` at each position, `[s, top_k]`; on every tensor-parallel rank.
        boundaries: as of `run_forward`, for `micro_batch_size` 1.
        shared: the number of ids that the student has too, to which the distributions are limited; None: all.
    """
    batches = list(_micro_batches(sequences, micro_batch_size))
    size = model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
    vocabulary = Vocabulary(size, parallel_state.get_tensor_model_parallel_group(), shared)
    done = 0

    def collect(logits: torch.Tensor) -> None:
        nonlocal done
        for sequence_logits in logits:  # [b, s, v / ranks]
            if done < len(sequences):  # the rest is padding of the last micro batch
                receive(_sequence_top_k(sequence_logits, top_k, temperature, vocabulary))
            done += 1

    model.eval()
    run_forward(model, batches, collect, boundaries)


def _micro_batches(sequences: Sequence[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Yield micro batches `[size, s]`. Pipeline stages expect equal sizes, so the last one is padded with copies."""
    for start in range(0, len(sequences), size):
        batch = list(sequences[start : start + size])
        yield torch.stack(batch + [batch[-1]] * (size - len(batch)))


def _sequence_top_k(logits: torch.Tensor, top_k: int, temperature: float, vocabulary: Vocabulary) -> TopK:
    parts = []
    for chunk in logits.split(CHUNK_TOKENS):
        scaled = chunk.float() / temperature
        scaled[:, vocabulary.shared :] = -torch.inf
        scaled -= vocabulary.maximum([scaled.amax(-1)])[0][:, None]
        parts.append(select_top_k(scaled, top_k, vocabulary))
    return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_probs", "tail")))
