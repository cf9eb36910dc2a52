"""Hugging Face models at work in plain transformers: loaded once it is known that they fit, and described."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.hf_tokenizer import read_object
from conf.schema import ExportDtype
from recipes.runtime import backend

log = logging.getLogger("recipes.hf_models")

GIB = 2**30
# Those of a generation config: what a text begins with, ends with and is filled up with.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A weight's bytes by the names of `convert.export_dtype`.
BYTES = {ExportDtype.bf16: 2, ExportDtype.fp16: 2, ExportDtype.fp32: 4}
# Bytes of one element in a safetensors header.
_STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def load(folder: Path, dtype: ExportDtype = ExportDtype.keep) -> Any:
    """The model on this process's device, for inference; code that comes with a model is never run."""
    import torch
    from transformers import AutoModelForCausalLM

    types = {ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16, ExportDtype.fp32: torch.float32}
    # transformers before 4.56 knows the type by this name only; later ones know both.
    options = {"torch_dtype": types.get(dtype, "auto"), **generation_options(folder)}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.to(backend.torch_device()).eval()


def generation_options(folder: Path) -> dict[str, Any]:
    """Arguments for a model's `from_pretrained` where transformers would refuse its `generation_config.json`, which it
    reads last, with an exception that it does not handle (modeling_utils.py): the token ids in that file alone."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:
        log.warning("%s is left aside but for its token ids: %s", path, " ".join(str(error).split()))
        ids = {name: value for name, value in read_object(path).items() if name in TOKEN_IDS and _are_ids(value)}
        return {"generation_config": GenerationConfig(**ids)}
    return {}


def _are_ids(value: Any) -> bool:
    return all(type(number) is int for number in (value if isinstance(value, list) else [value]))


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
    """What the weights of a folder take in memory; read off the files' headers."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                total += _elements(tensor["shape"]) * BYTES.get(dtype, _STORED.get(tensor["dtype"], 1))
    return total


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


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
