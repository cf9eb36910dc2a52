"""Cached logits of a teacher on disk: for each token, the k most probable next tokens and the mass of all others.

A folder contains shards of `shard_sequences` training sequences each. `cached_logits.json`, which is written after the
last shard, describes what they were made from. A shard is written under a hidden name and renamed when it is complete:

    one frame per sequence | a table of the frames (TABLE) | a trailer (TRAILER) with the table's checksum

A frame is zstd-compressed byte planes. Log-probabilities are fp16 in descending order; each is stored as the difference
of its bits from those of the previous one. The CRC-32 of a frame and of its tokens is checked on every read, so a shard
is never read as a whole.

fp16 has 11 bits of precision: the mean error of the demo teacher's log-probabilities, weighted by probability, is
4.5e-4 nats per token, and 3.6e-3 with bf16. With k = 64, a token takes 140 bytes instead of 388, and 190 bytes with
Zipf-like logits over 151,936 entries. One core writes 190,000 tokens per second and reads 300,000 (measured on cores
that were shared with other work). No torch, no NeMo.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from isal import isal_zlib

from prune_distill.atomic_files import sync
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import write_json

INDEX = "cached_logits.json"
FORMAT = 1
# For each frame: the number of its sequence, its offset and size in bytes, its CRC-32, and the CRC-32 of its tokens
# (int32).
TABLE = np.dtype([("sequence", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("tokens_crc", "<u4")])
# Number of rows of the table, its CRC-32, and MAGIC.
TRAILER = struct.Struct("<II4s")
MAGIC = b"SIG1"
# Level 1 is not faster, and its output is within 1 % of the size.
CODEC = pyarrow.Codec("zstd", compression_level=3)
# Number of sequences whose tokens identify a packing of the data.
SAMPLED_SEQUENCES = 16


class CachedLogits(NamedTuple):
    """The cached logits of one sequence of s tokens.

    Attributes:
        ids: `[s, k]` int32, the most probable next tokens in descending order of probability.
        logprobs: `[s, k]` float16, their log-probabilities (nats) at the temperature of the cache.
        tail: `[s]` float32, the log of the total probability of all other tokens; -inf if it is zero.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True)
class Description:
    """What a cache was made for. Caches with equal descriptions are interchangeable.

    Attributes:
        top_k: number of tokens per distribution.
        temperature: divisor of the teacher's logits.
        vocab_size: number of ids that the distributions are about, the first of the teacher's vocabulary.
        seq_length: tokens per sequence.
        sequences: number of sequences, in the order in which training reads them.
        packing: digest of a sample of the sequences; see `packing_digest`.
    """

    top_k: int
    temperature: float
    vocab_size: int
    seq_length: int
    sequences: int
    packing: str


