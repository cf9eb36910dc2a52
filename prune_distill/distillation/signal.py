"""The teacher's signal on disk: of every token its k most probable successors, and what is left for all the others.

A folder holds shards of `shard_sequences` training sequences each and, once all are there, `signal.json`, which says
what they were made from. A shard is written under a hidden name and renamed when it is whole:

    a frame a sequence | a table of the frames (TABLE) | a trailer (TRAILER) with the table's checksum

A frame is zstd over byte planes: log-probabilities as fp16, descending, each as the difference of its bits from the
last one's. It is checked whenever it is read, and so are the tokens that it belongs to: no whole shard is ever read.

fp16 keeps 11 bits: the log-probabilities of a token of the demo's teacher are off by 4.5e-4 nats in the mean (by
their probability), with bf16 by 3.6e-3. With k = 64 they take 140 bytes a token of 388; 190 with Zipf-like logits over
151,936 entries, at 190,000 tokens a second and core written and 300,000 read (on cores shared with other work).
No torch, no NeMo.
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

INDEX = "signal.json"
FORMAT = 1
# Of each frame: its sequence's place among all, where it begins and its bytes, its CRC-32, and that of the tokens
# (int32) whose signal it is.
TABLE = np.dtype([("sequence", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("tokens_crc", "<u4")])
# Number of rows of the table, its CRC-32, MAGIC.
TRAILER = struct.Struct("<II4s")
MAGIC = b"SIG1"
# Level 1 compresses as well within 1 % and is no faster.
CODEC = pyarrow.Codec("zstd", compression_level=3)
# Sequences by whose tokens two packings of the data are compared before anything is read.
SAMPLED_SEQUENCES = 16


class Signal(NamedTuple):
    """The teacher's signal on one sequence of s tokens.

    Attributes:
        ids: `[s, k]` int32, the most probable next tokens, the most probable first.
        logprobs: `[s, k]` float16, their log-probabilities at the signal's temperature (nats).
        tail: `[s]` float32, the log of the probability of all other tokens together; -inf where nothing is left.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True)
class Description:
    """What a signal was made for. Two of the same description are interchangeable.

    Attributes:
        top_k: the tokens kept of each distribution.
        temperature: what the teacher's logits were divided by.
        vocab_size: of the teacher.
        seq_length: tokens of a sequence.
        sequences: how many there are: those that training reads, in its order.
        packing: digest of a sample of the sequences; see `packing_digest`.
    """

    top_k: int
    temperature: float
    vocab_size: int
    seq_length: int
    sequences: int
    packing: str


def packing_digest(tokens_of: Callable[[int], np.ndarray], sequences: int) -> str:
    """Identity of the sequences that training reads, by some of them, the first and the last among them.

    Args:
        tokens_of: the tokens of the i-th sequence, `[s]`.
    """
    picked = sorted({(sequences - 1) * i // (SAMPLED_SEQUENCES - 1) for i in range(SAMPLED_SEQUENCES)})
    return f"{_crc(np.array([tokens_crc(tokens_of(i)) for i in picked], '<u4')):08x}"


def tokens_crc(tokens: np.ndarray) -> int:
    """CRC-32 of a sequence's tokens, `[s]`, as int32."""
    return _crc(np.ascontiguousarray(tokens, dtype="<i4"))


def encode(signal: Signal) -> bytes:
    """A frame: the signal without loss, but for what fp16 has already taken from it."""
    bits = np.ascontiguousarray(-signal.logprobs).view(np.uint16)
    steps = np.diff(bits, axis=1, prepend=np.uint16(0))
    parts = (_planes(signal.ids.astype("<i4").T), _planes(steps.T), signal.tail.astype("<f4").tobytes())
    return bytes(CODEC.compress(b"".join(parts), asbytes=True))


def decode(frame: bytes, seq_length: int, top_k: int) -> Signal:
    """The signal of a frame that was checked."""
    count = seq_length * top_k
    plain = CODEC.decompress(frame, count * 6 + seq_length * 4, asbytes=True)
    ids = _unplaned(plain[: 4 * count], "<i4").reshape(top_k, seq_length).T
    steps = _unplaned(plain[4 * count : 6 * count], "<u2").reshape(top_k, seq_length).T
    # The sum wraps around as the difference did.
    logprobs = -np.cumsum(steps, axis=1, dtype=np.uint16).view(np.float16)
    return Signal(np.ascontiguousarray(ids), logprobs, np.frombuffer(plain[6 * count :], "<f4").copy())


def prediction_loss(signal: Signal, labels: np.ndarray, vocab_size: int) -> float:
    """Mean loss (nats per token) of a signal that predicts `labels` `[s]`, its tail shared out evenly."""
    chances = np.exp(signal.logprobs.astype(np.float64))
    other_chance = np.exp(signal.tail.astype(np.float64)) / (vocab_size - signal.ids.shape[1])
    hit = signal.ids == labels[:, None]
    chance = np.where(hit.any(1), (chances * hit).sum(1), other_chance)
    return float(-np.log(np.maximum(chance, np.finfo(np.float64).tiny)).mean())


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.bin"


class ShardWriter:
    """Writes one shard: `add` its sequences in order, then `close`. Without `close` nothing is left that counts.

    Args:
        number: the shard's, from 0.
        first: its first sequence's place among all.
    """

    def __init__(self, folder: Path, number: int, first: int) -> None:
        self.first = first
        self.target = folder / shard_name(number)
        self.partial = folder / f".partial.{self.target.name}"
        self.file = self.partial.open("wb")
        self.rows: list[tuple[int, ...]] = []

    def add(self, frame: bytes, tokens_crc: int) -> None:
        """Adds the frame of the next sequence."""
        sequence = self.first + len(self.rows)
        self.rows.append((sequence, self.file.tell(), len(frame), isal_zlib.crc32(frame), tokens_crc))
        self.file.write(frame)

    def close(self) -> None:
        """Makes the shard count, once the disk has all of it."""
        table = np.array(self.rows, TABLE).tobytes()
        self.file.write(table + TRAILER.pack(len(self.rows), isal_zlib.crc32(table), MAGIC))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.target)
        sync(self.target.parent)


def read_table(shard: Path) -> np.ndarray:
    """A shard's table, checked, one row of TABLE a sequence.

    Raises:
        InputError: the shard is missing, cut or damaged.
    """
    try:
        with shard.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TRAILER.size))
            count, crc, magic = TRAILER.unpack(file.read(TRAILER.size))
            if magic != MAGIC:
                raise ValueError("its end is not a shard's")
            file.seek(size - TRAILER.size - count * TABLE.itemsize)
            content = file.read(count * TABLE.itemsize)
    except (OSError, ValueError, struct.error) as error:
        raise damaged(shard, str(error)) from error
    if isal_zlib.crc32(content) != crc:
        raise damaged(shard, "its table has another checksum")
    return np.frombuffer(content, TABLE)


