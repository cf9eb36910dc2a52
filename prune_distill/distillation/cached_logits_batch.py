"""Cached logits as columns of a training batch, from the dataset to the last pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.collections.llm.gpt.model.base import gpt_data_step
from torch.utils.data import Dataset

from prune_distill.distillation.cached_logits import CachedLogitsReader, packing_digest

COLUMNS = ("cached_ids", "cached_logprobs", "cached_tail")


class CachedLogitsDataset(Dataset[dict[str, torch.Tensor]]):
    """Training sequences with their cached logits.

    Adds `cached_ids` `[s, k]` int32, `cached_logprobs` `[s, k]` float16 and `cached_tail` `[s]` float32.
    """

    def __init__(self, sequences: Any, cached_logits: CachedLogitsReader) -> None:
        self.sequences, self.cached_logits = sequences, cached_logits

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.sequences[index]
        columns = self.cached_logits.read(index, item["tokens"].numpy())
        return {**item, **{name: torch.from_numpy(array) for name, array in zip(COLUMNS, columns, strict=True)}}


def attach_cached_logits(sequences: Any, cached_logits: CachedLogitsReader, seq_length: int, count: int) -> Any:
    """Add the columns of the cached logits to the training sequences on the last pipeline stage, which computes the
    loss.

    Args:
        count: number of sequences that training reads.

    Raises:
        InputError: the cache was made for other sequences.
    """
    digest = packing_digest(lambda index: sequences[index]["tokens"].numpy(), count)
    cached_logits.require(seq_length=seq_length, sequences=count, packing=digest)
    return CachedLogitsDataset(sequences, cached_logits) if parallel_state.is_pipeline_last_stage() else sequences


def data_step(batches: Iterator[Any]) -> dict[str, Any]:
    """Extend NeMo's `gpt_data_step`, which drops unknown columns (nemo/collections/llm/gpt/model/base.py:92-97).

    The cached columns are moved to the device and split along the sequence for context parallelism, like the others.
    """
    batch = next(batches)
    columns = batch[0] if isinstance(batch, tuple) else batch
    cached_logits = {name: columns[name].cuda(non_blocking=True) for name in COLUMNS if name in columns}
    return {**gpt_data_step(iter([batch])), **get_batch_on_this_cp_rank(cached_logits)}
