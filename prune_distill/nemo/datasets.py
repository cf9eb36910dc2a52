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
    module.dataset_cls = DocumentDataset
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
