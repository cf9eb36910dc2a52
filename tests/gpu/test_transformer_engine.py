"""Megatron's model of Transformer Engine's layers on CUDA, in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import tolerance
from tests.helpers.bf16_logits import compare_logits

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: run `make test-gpu` on a machine with one", allow_module_level=True)


def test_logits_match_transformers_in_bf16(tmp_path: Path) -> None:
    found = compare_logits(tmp_path)
    assert found["device"].startswith("cuda")
    assert {"TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= set(found["layers"])
    assert found["megatron"] < tolerance.BF16_LOGITS * found["transformers"], found
