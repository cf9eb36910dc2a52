"""Conversion between Hugging Face folders and NeMo checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from prune_distill.schema.fields import placement


class ExportDtype(Enum):
    """`keep`: the type that the weights have."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    keep = "keep"


@dataclass
class ConvertConfig:
    """Both conversions between Hugging Face and NeMo."""

    # Type of an exported model's weights.
    export_dtype: ExportDtype = ExportDtype.bf16
    # Reads a model's pytorch_model*.bin where it has no safetensors. Only tensors are read from them; no code that a
    # pickle names is run.
    allow_pickle: bool = False
    # Accepts weights that are NaN or infinite, or that become infinite in the export's type (above 65504 in fp16), and
    # names them in the log. Logits of such a model cannot be compared: set evaluate.verify_tokens=0 as well.
    allow_nonfinite: bool = placement(False)
    # Whether NeMo checkpoints store a CRC-32 of each chunk, which readers check.
    checksum: bool = placement(True)
