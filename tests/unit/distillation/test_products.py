"""Products with float32 results of bf16 inputs, on this device."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from prune_distill.distillation import products


def factors(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, 40, generator=generator).to(dtype)
    # Both factors of the loss are views of rows: transposed ones too.
    return left, torch.randn(columns, 40, generator=generator).to(dtype).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(3, 50), (50, 3), (1, 1)])
def test_the_result_is_not_rounded_to_the_inputs_type(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(products, "BLOCK", 16)  # the last of 50 columns are a smaller block
    left, right = factors(rows, columns, dtype)
    exact = left.double() @ right.double()
    out = torch.full((rows, columns), torch.nan)
    assert products.multiply(left, right, out) is out
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    total = torch.ones(rows, columns)
    products.add_product(left, right, total)
    torch.testing.assert_close(total.double(), 1 + exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [products._can_multiply, products._can_accumulate])
def test_whether_a_device_can_is_tried_once(function: object, caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch's CPU build has no such product, as versions below 2.8 have none for CUDA."""
    products._can_multiply.cache_clear()
    products._can_accumulate.cache_clear()
    with caplog.at_level(logging.WARNING, "recipes.distillation"):
        for _ in range(2):
            assert function(torch.device("cpu"), torch.bfloat16) is False  # type: ignore[operator]
    assert [record.getMessage() for record in caplog.records] == [
        f"PyTorch {torch.__version__} cannot multiply torch.bfloat16 into float32 on cpu: logits are rounded to "
        "torch.bfloat16; 2.8 or later can"
    ]
