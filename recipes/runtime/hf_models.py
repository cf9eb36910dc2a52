"""Hugging Face models at work in plain transformers: loaded once it is known that they fit, and described."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.hf_weights import ITEM_BYTES, read_folder
from conf.schema import ExportDtype
from recipes.runtime import backend

GIB = 2**30
# A weight's bytes by the names of `convert.export_dtype`.
BYTES = {ExportDtype.bf16: 2, ExportDtype.fp16: 2, ExportDtype.fp32: 4}


def load(folder: Path, dtype: ExportDtype = ExportDtype.keep) -> Any:
    """The model on this process's device, for inference; code that comes with a model is never run."""
    import torch
    from transformers import AutoModelForCausalLM

    types = {ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16, ExportDtype.fp32: torch.float32}
    # transformers before 4.56 knows the type by this name only; later ones know both.
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=types.get(dtype, "auto"))
    return model.to(backend.torch_device()).eval()


def describe(config: Any, params: int) -> dict[str, Any]:
    """A model's sizes, as reports name them, from its transformers config."""
    return {
        "params": params,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
    }


def weight_bytes(folder: Path, dtype: ExportDtype = ExportDtype.keep) -> int:
    """What the weights of a folder take in memory, in bytes, from the headers of its files."""
    entries = read_folder(folder).values()
    return sum(entry.bytes // ITEM_BYTES[entry.dtype] * BYTES.get(dtype, ITEM_BYTES[entry.dtype]) for entry in entries)


def kv_cache_bytes(folder: Path, tokens: int, dtype: ExportDtype = ExportDtype.keep) -> int:
    """What keys and values of `tokens` tokens, of all sequences together, take."""
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    groups = config.get("num_key_value_heads") or heads
    stored = config.get("dtype") or config.get("torch_dtype")
    size = BYTES.get(dtype, 4 if stored == "float32" else 2)
    return 2 * int(config["num_hidden_layers"]) * int(groups) * int(head_size) * size * tokens


def check_fits(needs: Sequence[tuple[str, int]], mend: str) -> None:
    """Raises: InputError, where what is needed, in bytes by name, is more than this process's device has left."""
    total, free = sum(size for _, size in needs), backend.free_memory_bytes()
    if total > free:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs)
        raise InputError(
            f"{total / GIB:.1f} GiB are needed ({parts}), but {backend.device_name()} has {free / GIB:.1f} GiB free;"
            f" {mend}"
        )