def packing_digest(tokens_of: Callable[[int], np.ndarray], sequences: int) -> str:
    """Return a digest that identifies the training sequences by a sample of them, including the first and the last.

    Args:
        tokens_of: returns the tokens of a sequence, `[s]`, by its number.
    """
    picked = sorted({(sequences - 1) * i // (SAMPLED_SEQUENCES - 1) for i in range(SAMPLED_SEQUENCES)})
    return f"{_crc(np.array([tokens_crc(tokens_of(i)) for i in picked], '<u4')):08x}"


def tokens_crc(tokens: np.ndarray) -> int:
    """Return the CRC-32 of a sequence's tokens, `[s]`, as int32."""
    return _crc(np.ascontiguousarray(tokens, dtype="<i4"))


def encode(cached_logits: CachedLogits) -> bytes:
    """Encode the cached logits of a sequence as a frame. Lossless, given fp16 log-probabilities."""
    bits = np.ascontiguousarray(-cached_logits.logprobs).view(np.uint16)
    steps = np.diff(bits, axis=1, prepend=np.uint16(0))
    parts = (
        _to_planes(cached_logits.ids.astype("<i4").T),
        _to_planes(steps.T),
        cached_logits.tail.astype("<f4").tobytes(),
    )
    return bytes(CODEC.compress(b"".join(parts), asbytes=True))


def decode(frame: bytes, seq_length: int, top_k: int) -> CachedLogits:
    """Decode a frame whose checksum was verified."""
    count = seq_length * top_k
    plain = CODEC.decompress(frame, count * 6 + seq_length * 4, asbytes=True)
    ids = _from_planes(plain[: 4 * count], "<i4").reshape(top_k, seq_length).T
    steps = _from_planes(plain[4 * count : 6 * count], "<u2").reshape(top_k, seq_length).T
    # The sum wraps around in the same way as the difference.
    logprobs = -np.cumsum(steps, axis=1, dtype=np.uint16).view(np.float16)
    return CachedLogits(np.ascontiguousarray(ids), logprobs, np.frombuffer(plain[6 * count :], "<f4").copy())


def prediction_loss(cached_logits: CachedLogits, labels: np.ndarray, vocab_size: int) -> float:
    """Return the mean loss (nats per token) of predicting `labels` `[s]`; the tail is distributed evenly."""
    chances = np.exp(cached_logits.logprobs.astype(np.float64))
    other_chance = np.exp(cached_logits.tail.astype(np.float64)) / (vocab_size - cached_logits.ids.shape[1])
    hit = cached_logits.ids == labels[:, None]
    chance = np.where(hit.any(1), (chances * hit).sum(1), other_chance)
    return float(-np.log(np.maximum(chance, np.finfo(np.float64).tiny)).mean())


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.bin"


class ShardWriter:
    """Writes one shard: call `add` for its sequences in order, then `close`. Before `close`, the shard does not exist.

    Args:
        number: number of the shard, from 0.
        first: number of its first sequence.
    """

    def __init__(self, folder: Path, number: int, first: int) -> None:
        self.first = first
        self.target = folder / shard_name(number)
        self.partial = folder / f".partial.{self.target.name}"
        self.file = self.partial.open("wb")
        self.rows: list[tuple[int, ...]] = []

    def add(self, frame: bytes, tokens_crc: int) -> None:
        """Add the frame of the next sequence."""
        sequence = self.first + len(self.rows)
        self.rows.append((sequence, self.file.tell(), len(frame), isal_zlib.crc32(frame), tokens_crc))
        self.file.write(frame)

    def close(self) -> None:
        """Complete the shard: sync it to disk and rename it."""
        table = np.array(self.rows, TABLE).tobytes()
        self.file.write(table + TRAILER.pack(len(self.rows), isal_zlib.crc32(table), MAGIC))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.target)
        sync(self.target.parent)


def read_table(shard: Path) -> np.ndarray:
    """Read and verify the table of a shard: one row of TABLE per sequence.

    Raises:
        InputError: the shard is missing, truncated or damaged.
    """
    try:
        with shard.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TRAILER.size))
            count, crc, magic = TRAILER.unpack(file.read(TRAILER.size))
            if magic != MAGIC:
                raise ValueError("it does not end like a shard")
            file.seek(size - TRAILER.size - count * TABLE.itemsize)
            content = file.read(count * TABLE.itemsize)
    except (OSError, ValueError, struct.error) as error:
        raise damaged(shard, str(error)) from error
    if isal_zlib.crc32(content) != crc:
        raise damaged(shard, "the checksum of its table does not match")
    return np.frombuffer(content, TABLE)


def damaged(shard: Path, why: str) -> InputError:
    return InputError(
        f"{shard} is truncated or damaged ({why}); remove it and the manifest.json next to it, and run the command "
        "again"
    )


def whole_shards(folder: Path, sizes: Sequence[int]) -> list[int]:
    """Return the numbers of the complete shards. Remove all other shards and partial files.

    Args:
        sizes: number of sequences of each shard.
    """
    whole, first = [], 0
    for number, size in enumerate(sizes):
        if _is_complete(folder / shard_name(number), range(first, first + size)):
            whole.append(number)
        first += size
    kept = set(map(shard_name, whole))
    for file in [*folder.glob("shard-*.bin"), *folder.glob(".partial.shard-*.bin")]:
        if file.name not in kept:
            file.unlink()
    return whole


