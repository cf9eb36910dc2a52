"""The teacher run forward over sequences, as Megatron's schedule does it over a pipeline; its distributions cut to the
most probable tokens at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from prune_distill.distillation.kd_loss import TopK, Vocabulary, top_k_of
from prune_distill.nemo import backend

# Tokens whose logits are in memory in fp32 at a time.
CHUNK_TOKENS = 256


def most_probable(
    model: Any,
    sequences: Sequence[torch.Tensor],
    *,
    micro_batch_size: int,
    top_k: int,
    temperature: float,
    take: Callable[[TopK], None],
) -> None:
    """Runs a model over sequences; all ranks of a replica call it with the same ones.

    Args:
        model: Megatron's, or this rank's stage of it.
        sequences: `[s]` ids each, all as long.
        take: called on the last pipeline stage for each sequence in order, with the most probable tokens of
            `softmax(logits / temperature)` at each position, `[s, top_k]`; on every tensor-parallel rank.
    """
    batches = list(_micro_batches(sequences, micro_batch_size))
    size = model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
    vocabulary = Vocabulary(size, parallel_state.get_tensor_model_parallel_group())
    done = 0

    def collect(logits: torch.Tensor, non_loss_data: bool) -> None:
        nonlocal done
        for sequence_logits in logits:  # of [b, s, V / ranks]
            if done < len(sequences):  # the rest fills the last micro batch
                take(_sequence_top_k(sequence_logits, top_k, temperature, vocabulary))
            done += 1

    def forward(source: Iterator[torch.Tensor], stage: Any) -> Any:
        tokens = next(source).to(backend.activate().device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return stage(tokens, positions, None), collect

    model.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=len(sequences[0]),
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _micro_batches(sequences: Sequence[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Micro batches `[size, s]`: all as large, as pipeline stages expect; the last sequence fills the last one up."""
    for start in range(0, len(sequences), size):
        batch = list(sequences[start : start + size])
        yield torch.stack(batch + [batch[-1]] * (size - len(batch)))


def _sequence_top_k(logits: torch.Tensor, top_k: int, temperature: float, vocabulary: Vocabulary) -> TopK:
    parts = []
    for chunk in logits.split(CHUNK_TOKENS):
        scaled = chunk.float() / temperature
        scaled -= vocabulary.maximum([scaled.amax(-1)])[0][:, None]
        parts.append(top_k_of(scaled, top_k, vocabulary))
    return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_probs", "tail")))
