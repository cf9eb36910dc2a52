"""Compare the headers of a Hugging Face folder's safetensors files with `config.json`.

A safetensors file has 8 bytes with the header's length, a JSON header with type, shape and offsets of every tensor, and
the tensors' bytes without gaps (huggingface/safetensors, README). Only headers are read, so a folder of any size
is checked in well under a second, before a run starts.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prune_distill.errors import InputError
from prune_distill.model.hf_config import HfConfig, traits_of
from prune_distill.schema.families import Traits

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# Weights as pickles, which are read only on request.
PICKLED = "pytorch_model*.bin"
# Raised by reading JSON of an unexpected structure.
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
# Limit for all headers of a folder together, and for an index. The 36,000 tensors of 94 layers with 128 experts
# take 5 MB.
MAX_HEADER_BYTES = 12_000_000
# More tensors than any header of that size can describe.
MAX_TENSORS = 250_000
# Bytes of an element by safetensors' type (safetensors/src/tensor.rs, Dtype).
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
# Types in which weights are trained.
TRAINABLE = ("BF16", "F16", "F32")
# Names next to weights in quantized checkpoints: compressed-tensors and FP8, GPTQ and AWQ, bitsandbytes.
_QUANTIZED = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "k_scale", "v_scale", "weight_packed"),
    *("weight_shape", "weight_zero_point", "qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map"),
    "weight_format",
)
# Maximum number of names in a message.
_SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: type, shape, and location of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int


class Described(Protocol):
    """Type and shape of a tensor in any file format."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def faults(folder: Path, config: HfConfig, *, allow_pickle: bool = False) -> list[str]:
    """Return the faults of a folder's weights, from the headers of its files.

    Args:
        config: the content of its `config.json`, with the defaults of transformers for missing keys.
        allow_pickle: whether `pytorch_model*.bin` is accepted; such files are not checked.
    """
    absent = absence(folder, allow_pickle=allow_pickle)
    if absent is not None:
        return [absent]
    if not any(folder.glob("*.safetensors")):
        return []
    tensors, found = scan_folder(folder)
    return [f"{folder}: {fault}" for fault in found or tensor_faults(tensors, config)]


def absence(folder: Path, *, allow_pickle: bool) -> str | None:
    """Return why a folder has no usable weights; None if it has some."""
    if any(folder.glob("*.safetensors")):
        return None
    pickled = any(folder.glob(PICKLED))
    if pickled and allow_pickle:
        return None
    hint = ", or set convert.allow_pickle=true (--allow-pickle)" if pickled else ""
    return f"{folder} holds no *.safetensors; save the model with safe_serialization=True{hint}"


def read_folder(folder: Path) -> dict[str, Entry]:
    """Locate the tensors of a folder.

    Raises:
        InputError: its files are damaged or incomplete; lists all faults.
    """
    tensors, found = scan_folder(folder)
    if found:
        raise InputError(f"{folder} cannot be read: " + "; ".join(found))
    return tensors


def scan_folder(folder: Path) -> tuple[dict[str, Entry], list[str]]:
    """Locate the tensors of a folder, and return the faults of its files."""
    tensors: dict[str, Entry] = {}
    weight_map, found = _weight_map(folder)
    files = sorted(set(weight_map.values())) or ([WHOLE] if (folder / WHOLE).exists() else [])
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        found.append(
            f"{_some(missing)}, which {INDEX} names, {'is' if len(missing) == 1 else 'are'} missing; fetch what is"
            " missing"
        )
    room = MAX_HEADER_BYTES
    for name in sorted(set(files) - set(missing)):
        try:
            entries, size = read_header(folder / name, room)
        except InputError as fault:
            found.append(str(fault))
            # This file is unreadable, so its entries in the index are not checked.
            weight_map = {tensor: file for tensor, file in weight_map.items() if file != name}
            continue
        room -= size
        found += [
            f"{tensor} is in two files, {tensors[tensor].file.name} and {name}; fetch the model again"
            for tensor in sorted(tensors.keys() & entries.keys())
        ]
        tensors.update(entries)
    absent = [tensor for tensor, file in weight_map.items() if file not in missing and tensor not in tensors]
    if absent:
        found.append(f"{INDEX} names {_some(absent)}, which its files do not hold; fetch the model again")
    return tensors, found


