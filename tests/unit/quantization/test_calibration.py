"""Calibration sequences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_distill.errors import InputError
from prune_distill.nemo import backend
from prune_distill.schema import QuantizeConfig

backend.activate()

from prune_distill.quantization.calibration import calibration_batches  # noqa: E402
from tests.helpers.one_rank import write_data  # noqa: E402


def test_sequences_are_random_parts_of_the_training_documents(tmp_path: Path) -> None:
    # Consecutive ids, so that a sequence says where it was.
    data = write_data(tmp_path, {"a": [list(range(25))], "b": [list(range(25, 41)), list(range(41, 48))]}, [[1]])
    cfg = QuantizeConfig(calibration_samples=8, calibration_seq_length=5, micro_batch_size=3)
    batches = calibration_batches(data, cfg, seed=1, device="cpu")
    assert [tuple(batch.shape) for batch in batches] == [(3, 5), (3, 5), (2, 5)]
    sequences = torch.cat(batches)
    starts = sequences[:, 0].tolist()
    # All that are complete within a part, but for one of the nine.
    possible = [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert len(set(starts)) == 8
    assert set(starts) < set(possible)
    assert torch.equal(sequences, torch.tensor(starts)[:, None] + torch.arange(5))
    assert torch.equal(torch.cat(calibration_batches(data, cfg, seed=1, device="cpu")), sequences)
    cfg.calibration_samples = 4
    drawn = [torch.cat(calibration_batches(data, cfg, seed, "cpu"))[:, 0].tolist() for seed in range(4)]
    assert len({tuple(starts) for starts in drawn}) > 1


def test_too_few_tokens(tmp_path: Path) -> None:
    data = write_data(tmp_path, {"a": [[1] * 9], "b": [[1] * 9]}, [[1]])
    with pytest.raises(InputError, match="quantize.calibration_seq_length=10"):
        calibration_batches(data, QuantizeConfig(calibration_seq_length=10), seed=1, device="cpu")
