"""Load Hugging Face models with transformers, check that they fit in memory, and describe their sizes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from prune_distill.errors import InputError
from prune_distill.model import hf_config
from prune_distill.model.hf_tokenizer import read_object
from prune_distill.model.hf_weights import ITEM_BYTES, read_folder
from prune_distill.model.model_size import ModelSizes
from prune_distill.nemo import devices
from prune_distill.schema import ExportDtype
from prune_distill.units import GIB

log = logging.getLogger("recipes.hf_models")

# Special tokens in a generation config.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Bytes per weight for each `convert.export_dtype`.
BYTES = {ExportDtype.bf16: 2, ExportDtype.fp16: 2, ExportDtype.fp32: 4}


def load(folder: Path, dtype: ExportDtype = ExportDtype.keep) -> Any:
    """Load a model to this process's device, for inference. Code in the model's folder is never run.

    The config is passed as an object, because transformers 4 and 5 each ignore keys that the other version writes.
    """
    types = {ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16, ExportDtype.fp32: torch.float32}
    config = AutoConfig.for_model(**hf_config.make_compatible(hf_config.read_config(folder / "config.json")))
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        # transformers before 4.56 has only this name; later versions accept both.
        torch_dtype=types.get(dtype, "auto"),
        trust_remote_code=False,
        use_safetensors=True,
        **generation_options(folder),
    )
    return model.to(devices.torch_device()).eval()


def generation_options(folder: Path) -> dict[str, Any]:
    """Return arguments for `from_pretrained` that replace a `generation_config.json` which transformers cannot read.

    `from_pretrained` reads that file last and does not handle its errors (modeling_utils.py). Only its token ids are
    kept.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:
        log.warning("%s is ignored except for its token ids: %s", path, " ".join(str(error).split()))
        ids = {name: value for name, value in read_object(path).items() if name in TOKEN_IDS and _are_ids(value)}
        return {"generation_config": GenerationConfig(**ids)}
    return {}


def _are_ids(value: Any) -> bool:
    return all(type(number) is int for number in (value if isinstance(value, list) else [value]))


def describe(config: Any, params: int) -> ModelSizes:
    """Return the sizes of a model, under their names in reports, from its transformers config."""
    return {
        "params": params,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
    }


def weight_bytes(folder: Path, dtype: ExportDtype = ExportDtype.keep) -> int:
    """Return the memory of a folder's weights in bytes, from the headers of its files."""
    entries = read_folder(folder).values()
    return sum(entry.bytes // ITEM_BYTES[entry.dtype] * BYTES.get(dtype, ITEM_BYTES[entry.dtype]) for entry in entries)


def kv_cache_bytes(folder: Path, tokens: int, dtype: ExportDtype = ExportDtype.keep) -> int:
    """Return the bytes of the KV cache of `tokens` tokens, over all sequences. A quantized model may have it in FP8."""
    config = hf_config.read_unchecked(folder / "config.json")
    size = BYTES.get(dtype, 4 if config.get("torch_dtype") == "float32" else 2)
    if any(name.endswith(".k_scale") for name in read_folder(folder)):
        size = 1
    layers, groups, head_size = (config[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    return int(2 * layers * groups * head_size * size * tokens)


def check_fits(needs: Sequence[tuple[str, int]], fix: str) -> None:
    """Check that this process's device has enough free memory.

    Args:
        needs: names and sizes in bytes.
        fix: what the user can do, for the message.

    Raises:
        InputError: the sum exceeds the free memory.
    """
    total, free = sum(size for _, size in needs), devices.free_memory_bytes()
    if total > free:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs)
        raise InputError(
            f"not enough memory: {total / GIB:.1f} GiB are needed ({parts}), but {devices.device_name()} has "
            f"{free / GIB:.1f} GiB free;"
            f" {fix}"
        )
