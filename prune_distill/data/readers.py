"""Files of documents as records: JSON lines (plain, .gz, .zst) and parquet, read in a memory that does not grow.

What cannot be used is counted and the first of it named; lines = documents + empty + bad + left_out always holds. A
file that ends too early is refused as a whole: its end is lost, and nobody would know.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from backports import zstd

from prune_distill.config.data_files import Packing, packing
from prune_distill.errors import InputError

# A longer line is no document but a broken file; without a limit it would have to be held in memory to be read.
MAX_LINE_BYTES = 64 << 20
BUFFER_BYTES = 1 << 20


@dataclass
class Lines:
    """What a reader saw. `first_bad` names the first broken line: file, line, reason.

    Attributes:
        empty: blank lines and documents without text, null ones among them.
        left_out: by the source's `sample`.
    """

    lines: int = 0
    documents: int = 0
    empty: int = 0
    bad: int = 0
    left_out: int = 0
    first_bad: str | None = None

    def add(self, other: Lines) -> None:
        for name in ("lines", "documents", "empty", "bad", "left_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_bad = self.first_bad or other.first_bad

    def note_bad(self, where: str, reason: str) -> None:
        self.bad += 1
        self.first_bad = self.first_bad or f"{where}: {reason}"


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes `[start, end)` of plain JSON lines, row groups of parquet, or (0, 0) the whole file.

    A line belongs to the piece in which its first byte is.
    """

    path: str
    start: int = 0
    end: int = 0


@dataclass
class Source:
    """The raw records of pieces: lines (bytes; None: too long to be one) or, of parquet, mappings of `columns`."""

    pieces: list[Piece]
    columns: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]:
        for piece in self.pieces:
            self._piece, self._kind = piece, packing(piece.path)
            try:
                yield from self._rows(piece) if self._kind is Packing.parquet else self._lines(piece, self._kind)
            except _signs_of_damage(self._kind) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's or the network's trouble, not the file's
                raise InputError(
                    f"{piece.path} cannot be read to its end ({error}); it is truncated or corrupt: get it again, or"
                    " take it out of the data section"
                ) from error

    def where(self) -> str:
        """Where the record is that was yielded last. Within a piece of a text file the line's number is not known."""
        if self._kind is Packing.parquet:
            place = f"row {self._number}" + (f" from row group {self._piece.start} on" if self._piece.start else "")
        else:
            place = f"byte {self._byte}" if self._piece.start else f"line {self._number}"
        return f"{self._piece.path}, {place}"

    def _lines(self, piece: Piece, kind: Packing | None) -> Iterator[bytes | None]:
        with _opened(piece, kind) as file:
            position = piece.start
            if position:
                # The line that the byte before belongs to is the piece's before.
                file.seek(position - 1)
                position += _skip_line(file) - 1
            end = piece.end or math.inf
            self._number = 0
            while position < end and (line := file.readline(MAX_LINE_BYTES)):
                self._number, self._byte = self._number + 1, position
                position += len(line)
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    position += _skip_line(file)
                    yield None
                else:
                    yield line

    def _rows(self, piece: Piece) -> Iterator[dict[str, Any]]:
        from prune_distill.data import parquet  # its memory, only where there are parquet files

        self._number = 0
        for row in parquet.read_rows(piece.path, range(piece.start, piece.end), self.columns):
            self._number += 1
            yield row


def _opened(piece: Piece, kind: Packing | None) -> Any:
    # Of 0 bytes (Spark writes such parts), a compressed file is as empty as a plain one.
    if kind is Packing.plain or os.path.getsize(piece.path) == 0:
        return open(piece.path, "rb", buffering=BUFFER_BYTES)
    if kind is Packing.gz:
        return gzip.open(piece.path, "rb")
    # Reads all frames, also skippable ones, and raises where one is cut short. By default it refuses windows above
    # 128 MiB; 2 GiB is what `zstd --long=31` makes, and the format's limit in practice (ZSTD_WINDOWLOG_MAX).
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
    return io.BufferedReader(zstd.ZstdFile(piece.path, options=options), BUFFER_BYTES)


def _signs_of_damage(kind: Packing | None) -> tuple[type[Exception], ...]:
    """The exceptions that a damaged file raises."""
    signs = (OSError, EOFError, zlib.error, ValueError)
    if kind is not Packing.zst:
        return signs
    return (*signs, zstd.ZstdError)


def _skip_line(file: Any) -> int:
    """Reads to the end of a line; how many bytes that were."""
    skipped = 0
    while rest := file.readline(MAX_LINE_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def parse(value: Any) -> dict[str, Any]:
    """A record's fields. Raises: ValueError, with the reason why there are none."""
    if isinstance(value, dict):
        return value
    if value is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = _loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    return record


def _loads(value: bytes) -> Any:
    try:
        return orjson.loads(value)
    except ValueError:
        # It is stricter (NaN, halves of surrogate pairs, other encodings): Python's has the last word.
        return json.loads(value)


def pieces_of(path: str, piece_bytes: int) -> list[tuple[Piece, int]]:
    """A file cut where it can be cut, each piece with its bytes on disk.

    Raises:
        InputError: a parquet file that cannot be read.
    """
    size, kind = os.path.getsize(path), packing(path)
    if kind is Packing.plain and size > piece_bytes:
        # Equal pieces: the last one would be small otherwise.
        count = -(-size // piece_bytes)
        cuts = [size * number // count for number in range(count + 1)]
        return [(Piece(path, start, end), end - start) for start, end in itertools.pairwise(cuts)]
    if kind is Packing.parquet:
        return _row_groups(path, size, piece_bytes)
    return [(Piece(path), size)]


def _row_groups(path: str, size: int, piece_bytes: int) -> list[tuple[Piece, int]]:
    metadata = parquet_metadata(path)
    pieces, start, held = [], 0, 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= piece_bytes or group == metadata.num_row_groups - 1:
            pieces.append((Piece(path, start, group + 1), held))
            start, held = group + 1, 0
    return pieces


def parquet_metadata(path: str) -> Any:
    """Read the metadata of a parquet file, which includes its schema. Raises: InputError."""
    from prune_distill.data import parquet  # its memory, only where there are parquet files

    return parquet.read_metadata(path)
