"""Forward passes of a Megatron model over token ids, on any pipeline layout, and what is learned from the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from prune_distill.data.folder import DataFolder
from prune_distill.errors import InputError
from prune_distill.schema import PruneConfig

# Tokens whose logits are taken as fp32 at once.
CHUNK = 1024


def forward(core: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits `[b, s, v]` of `ids` `[b, s]` on the last pipeline stage, None on the others."""
    batch, length = ids.shape
    positions = torch.arange(length, device=ids.device).expand(batch, -1)
    kept: list[torch.Tensor] = []

    def keep(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        kept.append(logits)
        return logits.new_zeros(()), {}

    def step(_: Any, model: Any) -> tuple[torch.Tensor, Any]:
        return model(ids, positions, None), keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=core,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
        )
    return kept[0] if kept else None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The sum over all tokens, in nats."""
    total = 0.0
    for part, wanted in zip(logits.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True):
        total += torch.nn.functional.cross_entropy(part.float(), wanted, reduction="sum").item()
    return total


def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> float:
    """The sum over all tokens of KL(teacher || student), in nats."""
    total = 0.0
    for part, wanted in zip(logits.flatten(0, 1).split(CHUNK), teacher.flatten(0, 1).split(CHUNK), strict=True):
        student_log_probs, teacher_log_probs = part.float().log_softmax(-1), wanted.float().log_softmax(-1)
        total += (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum().item()
    return total


def from_last_stage(values: list[float]) -> list[float]:
    """What the last pipeline stage has, on every stage. All pass lists of the same length."""
    shared: list[Any] = [values]
    group = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast_object_list(shared, src=last, group=group)
    return list(shared[0])


@contextmanager
def without_layers(core: Any, numbers: Sequence[int]) -> Iterator[None]:
    """The model as if it had no layers of these numbers, for forward passes."""
    layers = core.decoder.layers
    core.decoder.layers = torch.nn.ModuleList(layer for layer in layers if layer.layer_number not in numbers)
    try:
        yield
    finally:
        core.decoder.layers = layers


def calibration_batches(data: DataFolder, prune: PruneConfig, count: int, seed: int, device: Any) -> list[torch.Tensor]:
    """`count` sequences of training documents, drawn at random: batches of `[b, s + 1]`."""
    return _batches(data.tokens("train"), prune, count, device, np.random.default_rng(seed))


def held_out_batches(data: DataFolder, prune: PruneConfig, count: int, device: Any) -> list[torch.Tensor]:
    """The first `count` sequences of validation documents, as batches of `[b, s + 1]`."""
    return _batches(data.tokens("validation"), prune, count, device, None)


def _batches(
    tokens: np.ndarray, prune: PruneConfig, count: int, device: Any, random: np.random.Generator | None
) -> list[torch.Tensor]:
    length = prune.calibration_seq_length
    there_are = (len(tokens) - 1) // length
    if not there_are:
        raise InputError(
            f"the documents hold {len(tokens)} tokens, less than prune.calibration_seq_length={length}; set it lower, "
            "or bring more documents"
        )
    order = np.arange(there_are) if random is None else random.permutation(there_are)
    starts = np.sort(order[:count])[:, None] * length
    sequences = torch.from_numpy(tokens[starts + np.arange(length + 1)]).to(device)
    return list(sequences.split(prune.micro_batch_size))
