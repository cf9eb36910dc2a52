"""Read records from JSON lines (plain, .gz, .zst) and parquet files, in constant memory.

Invalid records are counted and the first one is reported; lines = documents + empty + bad + left_out always holds. A
truncated file is rejected as a whole, because its end would be lost unnoticed.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from backports import zstd

from prune_distill.config.data_files import Packing, packing
from prune_distill.errors import InputError

# A longer line means a broken file. Without a limit it would be read into memory.
MAX_LINE_BYTES = 64 << 20
BUFFER_BYTES = 1 << 20


@dataclass
class Lines:
    """Counts of lines. `first_bad` is the file, line and reason of the first invalid line.

    Attributes:
        empty: blank lines, and documents that are null or without text.
        left_out: documents that the source's `sample` excludes.
        too_long: documents longer than `data.max_document_tokens`.
        other_fields: conversations by the names of fields in their messages that only their chat template may know.
        dropped: documents that are not written: too long, or none of their learned tokens is left.
    """

    lines: int = 0
    documents: int = 0
    empty: int = 0
    bad: int = 0
    left_out: int = 0
    too_long: int = 0
    dropped: int = 0
    other_fields: dict[str, int] = field(default_factory=dict)
    first_bad: str | None = None

    def add(self, other: Lines) -> None:
        for name in ("lines", "documents", "empty", "bad", "left_out", "too_long", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.count_fields(other.other_fields)
        self.first_bad = self.first_bad or other.first_bad

    def count_fields(self, names: Mapping[str, int]) -> None:
        for name, count in names.items():
            self.other_fields[name] = self.other_fields.get(name, 0) + count

    def count_invalid(self, where: str, reason: str) -> None:
        self.bad += 1
        self.first_bad = self.first_bad or f"{where}: {reason}"


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes `[start, end)` of plain JSON lines, row groups of parquet, or (0, 0) the whole file.

    A line belongs to the piece that contains its first byte.
    """

    path: str
    start: int = 0
    end: int = 0


@dataclass
class Source:
    """Raw records of pieces: lines as bytes (None: too long), or mappings of `columns` for parquet."""

    pieces: list[Piece]
    columns: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]:
        for piece in self.pieces:
            self._piece, self._kind = piece, packing(piece.path)
            try:
                yield from self._rows(piece) if self._kind is Packing.parquet else self._lines(piece, self._kind)
            except _damage_errors(self._kind) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # an error of the disk or the network, not of the file
                raise InputError(
                    f"{piece.path} is truncated or corrupt ({error}); download it again, or remove it from the data"
                    " section"
                ) from error

    def where(self) -> str:
        """Return the position of the last record. Line numbers are unknown in the later pieces of a text file."""
        if self._kind is Packing.parquet:
            place = f"row {self._number}" + (f" from row group {self._piece.start} on" if self._piece.start else "")
        else:
            place = f"byte {self._byte}" if self._piece.start else f"line {self._number}"
        return f"{self._piece.path}, {place}"

    def _lines(self, piece: Piece, kind: Packing | None) -> Iterator[bytes | None]:
        with _open(piece, kind) as file:
            position = piece.start
            if position:
                # The line that contains the previous byte belongs to the previous piece.
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


def _open(piece: Piece, kind: Packing | None) -> Any:
    # A compressed file of 0 bytes (Spark writes such parts) is empty.
    if kind is Packing.plain or os.path.getsize(piece.path) == 0:
        return open(piece.path, "rb", buffering=BUFFER_BYTES)
    if kind is Packing.gz:
        return gzip.open(piece.path, "rb")
    # It reads all frames, including skippable ones, and raises on a truncated one. Its default limit for windows is
    # 128 MiB; `zstd --long=31` makes 2 GiB, the limit of the format in practice (ZSTD_WINDOWLOG_MAX).
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
    return io.BufferedReader(zstd.ZstdFile(piece.path, options=options), BUFFER_BYTES)


def _damage_errors(kind: Packing | None) -> tuple[type[Exception], ...]:
    """Return the exceptions that a damaged file raises."""
    errors = (OSError, EOFError, zlib.error, ValueError)
    if kind is not Packing.zst:
        return errors
    return (*errors, zstd.ZstdError)


def _skip_line(file: Any) -> int:
    """Skip to the end of a line; return the number of bytes."""
    skipped = 0
    while rest := file.readline(MAX_LINE_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def parse(value: Any) -> dict[str, Any]:
    """Parse the fields of a record. Raises: ValueError, with the reason."""
    if isinstance(value, dict):
        return value
    if value is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = _loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _loads(value: bytes) -> Any:
    try:
        return orjson.loads(value)
    except ValueError:
        # orjson is stricter (NaN, halves of surrogate pairs, other encodings), so Python's parser decides.
        return json.loads(value)


def split_file(path: str, piece_bytes: int) -> list[tuple[Piece, int]]:
    """Divide a file into pieces; return each with its bytes on disk.

    Raises:
        InputError: a damaged parquet file.
    """
    size, kind = os.path.getsize(path), packing(path)
    if kind is Packing.plain and size > piece_bytes:
        # Equal pieces; otherwise the last one could be small.
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
