"""Records of the zip files that `torch.save` writes, and their CRC-32. No torch.

torch writes the CRC-32 of every record, and `torch.load` does not check it: a changed byte of a tensor is loaded as if
nothing had happened (torch 2.13). A CRC of 0 belongs to a record that was written without one
(`torch.serialization.set_crc32_options(False)`, `convert.checksum=false`), whose bytes cannot be checked.
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
# The bits of an exponent, and of the sign: a number is not finite where all bits of its exponent are set.
EXPONENTS = {
    "F64": ("u8", 0x7FF0_0000_0000_0000, 1 << 63),
    "F32": ("u4", 0x7F80_0000, 1 << 31),
    "BF16": ("u2", 0x7F80, 1 << 15),
    "F16": ("u2", 0x7C00, 1 << 15),
}


class Window(io.RawIOBase):
    """A part of a file as a file of its own, for `zipfile`."""

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
        left = max(0, self._length - self._position)
        data = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._position)
        self._position += len(data)
        return data


class Record:
    """Bytes of a file and the CRC-32 that they must have: 0 where none was written.

    They are checked once, by the first thread that reads any of them.

    Args:
        begin: where in the file they begin, in bytes.
        name: what messages call them.
        dtype: safetensors' name of the type of the numbers that they are, if they are the numbers of a tensor.
    """

    def __init__(self, file: Path, begin: int, size: int, crc: int, name: str, dtype: str | None = None) -> None:
        self.file, self.begin, self.size, self.crc, self.name, self.dtype = file, begin, size, crc, name, dtype
        self._finite = False
        self._whole: bool | None = None if crc else True
        self._lock = threading.Lock()

    def check(self) -> bool:
        """Returns whether all of them are known to be finite numbers.

        Raises:
            InputError: the bytes are not those that were written.
        """
        with self._lock:
            if self._whole is None:
                self._whole = self._compute() == self.crc
        if not self._whole:
            raise InputError(
                f"{self.file} is damaged: the bytes of {self.name} do not have the CRC-32 that was written with them;"
                " restore the file from a copy, or delete its stage's folder and run again"
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
    """A part of a file where it lies in the system's cache, or, if the file system cannot map files, a copy of it.

    Raises:
        EOFError: the file ends before.
    """
    before = offset % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    try:
        whole = mmap.mmap(descriptor, before + count, flags, mmap.PROT_READ, offset=offset - before)
    except ValueError as error:  # what mmap raises for a file that is too short
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
    """Whether all numbers are finite. Two maxima and no temporary array: 25 GB/s a core, twice as fast as a CRC-32.

    As an unsigned integer a number is at least `sign + exponent` where it is negative and not finite; as a signed one
    it is at least `exponent` where it is positive and not finite.
    """
    if dtype not in EXPONENTS or not len(data):
        return True
    kind, exponent, sign = EXPONENTS[dtype]
    bits = np.frombuffer(data, dtype=kind)
    return int(bits.max()) < sign + exponent and int(bits.view(kind.replace("u", "i")).max()) < exponent


def record_begin(file: IO[bytes] | Window, record: zipfile.ZipInfo) -> int:
    """Where in a zip file the bytes of an uncompressed record begin: after a local header with parts of any length."""
    file.seek(record.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + int(name_bytes) + int(extra_bytes)


def read_record(saved: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a record, checked against its CRC-32 if it was written with one."""
    info = copy.copy(saved.getinfo(name))
    if info.CRC == 0:
        info.CRC = None  # type: ignore[assignment]  # what `zipfile.ZipExtFile` does not check
    return saved.read(info)


def read_records(file: Path, offset: int, length: int, name: str) -> list[Record]:
    """The records of one saved object, which lies in a part of a file.

    Raises:
        InputError: there is no whole zip file there.
    """
    try:
        with Window(file, offset, length) as window, zipfile.ZipFile(window) as saved:
            return [
                Record(file, offset + record_begin(window, info), info.file_size, info.CRC, name)
                for info in saved.infolist()
            ]
    except (zipfile.BadZipFile, OSError, struct.error, NotImplementedError, ValueError) as error:
        raise InputError(f"{file} does not hold all of {name} ({error!r}): it is cut short or damaged") from error
