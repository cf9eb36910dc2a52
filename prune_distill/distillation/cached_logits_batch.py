"""Cached logits as columns of a training batch, from the dataset to the last pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.collections.llm.gpt.model.base import gpt_data_step
from torch.utils.data import Dataset

from prune_distill.distillation.cached_logits import CachedLogitsReader, packing_digest

COLUMNS = ("cached_ids", "cached_logprobs", "cached_tail")


class SequenceSources(NamedTuple):
    """The sources of the sequences of a training.

    Attributes:
        names: the source of each part of the training documents.
        parts: the part of each sequence, `[sequences]`.
    """

    names: list[str]
    parts: np.ndarray


@dataclass(frozen=True)
class TeacherCaches:
    """The cached logits of a training's teachers.

    Attributes:
        readers: one per teacher. Each contains the sequences of its sources, in the order of the training.
        by_source: the reader of each source of the data; empty: there is one teacher.
    """

    readers: Sequence[CachedLogitsReader]
    by_source: Mapping[str, int] = field(default_factory=dict)

    def readers_of(self, sources: SequenceSources) -> np.ndarray:
        """Return the number of each sequence's reader, `[sequences]`."""
        readers = [self.by_source[name] if self.by_source else 0 for name in sources.names]
        return np.array(readers, dtype=np.int8)[sources.parts]


class CachedLogitsDataset(Dataset[dict[str, torch.Tensor]]):
    """Training sequences with their cached logits.

    Adds `cached_ids` `[s, k]` int32, `cached_logprobs` `[s, k]` float16 and `cached_tail` `[s]` float32.

    Args:
        readers: number of each sequence's reader, `[sequences]`; `places`: the sequence's number in that reader.
    """

    def __init__(self, sequences: Any, caches: TeacherCaches, readers: np.ndarray, places: np.ndarray) -> None:
        self.sequences, self.caches, self.readers, self.places = sequences, caches, readers, places

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.sequences[index]
        reader = self.caches.readers[self.readers[index]]
        columns = reader.read(int(self.places[index]), item["tokens"].numpy())
        return {**item, **{name: torch.from_numpy(array) for name, array in zip(COLUMNS, columns, strict=True)}}


def attach_cached_logits(sequences: Any, caches: TeacherCaches, seq_length: int, sources: SequenceSources) -> Any:
    """Add the columns of the cached logits to the training sequences on the last pipeline stage, which computes the
    loss.

    Args:
        sources: those of the sequences that training reads.

    Raises:
        InputError: a cache was made for other sequences.
    """
    readers = caches.readers_of(sources)
    places = np.zeros(len(readers), dtype=np.int32)
    for number, reader in enumerate(caches.readers):
        own = np.flatnonzero(readers == number)
        places[own] = np.arange(len(own))
        reader.require(seq_length=seq_length, sequences=len(own), packing=subset_digest(sequences, own))
    if not parallel_state.is_pipeline_last_stage():
        return sequences
    return CachedLogitsDataset(sequences, caches, readers, places)


def subset_digest(sequences: Any, numbers: np.ndarray) -> str:
    """Return the `packing_digest` of some of the training sequences, by number."""
    return packing_digest(lambda index: sequences[int(numbers[index])]["tokens"].numpy(), len(numbers))


def data_step(batches: Iterator[Any]) -> dict[str, Any]:
    """Extend NeMo's `gpt_data_step`, which drops unknown columns (nemo/collections/llm/gpt/model/base.py:92-97).

    The cached columns are moved to the device and split along the sequence for context parallelism, like the others.
    """
    batch = next(batches)
    columns = batch[0] if isinstance(batch, tuple) else batch
    cached_logits = {name: columns[name].cuda(non_blocking=True) for name in COLUMNS if name in columns}
    return {**gpt_data_step(iter([batch])), **get_batch_on_this_cp_rank(cached_logits)}
