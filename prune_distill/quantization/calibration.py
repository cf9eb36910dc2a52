"""Calibration sequences of a quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prune_distill.data.folder import DataFolder
from prune_distill.data.shards import map_tokens
from prune_distill.errors import InputError
from prune_distill.schema import QuantizeConfig


def calibration_batches(data: DataFolder, cfg: QuantizeConfig, seed: int, device: Any) -> list[torch.Tensor]:
    """Return random sequences of training documents, in batches `[b, s]`.

    Raises:
        InputError: no part of the documents has as many tokens as a sequence.
    """
    length = cfg.calibration_seq_length
    parts = [map_tokens(data.folder / part["prefix"]) for part in data.train]
    # Sequences lie within a part; only those that are drawn are read.
    counts = [len(tokens) // length for tokens in parts]
    if not sum(counts):
        raise InputError(
            f"quantize.calibration_seq_length={length}: no part of the training documents has as many tokens; lower it,"
            " or add documents"
        )
    drawn = np.random.default_rng(seed).permutation(sum(counts))[: cfg.calibration_samples]
    ends = np.cumsum(counts)
    sequences = []
    for number in np.sort(drawn):
        part = int(np.searchsorted(ends, number, side="right"))
        start = (int(number) - int(ends[part]) + counts[part]) * length
        sequences.append(parts[part][start : start + length].astype(np.int64))
    return list(torch.from_numpy(np.stack(sequences)).to(device).split(cfg.micro_batch_size))
