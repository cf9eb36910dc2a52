"""Records of the zip files that `torch.save` writes, and their CRC-32. No torch.

torch writes the CRC-32 of every record, but `torch.load` does not verify it: a changed byte of a tensor goes unnoticed
(torch 2.13). A CRC of 0 means that the record was written without one
(`torch.serialization.set_crc32_options(False)`, `convert.checksum=false`) and cannot be verified.
"""

from __future__ import annotations

import copy
import errno
import io
import mmap
import os
import struct
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from isal import isal_zlib

from prune_distill.errors import InputError

BLOCK_BYTES = 4 << 20
# Bits of the exponent, and of the sign. A number is non-finite if all bits of its exponent are set.
EXPONENTS = {
    "F64": ("u8", 0x7FF0_0000_0000_0000, 1 << 63),
    "F32": ("u4", 0x7F80_0000, 1 << 31),
    "BF16": ("u2", 0x7F80, 1 << 15),
    "F16": ("u2", 0x7C00, 1 << 15),
}


class Window(io.RawIOBase):
    """A part of a file as a file object, for `zipfile`."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor = os.open(path, os.O_RDONLY)
        self._offset, self._length, self._position = offset, length, 0

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = start + position
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._length - self._position)
        data = os.pread(self._descriptor, rest if size < 0 else min(size, rest), self._offset + self._position)
        self._position += len(data)
        return data


class Record:
    """A range of bytes in a file, with its expected CRC-32, or 0 if none was written.

    The first thread that reads any of the bytes verifies them, once.

    Args:
        begin: offset in the file, in bytes.
        name: name for messages.
        dtype: safetensors' name of the data type, if the bytes are a tensor.
    """

    def __init__(self, file: Path, begin: int, size: int, crc: int, name: str, dtype: str | None = None) -> None:
        self.file, self.begin, self.size, self.crc, self.name, self.dtype = file, begin, size, crc, name, dtype
        self._finite = False
        self._intact: bool | None = None if crc else True
        self._lock = threading.Lock()

    def check(self) -> bool:
        """Verify the bytes. Return whether all of them are known to be finite numbers.

        Raises:
            InputError: the CRC-32 does not match.
        """
        with self._lock:
            if self._intact is None:
                self._intact = self._compute() == self.crc
        if not self._intact:
            raise InputError(
                f"{self.file} is damaged: the CRC-32 of {self.name} does not match; restore the file from a copy, or "
                "delete"
                " the folder of its stage and run again"
            )
        return self._finite

    def _compute(self) -> int:
        crc, finite = 0, True
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            for position in range(self.begin, self.begin + self.size, BLOCK_BYTES):
                with mapped(descriptor, position, min(BLOCK_BYTES, self.begin + self.size - position)) as block:
                    crc = isal_zlib.crc32(block, crc)
                    finite = finite and self.dtype is not None and is_finite(block, self.dtype)
        except EOFError:
            return ~self.crc
        finally:
            os.close(descriptor)
        self._finite = finite
        return crc


@contextmanager
def mapped(descriptor: int, offset: int, count: int) -> Iterator[memoryview]:
    """Map a part of a file into memory; read a copy if the file system does not support mmap.

    Raises:
        EOFError: the file is too short.
    """
    before = offset % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    try:
        whole = mmap.mmap(descriptor, before + count, flags, mmap.PROT_READ, offset=offset - before)
    except ValueError as error:  # mmap raises it for a file that is too short
        raise EOFError from error
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        data = os.pread(descriptor, count, offset)
        if len(data) < count:
            raise EOFError from error
        yield memoryview(data)
        return
    with whole, memoryview(whole) as view, view[before:] as part:
        yield part


def is_finite(data: memoryview | bytes, dtype: str) -> bool:
    """Return whether all numbers are finite. Two maxima without a temporary array: 25 GB/s per core, twice a CRC-32.

    As an unsigned integer, a negative non-finite number is at least `sign + exponent`. As a signed integer, a positive
    non-finite number is at least `exponent`.
    """
    if dtype not in EXPONENTS or not len(data):
        return True
    kind, exponent, sign = EXPONENTS[dtype]
    bits = np.frombuffer(data, dtype=kind)
    return int(bits.max()) < sign + exponent and int(bits.view(kind.replace("u", "i")).max()) < exponent


def record_begin(file: IO[bytes] | Window, record: zipfile.ZipInfo) -> int:
    """Return the offset of an uncompressed record's bytes in a zip file, after its local header of variable length."""
    file.seek(record.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + int(name_bytes) + int(extra_bytes)


def read_record(saved: zipfile.ZipFile, name: str) -> bytes:
    """Read the bytes of a record, and verify its CRC-32 if it has one."""
    info = copy.copy(saved.getinfo(name))
    if info.CRC == 0:
        info.CRC = None  # type: ignore[assignment]  # disables the check in `zipfile.ZipExtFile`
    return saved.read(info)


def read_records(file: Path, offset: int, length: int, name: str) -> list[Record]:
    """List the records of a saved object, which is a zip file within a file.

    Raises:
        InputError: the zip file is truncated or damaged.
    """
    try:
        with Window(file, offset, length) as window, zipfile.ZipFile(window) as saved:
            return [
                Record(file, offset + record_begin(window, info), info.file_size, info.CRC, name)
                for info in saved.infolist()
            ]
    except (zipfile.BadZipFile, OSError, struct.error, NotImplementedError, ValueError) as error:
        raise InputError(
            f"{file} is truncated or damaged: {name} cannot be read ({error!r}); restore the file from a copy"
        ) from error
