"""Tensors as rows of bytes in files: where they lie, how they are cut and stacked, and how they are copied.

Nothing here loads a tensor: a conversion says which rows of which files make up a new file, and `copy` moves them,
a few MB at a time.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from conf.errors import InputError
from conf.hf_weights import ITEM_BYTES

BLOCK_BYTES = 4 << 20
# The file system cannot copy within the kernel, or (ENODEV) map a file; bytes then go through memory.
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ETXTBSY, errno.ENODEV)


@dataclass(frozen=True)
class Span:
    """Rows of `row_bytes` bytes each, end to end from `offset` in a file."""

    file: Path
    offset: int
    row_bytes: int

    def skip(self, rows: int) -> Span:
        return Span(self.file, self.offset + rows * self.row_bytes, self.row_bytes)


@dataclass(frozen=True)
class Rows:
    """`count` rows, each put together from one row of every span, side by side."""

    count: int
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        return self.count * sum(span.row_bytes for span in self.spans)

    def take(self, start: int, count: int) -> Rows:
        return Rows(count, tuple(span.skip(start) for span in self.spans))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in row-major order: its first dimension's rows, top to bottom.

    Attributes:
        name: what messages call it.
        dtype: safetensors' name of the element type, such as BF16.
        shape: at least one dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes

    def take(self, start: int, count: int) -> StoredTensor:
        """Rows `start` to `start + count`."""
        taken: list[Rows] = []
        position = 0
        for rows in self.rows:
            first = max(start, position)
            last = min(start + count, position + rows.count)
            if first < last:
                taken.append(rows.take(first - position, last - first))
            position += rows.count
        assert sum(rows.count for rows in taken) == count, f"{self.name} has no rows {start} to {start + count}"
        return StoredTensor(self.name, self.dtype, (count, *self.shape[1:]), tuple(taken))


def stack(tensors: Iterable[StoredTensor], name: str) -> StoredTensor:
    """Tensors of equal width and type on top of each other."""
    parts = list(tensors)
    rows = tuple(rows for part in parts for rows in part.rows)
    return StoredTensor(name, parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), rows)


def blocks(tensor: StoredTensor, dtype: str | None = None) -> Iterator[memoryview | bytes]:
    """The tensor's bytes from first to last, a few MB at a time, in another element type where one is named.

    A block is only good until the next one is asked for.

    Raises:
        InputError: a file ends too early.
    """
    for rows in tensor.rows:
        if not rows.bytes:
            continue
        row_bytes = rows.bytes // rows.count
        step = max(1, BLOCK_BYTES // row_bytes)
        buffer = memoryview(bytearray(min(step, rows.count) * row_bytes))
        for start in range(0, rows.count, step):
            block = rows.take(start, min(step, rows.count - start))
            view = buffer[: block.bytes]
            _read(block, view, tensor.name)
            yield view if dtype in (None, tensor.dtype) else _cast(view, tensor.dtype, str(dtype))


def copy_threads() -> int:
    """How many copies go on at once: disks and shared file systems want several, memory sets a bound."""
    return min(8, max(2, os.cpu_count() or 1))


def copy(tensor: StoredTensor, target: int, offset: int, *, dtype: str | None = None, checksum: bool = False) -> int:
    """Writes a tensor's bytes into an open file.

    Args:
        target: a file descriptor.
        dtype: the element type to write; None keeps the tensor's.
        checksum: whether to reckon the CRC-32 of what is written.

    Returns:
        the CRC-32, or 0 where none was asked for.
    """
    as_it_is = dtype in (None, tensor.dtype) and all(len(rows.spans) == 1 for rows in tensor.rows)
    if as_it_is:
        copied = _copy_in_kernel(tensor, target, offset, checksum=checksum)
        if copied is not None:
            return copied
    crc = 0
    for block in blocks(tensor, dtype):
        write(target, block, offset)
        offset += len(block)
        if checksum:
            crc = isal_zlib.crc32(block, crc)
    return crc


def write(target: int, data: memoryview | bytes, offset: int) -> None:
    """All of `data`, which the system may write in parts."""
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written


def _copy_in_kernel(tensor: StoredTensor, target: int, offset: int, *, checksum: bool) -> int | None:
    """The CRC-32, or 0; None where the file system refuses: what it copied before is written again by the caller."""
    crc = 0
    for rows in tensor.rows:
        (span,) = rows.spans
        source = os.open(span.file, os.O_RDONLY)
        try:
            for position in range(span.offset, span.offset + rows.bytes, BLOCK_BYTES):
                count = min(BLOCK_BYTES, span.offset + rows.bytes - position)
                if checksum:
                    crc = _checksum(source, position, count, crc)
                _copy_range(source, position, target, offset, count)
                offset += count
        except (EOFError, ValueError) as error:  # mmap's word for a file that is too short is a ValueError
            raise _cut_short(span.file, tensor.name) from error
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
            return None
        finally:
            os.close(source)
    return crc


def _checksum(source: int, offset: int, count: int, crc: int) -> int:
    """Goes on with a CRC-32 over a part of a file, where it lies in the system's cache: no bytes are copied."""
    before = offset % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    with (
        mmap.mmap(source, before + count, flags, mmap.PROT_READ, offset=offset - before) as mapped,
        memoryview(mapped) as view,
        view[before:] as part,
    ):
        return isal_zlib.crc32(part, crc)


def _copy_range(source: int, position: int, target: int, offset: int, count: int) -> None:
    while count:
        copied = os.copy_file_range(source, target, count, position, offset)
        if copied == 0:
            raise EOFError
        count, position, offset = count - copied, position + copied, offset + copied


def _read(rows: Rows, target: memoryview, name: str) -> None:
    """Fills `target` with rows; where they have several parts, side by side."""
    if len(rows.spans) == 1:
        _read_span(rows.spans[0], rows.bytes, target, name)
        return
    import numpy as np

    whole = np.frombuffer(target, dtype=np.uint8).reshape(rows.count, -1)
    column = 0
    for span in rows.spans:
        part = np.empty((rows.count, span.row_bytes), dtype=np.uint8)
        _read_span(span, part.nbytes, memoryview(part).cast("B"), name)
        whole[:, column : column + span.row_bytes] = part
        column += span.row_bytes


def _read_span(span: Span, count: int, target: memoryview, name: str) -> None:
    source = os.open(span.file, os.O_RDONLY)
    try:
        done = 0
        while done < count:
            read = os.preadv(source, [target[done:count]], span.offset + done)
            if read == 0:
                raise _cut_short(span.file, name)
            done += read
    finally:
        os.close(source)


def _cut_short(file: Path, name: str) -> InputError:
    return InputError(f"{file} ends within {name}: it is cut short; fetch the file again")


def _cast(data: memoryview, source: str, target: str) -> bytes:
    import torch

    types = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensor = torch.frombuffer(data, dtype=types[source]).to(types[target])
    return tensor.view(torch.uint8).numpy().tobytes()