def _weight_map(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the index, file by tensor; empty if there is none or transformers would not use it."""
    index = folder / INDEX
    if (folder / WHOLE).exists():
        return {}, []
    if index.exists():
        try:
            return read_index(index), []
        except InputError as fault:
            return {}, [str(fault)]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) == 1:
        return {}, [f"{files[0]} is not called {WHOLE}, and transformers cannot find it; rename it, if it is whole"]
    if files:
        return {}, [
            f"{_some(files)} are not named by an index, and transformers cannot load them; fetch {INDEX}, or load and"
            " save the model with the program that wrote it"
        ]
    return {}, []


def read_index(index: Path) -> dict[str, str]:
    """Read an index of shards: the file of each tensor.

    Raises:
        InputError: it is not an index, or names files outside its folder.
    """
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise InputError(f"{index.name} is larger than {MAX_HEADER_BYTES} bytes, so it is not an index of shards")
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        names = set(weight_map.values())
    except InputError:
        raise
    except (*DAMAGED, OSError) as error:
        raise InputError(f"{index.name} is not an index of shards ({error}); download it again") from error
    for name in names:
        if not name or not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index.name} names {name!r}, which is outside its folder; download it again")
    return weight_map


def read_header(path: Path, limit: int = MAX_HEADER_BYTES) -> tuple[dict[str, Entry], int]:
    """Locate the tensors of one file, and return the header's size in bytes.

    Args:
        limit: maximum size of the header in bytes.

    Raises:
        InputError: the file is truncated, not a safetensors file, or its header is too large.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > size - 8:
                raise InputError(
                    f"{path.name} is not a complete safetensors file (its header does not fit in it); download it again"
                )
            if length > limit:
                raise InputError(
                    f"{path.name} has a header of {length} bytes; headers of more than {MAX_HEADER_BYTES} bytes in a"
                    " folder are rejected, because no supported model has them"
                )
            header = json.loads(file.read(length))
        start = 8 + length
        entries = {
            name: _entry(path, name, value, start, size) for name, value in header.items() if name != "__metadata__"
        }
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror})") from error
    except DAMAGED as error:
        raise InputError(f"{path.name} has a damaged header ({error}); download it again") from error
    _refuse_gaps(path, entries, start, size)
    return entries, length


def _entry(path: Path, name: str, value: Mapping[str, Any], start: int, size: int) -> Entry:
    dtype, shape = str(value["dtype"]), tuple(int(extent) for extent in value["shape"])
    first, last = (int(offset) for offset in value["data_offsets"])
    if dtype not in ITEM_BYTES:
        raise InputError(f"{path.name}: {name} has the unsupported type {dtype}; save the model in bf16")
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * ITEM_BYTES[dtype]:
        raise InputError(f"{path.name}: {name} has {last - first} bytes, not those of {dtype} {list(shape)}")
    if start + last > size:
        raise InputError(f"{path.name} is truncated: it ends within {name}; download it again")
    return Entry(dtype, shape, path, start + first, last - first)


