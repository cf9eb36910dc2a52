"""Logits and losses of a Megatron model over calibration and held-out sequences, on any pipeline layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from prune_distill.data.folder import DataFolder
from prune_distill.errors import InputError
from prune_distill.nemo.forward import run_forward
from prune_distill.schema import PruneConfig

# Number of tokens whose logits are converted to fp32 at the same time.
CHUNK = 1024


def compute_logits(core: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Return the logits `[b, s, v]` of `ids` `[b, s]` on the last pipeline stage, and None on the others."""
    outputs: list[torch.Tensor] = []
    run_forward(core, [ids], outputs.append)
    return outputs[0] if outputs else None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the cross-entropy summed over all tokens, in nats."""
    total = 0.0
    for part, reference in zip(logits.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True):
        total += torch.nn.functional.cross_entropy(part.float(), reference, reduction="sum").item()
    return total


def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> float:
    """Return KL(teacher || student) summed over all tokens, in nats."""
    total = 0.0
    for part, reference in zip(logits.flatten(0, 1).split(CHUNK), teacher.flatten(0, 1).split(CHUNK), strict=True):
        student_log_probs, teacher_log_probs = part.float().log_softmax(-1), reference.float().log_softmax(-1)
        total += (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum().item()
    return total


def broadcast_from_last_stage(values: list[float]) -> list[float]:
    """Broadcast the last pipeline stage's values to all stages. All stages pass lists of the same length."""
    shared: list[Any] = [values]
    group = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast_object_list(shared, src=last, group=group)
    return list(shared[0])


@contextmanager
def skip_layers(core: Any, numbers: Sequence[int]) -> Iterator[None]:
    """Skip the layers with these numbers in forward passes."""
    layers = core.decoder.layers
    core.decoder.layers = torch.nn.ModuleList(layer for layer in layers if layer.layer_number not in numbers)
    try:
        yield
    finally:
        core.decoder.layers = layers


def calibration_batches(data: DataFolder, prune: PruneConfig, count: int, seed: int, device: Any) -> list[torch.Tensor]:
    """Return `count` random sequences of training documents, in batches `[b, s + 1]`."""
    return _batches(data.tokens("train"), prune, count, device, np.random.default_rng(seed))


def held_out_batches(data: DataFolder, prune: PruneConfig, count: int, device: Any) -> list[torch.Tensor]:
    """Return the first `count` sequences of validation documents, in batches `[b, s + 1]`."""
    return _batches(data.tokens("validation"), prune, count, device, None)


def _batches(
    tokens: np.ndarray, prune: PruneConfig, count: int, device: Any, random: np.random.Generator | None
) -> list[torch.Tensor]:
    length = prune.calibration_seq_length
    available = (len(tokens) - 1) // length
    if not available:
        raise InputError(
            f"prune.calibration_seq_length={length}: the documents contain only {len(tokens)} tokens; lower it, or add "
            "documents"
        )
    order = np.arange(available) if random is None else random.permutation(available)
    starts = np.sort(order[:count])[:, None] * length
    sequences = torch.from_numpy(tokens[starts + np.arange(length + 1)]).to(device)
    return list(sequences.split(prune.micro_batch_size))
