"""Shards: a part of a source's documents as Megatron's `.bin/.idx`, and a manifest that is written last.

The format is Megatron's (megatron/core/datasets/indexed_dataset.py, `_IndexWriter.write`), with one sequence per
document. Megatron's builder is not used: it imports torch (350 MB per process), keeps a list of all lengths, and takes
1.5 times as long. A test compares the results byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prune_distill.atomic_files import sync
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import MANIFEST

SPLITS = ("train", "validation")
# Approximate number of tokens per write: large enough for few calls, small enough for memory.
BLOCK_TOKENS = 1 << 17
INDEX_BLOCK = 1 << 16
_HEADER = b"MMIDIDX\x00\x00"
_CODES = {"uint8": 1, "int32": 4, "uint16": 8}
# Metadata of a document: its key (from the SHA-256 of its text), its cluster, and its bytes of text.
DOCUMENT = np.dtype([("key", "<u8"), ("cluster", "<i4"), ("bytes", "<u4")])
_KNOWN = struct.Struct("<QiI").pack
_LENGTH = struct.Struct("<i").pack


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of ids on disk (DType.optimal_dtype, megatron/core/datasets/indexed_dataset.py:106)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass
class Written:
    """Summary of a split for the manifest."""

    documents: int
    tokens: int
    bytes: int
    digests: dict[str, str] = field(default_factory=dict)


class SplitWriter:
    """Writes documents to `PREFIX.bin`, their metadata to `PREFIX.documents`, and at the end `PREFIX.idx`."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any], limit: int) -> None:
        """`limit`: upper limit of the ids, exclusive."""
        self.prefix, self.dtype, self.limit = prefix, dtype, limit
        self.documents = self.tokens = self.bytes = 0
        self._digest = hashlib.sha256()
        self._bin: BinaryIO = open(f"{prefix}.bin", "wb", buffering=0)  # noqa: SIM115
        self._lengths: BinaryIO = open(f"{prefix}.lengths", "wb")  # noqa: SIM115
        self._known: BinaryIO = open(f"{prefix}.documents", "wb")  # noqa: SIM115
        self._held: list[np.ndarray] = []
        self._held_tokens = 0

    def add(self, parts: list[np.ndarray], known: tuple[int, int, int]) -> None:
        """Add a document: its ids `[tokens]` in parts, and its (key, cluster, bytes)."""
        length = sum(map(len, parts))
        self._lengths.write(_LENGTH(length))
        self._known.write(_KNOWN(*known))
        self._held += parts
        self._held_tokens += length
        if self._held_tokens >= BLOCK_TOKENS:
            self._flush()
        self.documents += 1
        self.tokens += length
        self.bytes += known[2]

    def finish(self) -> Written:
        """Complete the files. A split without documents has no files, because Megatron cannot map an empty one."""
        self._flush()
        for file in (self._bin, self._lengths, self._known):
            _sync(file)
            file.close()
        lengths = Path(f"{self.prefix}.lengths")
        written = Written(self.documents, self.tokens, self.bytes)
        if self.documents:
            counts = np.memmap(lengths, dtype="<i4", mode="r")
            index = write_index(Path(f"{self.prefix}.idx"), self.dtype, counts, None)
            written.digests = {"bin": self._digest.hexdigest(), "idx": index}
        else:
            os.unlink(f"{self.prefix}.bin")
            os.unlink(f"{self.prefix}.documents")
        lengths.unlink()
        return written

    def _flush(self) -> None:
        if not self._held_tokens:
            return
        block = np.concatenate(self._held)
        if int(block.max()) >= self.limit:
            raise InputError(
                f"the tokenizer returns token id {int(block.max())}, but the model's vocab_size is {self.limit}; set"
                " model.hf_path to a folder whose tokenizer and config.json belong together"
            )
        content = memoryview(block.astype(self.dtype)).cast("B")
        self._digest.update(content)
        while content:
            content = content[self._bin.write(content) :]
        self._held, self._held_tokens = [], 0