def _is_complete(shard: Path, sequences: range) -> bool:
    """Return whether a shard contains these sequences, all of them undamaged."""
    try:
        table = read_table(shard)
    except InputError:
        return False
    return table["sequence"].tolist() == list(sequences) and all(_read_frame(shard, row) is not None for row in table)


def _read_frame(shard: Path, row: np.void) -> bytes | None:
    """Read the frame of a row of a shard's table; None if it is damaged."""
    with shard.open("rb") as file:
        file.seek(int(row["offset"]))
        frame = file.read(int(row["size"]))
    return frame if isal_zlib.crc32(frame) == row["crc"] else None


def shard_sizes(sequences: int, shard_sequences: int) -> list[int]:
    """Return the number of sequences of each shard. The last shard may be smaller."""
    full, rest = divmod(sequences, shard_sequences)
    return [shard_sequences] * full + ([rest] if rest else [])


def write_index(folder: Path, description: Description, shard_sequences: int) -> None:
    """Complete a cache: all its shards exist."""
    write_json(folder / INDEX, {"format": FORMAT, "shard_sequences": shard_sequences, **vars(description)})


class CachedLogitsReader:
    """Reads cached logits one sequence at a time, in any order. Picklable, for data loader workers.

    Args:
        folder: a folder that `write_index` has completed.

    Raises:
        InputError: the folder contains no cached logits, or cached logits of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: tuple[Path, np.ndarray] | None = None
        try:
            content: dict[str, Any] = json.loads((folder / INDEX).read_text())
            version, self.shard_sequences = content.pop("format"), content.pop("shard_sequences")
            self.description = Description(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no cached logits ({error!r}); run the stage cache_logits") from error
        if version != FORMAT:
            raise InputError(
                f"{folder} holds cached logits of format {version}, and this version reads format {FORMAT}; remove "
                "the folder and run again"
            )

    def require(self, **wanted: Any) -> None:
        """Require values of the description. Raises: InputError, which names all values that differ."""
        own = vars(self.description)
        differing = [f"{name} {own[name]}, not {value}" for name, value in wanted.items() if own[name] != value]
        if differing:
            raise InputError(
                f"the cached logits in {self.folder} were made for other data or settings: {'; '.join(differing)};"
                " run the stage cache_logits for this run, or set distill.teacher_logits=live"
            )

    def read(self, index: int, tokens: np.ndarray) -> CachedLogits:
        """Read the cached logits of a sequence.

        Args:
            index: number of the sequence.
            tokens: `[s]`, tokens of the sequence.

        Raises:
            InputError: the shard is missing or damaged, or belongs to other tokens.
        """
        number, place = divmod(index, self.shard_sequences)
        shard = self.folder / shard_name(number)
        table = self._table(shard)
        if place >= len(table) or table[place]["sequence"] != index:
            raise damaged(shard, f"sequence {index} is not at its position")
        row = table[place]
        frame = _read_frame(shard, row)
        if frame is None:
            raise damaged(shard, f"the checksum of sequence {index} does not match")
        if tokens_crc(tokens) != row["tokens_crc"]:
            raise InputError(
                f"the cached logits in {self.folder} belong to other data: the tokens of sequence {index} differ;"
                " run the stage cache_logits for this run, or set distill.teacher_logits=live"
            )
        return decode(frame, self.description.seq_length, self.description.top_k)

    def _table(self, shard: Path) -> np.ndarray:
        """Return the table of a shard. The last table is cached, because neighboring sequences are read together."""
        if self._last is None or self._last[0] != shard:
            self._last = (shard, read_table(shard))
        return self._last[1]


def _crc(array: np.ndarray) -> int:
    return int(isal_zlib.crc32(array.tobytes()))


def _to_planes(values: np.ndarray) -> bytes:
    """Group the first bytes of all values, then the second bytes, and so on, which improves compression."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()


def _from_planes(planes: bytes, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(size, -1).T).reshape(-1).view(dtype)
