"""Prepared documents as stages exchange them: Megatron's `.bin/.idx` for train and validation, and `data.json`.

Each document is its tokens and one end-of-document token. Megatron's own dataset classes read the files as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.artifact import write_json

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class DataFolder:
    """What `prepare_data` left in a folder. Token counts include end-of-document tokens."""

    folder: Path
    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int
    validation_bytes: int
    vocab_size: int
    eod_token: int

    @classmethod
    def read(cls, folder: Path) -> DataFolder:
        return cls(folder=folder, **json.loads((folder / "data.json").read_text()))

    def write(self) -> None:
        values = asdict(self)
        del values["folder"]
        write_json(self.folder / "data.json", values)

    @property
    def train(self) -> Path:
        """Megatron's prefix of the training documents (without `.bin` or `.idx`)."""
        return self.folder / "train"

    @property
    def validation(self) -> Path:
        return self.folder / "validation"

    def tokens(self, prefix: Path) -> np.ndarray:
        """All tokens of a split end to end: `[tokens]` int64."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(str(prefix))  # its documents are views into a file that it unmaps when it goes
        return np.concatenate([dataset[document] for document in range(len(dataset))]).astype(np.int64)

    def validation_sequences(self, seq_length: int) -> np.ndarray:
        """The validation documents end to end, cut into sequences.

        Returns:
            `[sequences, seq_length + 1]` int64: inputs are all but the last column, targets all but the first. What
            does not fill a sequence is left out; documents shorter than one in all give no sequence.
        """
        tokens = self.tokens(self.validation)
        count = max(0, len(tokens) - 1) // seq_length
        starts = np.arange(count)[:, None] * seq_length
        return tokens[starts + np.arange(seq_length + 1)]


class DocumentWriter:
    """Writes one split through Megatron's `IndexedDatasetBuilder`."""

    def __init__(self, prefix: Path, vocab_size: int, eod_token: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.eod_token = eod_token
        self.documents = self.tokens = self.bytes = 0
        self._builder: Any = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))

    def add(self, token_ids: list[int], text_bytes: int) -> None:
        """Adds a document of `token_ids`, whose text had `text_bytes` bytes of UTF-8."""
        ids = np.asarray([*token_ids, self.eod_token], dtype=np.int64)
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += text_bytes

    def finish(self) -> None:
        self._builder.finalize(f"{self.prefix}.idx")


def batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
