"""Tensors as rows of bytes in files: locate, slice, stack and copy them.

No tensor is loaded: a conversion describes which rows of which files make up a new file, and `copy` copies them,
a few MB at a time.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from isal import isal_zlib

from prune_distill.errors import InputError
from prune_distill.model.hf_weights import ITEM_BYTES
from prune_distill.nemo.saved_records import EXPONENTS, Record, is_finite, mapped

log = logging.getLogger("convert.stored")

BLOCK_BYTES = 4 << 20
# Errors of file systems that cannot copy within the kernel; bytes are then copied through memory.
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ETXTBSY)


@dataclass(frozen=True)
class Span:
    """Consecutive rows of `row_bytes` bytes each, from `offset` in a file.

    `record` contains them if the file has a CRC-32; it is checked when any row is read.
    """

    file: Path
    offset: int
    row_bytes: int
    record: Record | None = None

    def skip(self, rows: int) -> Span:
        return replace(self, offset=self.offset + rows * self.row_bytes)


@dataclass(frozen=True)
class Rows:
    """`count` rows, each the concatenation of one row of every span."""

    count: int
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        return self.count * sum(span.row_bytes for span in self.spans)

    def take(self, start: int, count: int) -> Rows:
        return Rows(count, tuple(span.skip(start) for span in self.spans))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in row-major order, as rows along its first dimension.

    Attributes:
        name: name in messages.
        dtype: element type by safetensors' name, such as BF16.
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
        """Return rows `start` to `start + count`."""
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
    """Concatenate tensors of equal width and type along the first dimension."""
    parts = list(tensors)
    rows = tuple(rows for part in parts for rows in part.rows)
    return StoredTensor(name, parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), rows)


def blocks(tensor: StoredTensor, dtype: str | None = None) -> Iterator[memoryview | bytes]:
    """Yield the tensor's bytes in order, a few MB at a time, cast to `dtype` if given.

    A block is only valid until the next one is requested.

    Raises:
        InputError: a file is truncated, or its bytes do not match their CRC-32.
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
    """Return the number of concurrent copies: several for disks and shared file systems, limited by memory."""
    return min(8, max(2, os.cpu_count() or 1))


@dataclass(frozen=True)
class CopyResult:
    """Result of a copy: the CRC-32 of the bytes (0 unless requested), and whether all values are finite."""

    crc: int
    finite: bool


def copy(
    tensor: StoredTensor, target: int, offset: int, *, dtype: str | None = None, checksum: bool = False
) -> CopyResult:
    """Write a tensor's bytes into an open file.

    Args:
        target: a file descriptor.
        dtype: element type to write; None: the tensor's.
        checksum: whether to compute the CRC-32 of the written bytes.

    Raises:
        InputError: a file is truncated, or its bytes do not match their CRC-32.
    """
    begin = offset
    unchanged = dtype in (None, tensor.dtype) and all(len(rows.spans) == 1 for rows in tensor.rows)
    if unchanged:
        copied = _copy_in_kernel(tensor, target, offset, checksum=checksum)
        if copied is not None:
            _start_writing_back(target, begin, tensor.bytes)
            return copied
    crc, finite = 0, True
    for block in blocks(tensor, dtype):
        write(target, block, offset)
        offset += len(block)
        finite = finite and is_finite(block, dtype or tensor.dtype)
        if checksum:
            crc = isal_zlib.crc32(block, crc)
    _start_writing_back(target, begin, offset - begin)
    return CopyResult(crc, finite)


def _start_writing_back(target: int, offset: int, count: int) -> None:
    """Start writing these bytes to disk in the background, so that the final fsync takes less time.

    By default Linux only starts when a tenth of the memory is dirty. The advice also drops pages from the cache, but
    only clean ones, and these are dirty (mm/fadvise.c).
    """
    os.posix_fadvise(target, offset, count, os.POSIX_FADV_DONTNEED)


def _count_nonfinite(tensor: StoredTensor, dtype: str | None) -> int:
    """Count the non-finite values of a tensor after a cast to `dtype`."""
    kind, exponent, _ = EXPONENTS[dtype or tensor.dtype]
    arrays = (np.frombuffer(block, dtype=kind) for block in blocks(tensor, dtype))
    return sum(int(((bits & exponent) == exponent).sum()) for bits in arrays)