def write_index(path: Path, dtype: np.dtype[Any], lengths: np.ndarray, pointers: np.ndarray | None) -> str:
    """Write a Megatron index with one sequence per document; return its SHA-256.

    Args:
        dtype: type of the ids in the `.bin`.
        lengths: tokens of each document, `[documents]`.
        pointers: offset in bytes of each document in the `.bin`; None: contiguous documents.
    """
    digest, count = hashlib.sha256(), len(lengths)
    with path.open("wb") as file:

        def put(content: bytes) -> None:
            digest.update(content)
            file.write(content)

        put(_HEADER + struct.pack("<QBQQ", 1, _CODES[dtype.name], count, count + 1))
        for start in range(0, count, INDEX_BLOCK):
            put(lengths[start : start + INDEX_BLOCK].astype("<i4").tobytes())
        offset = 0
        for start in range(0, count, INDEX_BLOCK):
            if pointers is not None:
                put(pointers[start : start + INDEX_BLOCK].astype("<i8").tobytes())
                continue
            sizes = lengths[start : start + INDEX_BLOCK].astype(np.int64) * dtype.itemsize
            ends = offset + np.cumsum(sizes)
            put((ends - sizes).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, count + 1, INDEX_BLOCK):
            put(np.arange(start, min(count + 1, start + INDEX_BLOCK), dtype="<i8").tobytes())
        _sync(file)
    return digest.hexdigest()


@dataclass(frozen=True)
class Index:
    """A Megatron index, mapped from its file. `read` raises ValueError if the file is not an index, or truncated.

    Attributes:
        lengths: tokens of each document, `[documents]`.
        pointers: offset in bytes of each document, `[documents]`.
    """

    dtype: np.dtype[Any]
    lengths: np.ndarray
    pointers: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Index:
        with path.open("rb") as file:
            head = file.read(34)
        if len(head) < 34 or not head.startswith(_HEADER):
            raise ValueError(f"{path} is not a Megatron index")
        _, code, count, marks = struct.unpack("<QBQQ", head[9:])
        names = {code: name for name, code in _CODES.items()}
        if code not in names or marks != count + 1 or path.stat().st_size != 34 + 12 * count + 8 * marks:
            raise ValueError(f"{path} is truncated or damaged")
        return cls(
            np.dtype(names[code]),
            np.memmap(path, dtype="<i4", mode="r", offset=34, shape=(count,)),
            np.memmap(path, dtype="<i8", mode="r", offset=34 + 4 * count, shape=(count,)),
        )


def map_tokens(prefix: Path) -> np.ndarray:
    """Return the tokens of a split in the order of its file, `[tokens]`, mapped from it."""
    return np.memmap(f"{prefix}.bin", dtype=Index.read(Path(f"{prefix}.idx")).dtype, mode="r")


def read_documents(prefix: Path) -> Iterator[np.ndarray]:
    """Yield the ids of each document of a split, `[tokens]`, mapped from the file."""
    index, tokens = Index.read(Path(f"{prefix}.idx")), map_tokens(prefix)
    for length, pointer in zip(index.lengths, index.pointers, strict=True):
        start = pointer // index.dtype.itemsize
        yield tokens[start : start + length]


def read_document_info(prefix: Path) -> np.ndarray:
    """Return the metadata of a split's documents: `[documents]` of `DOCUMENT`."""
    return np.memmap(f"{prefix}.documents", dtype=DOCUMENT, mode="r")


def count_cluster_tokens(prefix: Path, keep: np.ndarray | None = None) -> dict[str, int]:
    """Count the tokens of a split by cluster; `keep` selects documents, `[documents]` bool."""
    if not Path(f"{prefix}.idx").exists():
        return {}
    clusters, lengths = read_document_info(prefix)["cluster"], Index.read(Path(f"{prefix}.idx")).lengths
    if keep is not None:
        clusters, lengths = clusters[keep], lengths[keep]
    names, place = np.unique(clusters, return_inverse=True)
    tokens = np.bincount(place, weights=lengths, minlength=len(names))
    return {str(name): int(count) for name, count in zip(names.tolist(), tokens.tolist(), strict=True)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a complete shard."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def bad_share(manifest: dict[str, Any]) -> float:
    """Return the fraction of invalid lines of a shard."""
    lines = manifest["lines"]
    return float(lines["bad"] / max(1, lines["lines"]))


def publish(partial: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Complete a shard: write its manifest, then rename it. If another process was faster, its shard is kept."""
    write_json(partial / MANIFEST, manifest)
    sync(partial)
    try:
        os.rename(partial, folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise
        shutil.rmtree(partial)
    sync(folder.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
