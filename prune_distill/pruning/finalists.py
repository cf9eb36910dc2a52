"""The candidates of a search that are distilled for a short time: their names, and the memory that each one takes."""

from __future__ import annotations

import gc
from typing import Any

import torch

from prune_distill.model.student import AXES


def name_of(row: dict[str, Any]) -> str:
    """Return a folder name: layers, hidden size, FFN, heads, query groups, and every dropped layer."""
    sizes = [f"{letter}{row[axis]}" for letter, axis in zip("lhfaq", AXES, strict=True)]
    return "-".join(["candidate", *sizes, *(f"d{layer}" for layer in row["drop_layers"])])


def release() -> None:
    """Free the memory of the last model, which reference cycles keep alive."""
    gc.collect()
    torch.cuda.empty_cache()