def damaged(shard: Path, why: str) -> InputError:
    return InputError(
        f"{shard} is cut or damaged ({why}); remove it and the manifest.json beside it: the same command makes it again"
    )


def whole_shards(folder: Path, sizes: Sequence[int]) -> list[int]:
    """The shards that are there and hold the sequences that they should; all others are removed, and what is partial.

    Args:
        sizes: sequences of each shard.
    """
    whole, first = [], 0
    for number, size in enumerate(sizes):
        if _holds(folder / shard_name(number), range(first, first + size)):
            whole.append(number)
        first += size
    kept = set(map(shard_name, whole))
    for file in [*folder.glob("shard-*.bin"), *folder.glob(".partial.shard-*.bin")]:
        if file.name not in kept:
            file.unlink()
    return whole


def _holds(shard: Path, sequences: range) -> bool:
    """Whether a shard holds these sequences, none of them damaged."""
    try:
        table = read_table(shard)
    except InputError:
        return False
    return table["sequence"].tolist() == list(sequences) and all(_read_frame(shard, row) is not None for row in table)


def _read_frame(shard: Path, row: np.void) -> bytes | None:
    """The frame of a row of a shard's table; None where it is damaged."""
    with shard.open("rb") as file:
        file.seek(int(row["offset"]))
        frame = file.read(int(row["size"]))
    return frame if isal_zlib.crc32(frame) == row["crc"] else None


def shard_sizes(sequences: int, shard_sequences: int) -> list[int]:
    """Sequences of each shard: the last one may be short."""
    full, rest = divmod(sequences, shard_sequences)
    return [shard_sequences] * full + ([rest] if rest else [])


def write_index(folder: Path, description: Description, shard_sequences: int) -> None:
    """Declares a signal whole: all its shards are there."""
    write_json(folder / INDEX, {"format": FORMAT, "shard_sequences": shard_sequences, **vars(description)})


class SignalReader:
    """A stored signal, read a sequence at a time in any order; a copy in another process works as well.

    Args:
        folder: what `write_index` completed.

    Raises:
        InputError: there is no signal in the folder, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: tuple[Path, np.ndarray] | None = None
        try:
            content: dict[str, Any] = json.loads((folder / INDEX).read_text())
            version, self.shard_sequences = content.pop("format"), content.pop("shard_sequences")
            self.description = Description(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no teacher signal ({error!r}); run the stage teacher_signal") from error
        if version != FORMAT:
            raise InputError(f"{folder} holds a signal of format {version}; this version reads {FORMAT}: make it again")

    def require(self, **wanted: Any) -> None:
        """Compares values of the description. Raises: InputError, naming all in which it is not what is wanted."""
        own = vars(self.description)
        differing = [f"{name} {own[name]}, not {value}" for name, value in wanted.items() if own[name] != value]
        if differing:
            raise InputError(
                f"the teacher signal in {self.folder} was made for other data or settings: {'; '.join(differing)};"
                " run the stage teacher_signal for this run, or set distill.signal=live"
            )

    def read(self, index: int, tokens: np.ndarray) -> Signal:
        """The signal of the `index`-th sequence.

        Args:
            tokens: `[s]`, the sequence's.

        Raises:
            InputError: the shard is missing or damaged, or the signal is that of other tokens.
        """
        number, place = divmod(index, self.shard_sequences)
        shard = self.folder / shard_name(number)
        table = self._table_of(shard)
        if place >= len(table) or table[place]["sequence"] != index:
            raise damaged(shard, f"sequence {index} is not where it should be")
        row = table[place]
        frame = _read_frame(shard, row)
        if frame is None:
            raise damaged(shard, f"sequence {index} has another checksum")
        if tokens_crc(tokens) != row["tokens_crc"]:
            raise InputError(
                f"the teacher signal in {self.folder} belongs to other data: the tokens of sequence {index} differ;"
                " run the stage teacher_signal for this run, or set distill.signal=live"
            )
        return decode(frame, self.description.seq_length, self.description.top_k)

    def _table_of(self, shard: Path) -> np.ndarray:
        """A shard's table, kept until another shard is read: neighbouring sequences are read together."""
        if self._last is None or self._last[0] != shard:
            self._last = (shard, read_table(shard))
        return self._last[1]


def _crc(array: np.ndarray) -> int:
    return int(isal_zlib.crc32(array.tobytes()))


def _planes(values: np.ndarray) -> bytes:
    """All first bytes, then all second ones and so on: like goes to like, which compresses."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()


def _unplaned(planes: bytes, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(size, -1).T).reshape(-1).view(dtype)
