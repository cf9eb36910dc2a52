"""The chunked loss on CUDA against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prune_distill.schema import KdConfig, LossImplementation
from tests.helpers.plain_loss import CONFIGS, assert_exact

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: run `make test-gpu` on a machine with one", allow_module_level=True)


@pytest.mark.parametrize("implementation", [LossImplementation.chunked, LossImplementation.triton])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.divergence.value}-{c.temperature}-{c.lm_weight}")
def test_loss_and_gradients_match_float64(
    config: KdConfig, dtype: torch.dtype, implementation: LossImplementation
) -> None:
    assert_exact(dataclasses.replace(config, implementation=implementation), "cuda", dtype)
