"""NeMo's data module and Megatron's datasets over prepared documents.

Import this module after `backend.activate()`; the runner calls that before it imports a stage.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from nemo.collections import llm

from prune_distill.data.folder import DataFolder
from prune_distill.data.packing import cut, pack
from prune_distill.schema import Packing


def make_data_module(
    tokenizer: Any,
    data: DataFolder,
    out: Path,
    *,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    num_workers: int,
    seed: int,
    packing: Packing = Packing.concatenated,
) -> llm.PreTrainingDataModule:
    """Make NeMo's data module over prepared documents; Megatron's index of sequences goes to `out/index_mapping`."""
    validation = data.validation_paths
    module = llm.PreTrainingDataModule(
        paths={"train": data.train_paths, "validation": validation, "test": validation},
        split=None,
        seq_length=seq_length,
        tokenizer=tokenizer,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        seed=seed,
        # The default is next to the data, in another stage's folder.
        index_mapping_dir=str(out / "index_mapping"),
    )
    # Not passed to the constructor, for the reason given in `nemo_api.make_trainer`.
    module.dataset_cls = {Packing.concatenated: DocumentDataset, Packing.documents: PackedDataset}[packing]
    return module


class _NumpyWithAtomicSave:
    """NumPy for Megatron's datasets: a file that they save is complete or absent.

    They write their index under its final name and trust any file of that name in the next attempt
    (megatron/core/datasets/gpt_dataset.py:341-351 and :463, blended_dataset.py:116-121 and :176). A file truncated by
    a kill or a full disk would make every later attempt fail.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def save(path: str, array: np.ndarray, **options: Any) -> None:
        # Only one process writes here: the first rank of the stage that has locked the folder.
        partial = Path(path).with_name(f".partial.{Path(path).name}")
        with partial.open("wb") as file:
            np.save(file, array, **options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


for _module in (gpt_dataset, blended_dataset):
    _module.numpy = _NumpyWithAtomicSave()


class DocumentDataset(GPTDataset):
    """Sequences cut from concatenated documents. Every token is text; there is no padding.

    Megatron's own dataset treats each token with the tokenizer's pad id as padding: it replaces the token by 0 and
    masks its loss (megatron/core/datasets/gpt_dataset.py:211-215). A model that pads with its end-of-text token, as
    Qwen3's base models do, would then never see or learn the end of a document.

    If `prepare_data` wrote masks (`data.learn`), they become the loss mask.
    """

    dataset: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._pad_token_id = (
            -1
        )  # not a token id; what Megatron uses for a tokenizer without a pad token (gpt_dataset.py:28)
        mask = f"{self.dataset_path}_mask"
        self._masks = IndexedDataset(mask, mmap=self.config.mmap_bin_files) if Path(f"{mask}.idx").exists() else None

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        item: dict[str, torch.Tensor] = super().__getitem__(idx)
        if self._masks is None or idx is None:
            return item
        return {**item, "loss_mask": item["loss_mask"] * self._loss_mask(idx)}

    def _loss_mask(self, idx: int) -> torch.Tensor:
        """Return the mask of a sequence's labels, `[s]`. Documents and masks are cut in the same way."""
        tokens, self.dataset = self.dataset, self._masks
        try:
            mask, _ = self._query_document_sample_shuffle_indices(idx)
        finally:
            self.dataset = tokens
        return torch.from_numpy(mask[1:]).clamp(min=0)  # padding is -1


class PackedDataset(DocumentDataset):
    """Sequences of whole documents, between which there is no attention. Documents that are too long are cut.

    A document of n tokens takes n - 1 places: its last token is a label only. The rest of a sequence is padding, which
    is not learned. `cu_seqlens` and its companions are the columns from which NeMo makes Megatron's `PackedSeqParams`
    (nemo/collections/llm/gpt/model/base.py:775); its Transformer Engine kernels take one sequence at a time.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Build or load the index, in the place of Megatron's: rank 0 builds it, and the others load it afterwards.

        Returns:
            The pieces of documents in the order of the sequences, `[pieces, 3]`: document, first token, places; the
            first piece of each sequence, `[sequences + 1]`; and the order of the sequences, `[sequences]`.
        """
        base = Path(self.config.path_to_cache) / f"{self.unique_description_hash}-{type(self).__name__}"
        paths = [Path(f"{base}-{self.index_split.name}-{name}.npy") for name in ("pieces", "first_piece", "order")]
        if not all(path.is_file() for path in paths):
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            for path, array in zip(paths, self._pack(), strict=True):
                _NumpyWithAtomicSave.save(str(path), array)
        pieces, first_piece, order = (np.load(path, mmap_mode="r") for path in paths)
        return pieces, first_piece, order

    def _pack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pack all documents again for each epoch, until there are enough sequences."""
        random = np.random.RandomState(self.config.random_seed)
        pieces: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        order: list[np.ndarray] = []
        made, wanted = 0, self.num_samples or 1
        while made < wanted:
            documents = random.permutation(self.indices)
            # A document of one token, its end, has nothing to predict.
            places = self.dataset.sequence_lengths[documents].astype(np.int64) - 1
            documents, places = documents[places > 0], places[places > 0]
            number, first, length = cut(places, self.config.sequence_length)
            sequence = pack(length, self.config.sequence_length)
            sorted_by_sequence = np.argsort(sequence, kind="stable")
            pieces.append(np.stack((documents[number], first, length), axis=1)[sorted_by_sequence])
            counts.append(np.bincount(sequence))
            order.append(made + random.permutation(len(counts[-1])))
            made += len(counts[-1])
        first_piece = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
        return np.concatenate(pieces), first_piece, np.concatenate(order)

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pieces of a sequence, `[pieces, 3]`, and their documents, `[pieces]`."""
        sequence = self.shuffle_index[idx]
        pieces = self.document_index[self.sample_index[sequence] : self.sample_index[sequence + 1]]
        return pieces, pieces[:, 0]

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        length = self.config.sequence_length
        pieces, _ = self._query_document_sample_shuffle_indices(idx or 0)
        tokens, labels, mask, positions = (np.zeros(length, dtype=np.int64) for _ in range(4))
        at, ends = 0, [0]
        for document, first, places in pieces.tolist():
            own = slice(at, at + places)
            text = self.dataset.get(document, offset=first, length=places + 1)
            tokens[own], labels[own], positions[own] = text[:-1], text[1:], np.arange(places)
            learned = 1 if self._masks is None else self._masks.get(document, offset=first + 1, length=places)
            mask[own] = 0 if idx is None else learned
            at += places
            ends.append(at)
        if at < length:  # the padding is a document of its own
            ends.append(length)
        return {
            **{name: torch.from_numpy(array) for name, array in (("tokens", tokens), ("labels", labels))},
            "loss_mask": torch.from_numpy(mask).float(),
            "position_ids": torch.from_numpy(positions),
            # NeMo takes what stands before the smallest value.
            "cu_seqlens": torch.tensor([*ends, -1], dtype=torch.int32),
            "cu_seqlens_argmin": torch.tensor(len(ends)),
            "max_seqlen": torch.tensor(int(np.diff(ends).max())),
        }
