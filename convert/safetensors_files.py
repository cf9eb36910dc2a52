"""Safetensors folders, read and written as streams.

The format: 8 bytes with the header's length, a JSON header with each tensor's type, shape and place, then the tensors'
bytes without gaps (huggingface/safetensors, README). The library itself gives tensors, not places, so the header is
read here.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conf.errors import InputError
from convert.stored import ITEM_BYTES, Rows, Span, StoredTensor, copy, write

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# What JSON that is not as it should be makes its reader raise.
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
# The library's own bound (safetensors/src/tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
SHARD_BYTES = 5 * 10**9


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a Hugging Face folder lies.

    Raises:
        InputError: all that is wrong with its files: shards that the index names are missing, a file is cut short, two
            hold the same tensor, a header is not what it should be.
    """
    tensors: dict[str, StoredTensor] = {}
    faults: list[str] = []
    for path in _shards(folder, faults):
        try:
            found = read_file(path)
        except InputError as fault:
            faults.append(str(fault))
            continue
        faults += [
            f"{name} is in two files, {tensors[name].rows[0].spans[0].file.name} and {path.name}"
            for name in sorted(tensors.keys() & found.keys())
        ]
        tensors.update(found)
    if faults:
        raise InputError(f"{folder} cannot be read: " + "; ".join(faults))
    return tensors


def _shards(folder: Path, faults: list[str]) -> list[Path]:
    """The files that hold a model's weights: as transformers, the one file, or those that the index names; or all."""
    index = folder / INDEX
    if (folder / WHOLE).exists() or not index.exists():
        return [folder / WHOLE] if (folder / WHOLE).exists() else sorted(folder.glob("*.safetensors"))
    try:
        named = shards_in(index)
    except InputError as fault:
        faults.append(str(fault))
        return []
    missing = [name for name in named if not (folder / name).exists()]
    faults += [f"{name}, which {INDEX} names, is missing; fetch it" for name in missing]
    return [folder / name for name in named if name not in missing]


def shards_in(index: Path) -> list[str]:
    """The files that an index of shards names.

    Raises:
        InputError: it is none, or names what is not in its folder.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (*DAMAGED, OSError) as error:
        raise InputError(f"{index.name} is no index of shards ({error}); fetch it again") from error
    for name in names:
        if not name or not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index.name} names {name!r}, which can be no file of its folder; fetch it again")
    return sorted(names)


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of one file lies.

    Raises:
        InputError: it is cut short, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise InputError(
                    f"{path.name} is no whole safetensors file (its header does not fit in it); fetch it again"
                )
            header = json.loads(file.read(length))
        tensors = {
            name: _entry(path, name, value, 8 + length, size)
            for name, value in header.items()
            if name != "__metadata__"
        }
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror})") from error
    except DAMAGED as error:
        raise InputError(f"{path.name} has a damaged header ({error}); fetch it again") from error
    _refuse_gaps(path, tensors, 8 + length, size)
    return tensors


def _entry(path: Path, name: str, value: Mapping[str, object], start: int, size: int) -> StoredTensor:
    dtype, shape = str(value["dtype"]), tuple(int(extent) for extent in value["shape"])  # type: ignore[attr-defined]
    first, last = (int(offset) for offset in value["data_offsets"])  # type: ignore[attr-defined]
    if dtype not in ITEM_BYTES:
        raise InputError(f"{path.name}: {name} is of type {dtype}, which is not known here")
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * ITEM_BYTES[dtype]:
        raise InputError(f"{path.name}: {name} has {last - first} bytes, not those of {dtype} {list(shape)}")
    if start + last > size:
        raise InputError(f"{path.name} ends within {name}: it is cut short; fetch it again")
    count = shape[0] if shape else 1
    row_bytes = (last - first) // count if count else 0
    return StoredTensor(name, dtype, shape or (1,), (Rows(count, (Span(path, start + first, row_bytes),)),))


def _refuse_gaps(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """Tensors lie end to end from the header to the end of the file, as the library asks too."""
    places = sorted((tensor.rows[0].spans[0].offset, tensor.bytes, name) for name, tensor in tensors.items())
    for offset, length, name in places:
        if offset != start:
            raise InputError(f"{path.name} has a damaged header ({name} does not begin where the one before ends)")
        start += length
    if start != size:
        raise InputError(f"{path.name} holds {size - start} bytes more than its header tells of; fetch it again")


def write_folder(tensors: Iterable[StoredTensor], folder: Path, *, dtype: str | None, threads: int) -> None:
    """Writes tensors as `model.safetensors`, or as shards of at most 5 GB with their index, and syncs them to disk.

    Args:
        folder: must exist.
        dtype: the element type of all; None keeps each one's.
    """
    shards = _fill(list(tensors), dtype)
    names = [
        WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for name, shard in zip(names, shards, strict=True):
            target = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            position = _write_header(target, shard, dtype)
            copies = []
            for tensor in shard:
                copies.append(pool.submit(copy, tensor, target, position, dtype=dtype))
                position += _bytes(tensor, dtype)
            waiting.append((target, copies))
        try:
            for target, copies in waiting:
                for done in copies:
                    done.result()
                os.fsync(target)
        finally:
            pool.shutdown(cancel_futures=True)
            for target, _ in waiting:
                os.close(target)
    if len(shards) > 1:
        total = sum(_bytes(tensor, dtype) for shard in shards for tensor in shard)
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _fill(tensors: list[StoredTensor], dtype: str | None) -> list[list[StoredTensor]]:
    """Tensors in their order, a new shard where the next one would not fit."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _bytes(tensor, dtype)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _write_header(target: int, shard: list[StoredTensor], dtype: str | None) -> int:
    """Writes a file's header, and returns where the tensors begin."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in shard:
        size = _bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": dtype or tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [position, position + size],
        }
        position += size
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    write(target, struct.pack("<Q", len(data)) + data, 0)
    return 8 + len(data)


def _bytes(tensor: StoredTensor, dtype: str | None) -> int:
    return tensor.bytes // tensor.item_bytes * ITEM_BYTES[dtype or tensor.dtype]