def report_nonfinite(tensors: Iterable[StoredTensor], source: Path, dtype: str | None = None, *, allow: bool) -> None:
    """Report tensors with values that are non-finite, or would be in the type `dtype`; with `allow`, only log them.

    Raises:
        InputError: there are such tensors, and `allow` is False.
    """

    def describe(tensor: StoredTensor) -> str | None:
        if tensor.dtype not in EXPONENTS:
            return None
        before = _count_nonfinite(tensor, None)
        after = before if dtype in (None, tensor.dtype) else _count_nonfinite(tensor, dtype)
        parts = [f"{before} NaN or infinite"] if before else []
        parts += [f"{after - before} too large for {dtype}"] if after > before else []
        return f"{tensor.name} ({', '.join(parts)})" if parts else None

    with ThreadPoolExecutor(copy_threads()) as pool:
        found = [words for words in pool.map(describe, tensors) if words is not None]
    if not found:
        return
    shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
    message = f"{source}: {len(found)} tensors contain non-finite values: {shown}"
    if not allow:
        fix = "train or save the model again" if dtype is None else "export in bf16 or fp32 (convert.export_dtype)"
        raise InputError(f"{message}; {fix}, or set convert.allow_nonfinite=true (--allow-nonfinite)")
    log.warning("%s", message)


def write(target: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data`: a single system call may write only a part."""
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written


def _copy_in_kernel(tensor: StoredTensor, target: int, offset: int, *, checksum: bool) -> CopyResult | None:
    """Copy within the kernel. Returns None if the file system does not support it; the caller then copies all."""
    crc, finite = 0, True
    for rows in tensor.rows:
        (span,) = rows.spans
        known_finite = span.record is not None and span.record.check()
        source = os.open(span.file, os.O_RDONLY)
        try:
            for position in range(span.offset, span.offset + rows.bytes, BLOCK_BYTES):
                count = min(BLOCK_BYTES, span.offset + rows.bytes - position)
                if checksum or not known_finite:
                    with mapped(source, position, count) as block:
                        crc = isal_zlib.crc32(block, crc) if checksum else 0
                        finite = finite and (known_finite or is_finite(block, tensor.dtype))
                _copy_range(source, position, target, offset, count)
                offset += count
        except EOFError as error:
            raise _truncation_error(span.file, tensor.name) from error
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
            return None
        finally:
            os.close(source)
    return CopyResult(crc, finite)


def _copy_range(source: int, position: int, target: int, offset: int, count: int) -> None:
    while count:
        copied = os.copy_file_range(source, target, count, position, offset)
        if copied == 0:
            raise EOFError
        count, position, offset = count - copied, position + copied, offset + copied


def _read(rows: Rows, target: memoryview, name: str) -> None:
    """Fill `target` with rows; concatenate the spans of each row."""
    if len(rows.spans) == 1:
        _read_span(rows.spans[0], rows.bytes, target, name)
        return

    whole = np.frombuffer(target, dtype=np.uint8).reshape(rows.count, -1)
    column = 0
    for span in rows.spans:
        part = np.empty((rows.count, span.row_bytes), dtype=np.uint8)
        _read_span(span, part.nbytes, memoryview(part).cast("B"), name)
        whole[:, column : column + span.row_bytes] = part
        column += span.row_bytes


def _read_span(span: Span, count: int, target: memoryview, name: str) -> None:
    if span.record is not None:
        span.record.check()
    source = os.open(span.file, os.O_RDONLY)
    try:
        done = 0
        while done < count:
            read = os.preadv(source, [target[done:count]], span.offset + done)
            if read == 0:
                raise _truncation_error(span.file, name)
            done += read
    finally:
        os.close(source)


def _truncation_error(file: Path, name: str) -> InputError:
    return InputError(f"{file} is truncated: it ends within {name}; download it again")


def _cast(data: memoryview, source: str, target: str) -> bytes:
    import torch  # not at the top: most users of this module do not need it

    types = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensor = torch.frombuffer(data, dtype=types[source]).to(types[target])
    return tensor.view(torch.uint8).numpy().tobytes()
