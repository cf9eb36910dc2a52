"""Conversion between Hugging Face folders and NeMo checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from prune_distill.schema.fields import placement


class ExportDtype(Enum):
    """The type of an exported model's weights; `keep`: that of the checkpoint."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    keep = "keep"


@dataclass
class ConvertConfig:
    """Both conversions between Hugging Face and NeMo."""

    export_dtype: ExportDtype = ExportDtype.bf16
    # Reads a model's pytorch_model*.bin where it has no safetensors. Only their tensors are taken; nothing is unpickled
    # that could run code.
    allow_pickle: bool = False
    # Accepts weights that are NaN or infinite, and those that become infinite in the type of an export (above 65504 in
    # fp16); they are named in the log. A model with them has no logits to compare: set evaluate.verify_tokens=0.
    allow_nonfinite: bool = placement(False)
    # Whether the chunks of NeMo checkpoints carry their CRC-32, which is checked when they are read.
    checksum: bool = placement(True)
