"""Read and write safetensors folders as streams. `prune_distill.model.hf_weights` reads their headers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convert.stored import Rows, Span, StoredTensor, copy, write
from prune_distill.model import hf_weights
from prune_distill.model.hf_weights import INDEX, ITEM_BYTES, WHOLE

SHARD_BYTES = 5 * 10**9


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of a Hugging Face folder.

    Raises:
        InputError: its files are damaged or incomplete; lists all faults.
    """
    return {name: _stored(name, entry) for name, entry in hf_weights.read_folder(folder).items()}


def _stored(name: str, entry: hf_weights.Entry) -> StoredTensor:
    count = entry.shape[0] if entry.shape else 1
    span = Span(entry.file, entry.offset, entry.bytes // count if count else 0)
    return StoredTensor(name, entry.dtype, entry.shape or (1,), (Rows(count, (span,)),))


def write_folder(tensors: Iterable[StoredTensor], folder: Path, *, dtype: str | None, threads: int) -> bool:
    """Write tensors as `model.safetensors`, or as shards of at most 5 GB with an index, and sync them to disk.

    Args:
        folder: must exist.
        dtype: element type of all tensors; None: unchanged.

    Returns:
        Whether all values are finite.
    """
    shards = _divide_into_shards(list(tensors), dtype)
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
        finite = True
        try:
            for target, copies in waiting:
                for done in copies:
                    finite &= done.result().finite
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
    return finite


def _divide_into_shards(tensors: list[StoredTensor], dtype: str | None) -> list[list[StoredTensor]]:
    """Divide tensors into shards, in order."""
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
    """Write a file's header, and return the offset of the tensors."""
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