def _refuse_gaps(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Check that tensors are contiguous from the header to the end of the file, as the library does."""
    places = sorted((entry.offset, entry.bytes, name) for name, entry in entries.items())
    for offset, length, name in places:
        if offset != start:
            raise InputError(f"{path.name} has a damaged header ({name} does not begin at the end of the previous one)")
        start += length
    if start != size:
        raise InputError(f"{path.name} has {size - start} bytes more than its header describes; download it again")


def tensor_faults(tensors: Mapping[str, Described], config: HfConfig) -> list[str]:
    """Compare tensors with those that a `config.json` describes; return one sentence per kind of difference."""
    count = tensor_count(config)
    if count > MAX_TENSORS:
        return [f"config.json describes {count} tensors, more than any model has; download it again"]
    quantized = _quantized(tensors)
    if quantized:
        return [f"the weights are quantized ({quantized}); set model.hf_path to the model in bf16"]
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in tensors]
    foreign = sorted(name for name in tensors if name not in expected and not _may_be_extra(name, config))
    misshapen = [
        f"{name} {list(tensors[name].shape)} (config.json: {list(shape)})"
        for name, shape in expected.items()
        if name in tensors and (tensors[name].shape or (1,)) != shape
    ]
    types = sorted({tensors[name].dtype for name in expected if name in tensors})
    untrainable = [name for name in types if name not in TRAINABLE]
    model_type, found = config["model_type"], []
    if missing:
        found.append(f"it lacks {_some(missing)}, which config.json describes; download the model again")
    if foreign:
        found.append(
            f"it holds {_some(foreign)}, not a tensor of model_type {model_type}; set model.hf_path to a plain causal"
            " language model, with adapters merged and without other towers"
        )
    if misshapen:
        found.append(f"shapes differ from config.json: {_some(misshapen)}; download config.json and weights together")
    if untrainable:
        found.append(f"weights of type {', '.join(untrainable)} cannot be trained; save the model in bf16")
    elif len(types) > 1:
        found.append(f"weights of several types ({', '.join(types)}); save the model in one")
    return found


def _quantized(tensors: Mapping[str, Described]) -> str:
    """Return signs that a model is quantized, regardless of its `config.json`; empty if there are none."""
    scales = [name for name in tensors if name.rpartition(".")[2] in _QUANTIZED]
    types = sorted({tensor.dtype for tensor in tensors.values() if tensor.dtype.startswith("F8_")})
    signs = [f"tensors of type {', '.join(types)}"] if types else []
    return ", ".join([*signs, *([_some(scales)] if scales else [])])


def _may_be_extra(name: str, config: HfConfig) -> bool:
    """Return whether a tensor is optional: the output layer of a tied model, or buffers of older Llamas."""
    tied_output = name == "lm_head.weight" and bool(config.get("tie_word_embeddings", False))
    return tied_output or name.endswith("rotary_emb.inv_freq")


def _some(names: Collection[str]) -> str:
    """Format the first few names, and the number of others."""
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


# Expected tensors of a family's layer, by the names of transformers (models/*/modeling_*.py) after `model.layers.N.`.
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_NORMS, *(f"{name}.weight" for name in _QKV), "self_attn.o_proj.weight")
_QK_NORM = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_MLP = ("mlp.up_proj.weight", "mlp.down_proj.weight")
_EXPERT = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def _layer(traits: Traits) -> tuple[str, ...]:
    """Return the names of a layer's tensors, without experts."""
    parts = (
        (True, _ATTENTION),
        (traits.qk_norm, _QK_NORM),
        (traits.qkv_bias, tuple(f"{name}.bias" for name in _QKV)),
        (traits.norm_bias, tuple(name.replace("weight", "bias") for name in _NORMS)),
        (traits.experts, ("mlp.gate.weight",)),
        (not traits.experts and traits.gated_mlp, ("mlp.gate_proj.weight",)),
        (not traits.experts, _MLP),
    )
    return tuple(name for present, names in parts if present for name in names)


def _outside(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors outside the layers."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += ["model.norm.bias"] if traits_of(config).norm_bias else []
    return names if config.get("tie_word_embeddings", False) else [*names, "lm_head.weight"]


def _experts(config: Mapping[str, Any]) -> int:
    return int(config["num_experts"]) if traits_of(config).experts else 0


def tensor_count(config: Mapping[str, Any]) -> int:
    """Count the tensors of a model with this `config.json`."""
    in_layer = len(_layer(traits_of(config))) + _experts(config) * len(_EXPERT)
    return int(config["num_hidden_layers"]) * in_layer + len(_outside(config))


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _outside(config)
    layer_names = _layer(traits_of(config))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from (prefix + name for name in layer_names)
        yield from (f"{prefix}mlp.experts.{expert}.{name}" for expert in range(_experts(config)) for name in _EXPERT)


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model with this `config.json`."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    experts = _experts(config)
    channels = config["moe_intermediate_size"] if experts else config["intermediate_size"]
    by_module: dict[str, tuple[int, ...]] = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "q_norm": (size,),
        "k_norm": (size,),
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "gate": (experts, hidden),
        "gate_proj": (channels, hidden),
        "up_proj": (channels, hidden),
        "down_proj": (hidden, channels),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _names(config):
        *_, module, kind = name.split(".")
        shape = by_module.get(module, (hidden,))  # the other norms
        shapes[name] = shape if kind == "weight" else shape[:1]
    return shapes
