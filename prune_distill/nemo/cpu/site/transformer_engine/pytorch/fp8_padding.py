"""Stand-ins for `Fp8Padding` and `Fp8Unpadding`, used by megatron/core/transformer/moe/experts.py:817."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, cat, nn

# Rows of an expert's FP8 product come in multiples of this (pytorch/module/fp8_padding.py, Fp8Padding.forward).
ALIGNMENT = 16


def _padded(splits: list[int]) -> list[int]:
    return [-(-rows // ALIGNMENT) * ALIGNMENT for rows in splits]


class Fp8Padding(nn.Module):
    """Adds rows of zeros to the tokens of each expert.

    Args:
        num_gemms: number of experts.
    """

    def __init__(self, num_gemms: int) -> None:
        super().__init__()
        self.num_gemms = num_gemms

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        """`[tokens, h]`, `m_splits[i]` for expert i -> `[padded tokens, h]` and the padded splits."""
        padded = _padded(m_splits)
        parts = zip(x.split(m_splits), m_splits, padded, strict=True)
        return cat([F.pad(part, (0, 0, 0, new - old)) for part, old, new in parts]), padded


class Fp8Unpadding(nn.Module):
    """Removes the rows that `Fp8Padding` has added.

    Args:
        num_gemms: number of experts.
    """

    def __init__(self, num_gemms: int) -> None:
        super().__init__()
        self.num_gemms = num_gemms

    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:
        """`[padded tokens, h]`, and the splits before padding -> `[tokens, h]`."""
        parts = zip(x.split(_padded(m_splits)), m_splits, strict=True)
        return cat([part[:rows] for part, rows in parts])
