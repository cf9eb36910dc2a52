"""Read and write the format of `torch.save` without torch: a zip file whose record `data.pkl` describes an object and
whose record `data/0` holds the values of a tensor (torch/serialization.py).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prune_distill.errors import InputError

# By safetensors' type names: torch's name, and the storage class of a saved tensor.
TORCH_TYPES = {
    "F64": ("float64", "DoubleStorage"),
    "F32": ("float32", "FloatStorage"),
    "BF16": ("bfloat16", "BFloat16Storage"),
    "F16": ("float16", "HalfStorage"),
}
SAFETENSORS_NAMES = {name: ours for ours, (name, _) in TORCH_TYPES.items()}


class SavedTensor(pickle.Unpickler):
    """Reads `data.pkl` of a saved tensor as the arguments of the function that rebuilds it."""

    def persistent_load(self, identity: Any) -> Any:
        return identity

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if module == "torch":  # the storage's type
            return name
        raise InputError(f"a saved tensor names {module}.{name}, which tensors do not need")


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


class Global:
    """Pickled as a reference to a class or function that need not be imported."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Required by pickle, which only accepts callables here."""


class Rebuilt:
    """Pickled as `function(*arguments)`, with `state` set on the result."""

    def __init__(self, function: Global, arguments: tuple[Any, ...], state: Any = None) -> None:
        self._reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self._reduced


class _Storage(tuple[Any, ...]):
    """Pickled like torch's storages: as a persistent id, which locates the bytes."""


class _Pickler(pickle._Pickler):
    """The pickler in Python: `save` of the C pickler cannot be overridden."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> Any:
        if isinstance(obj, Global):
            return self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())  # type: ignore[attr-defined]
        return super().save(obj, save_persistent_id)  # type: ignore[misc]

    def persistent_id(self, obj: Any) -> Any:
        return tuple(obj) if isinstance(obj, _Storage) else None


def pickled(value: Any) -> bytes:
    data = io.BytesIO()
    _Pickler(data, protocol=2).dump(value)
    return data.getvalue()


@dataclass
class SavedZip:
    """The records that `torch.save` writes; the last one, `data/0`, without its bytes (torch/serialization.py).

    Attributes:
        data_bytes: size of `data/0`; None if there is none.
    """

    described: bytes
    data_bytes: int | None = None

    @cached_property
    def _records(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"archive/data.pkl", self.described),
            (b"archive/.format_version", b"1"),
            (b"archive/.storage_alignment", b"64"),
            (b"archive/byteorder", b"little"),
            (b"archive/version", b"3\n"),
        ]

    def head(self, crc: int) -> bytes:
        """Return the bytes before `data/0`, whose CRC-32 is `crc`."""
        head = bytearray()
        for name, data in self._records:
            head += _local_header(name, len(data), zlib.crc32(data), len(head)) + data
        if self.data_bytes is not None:
            head += _local_header(b"archive/data/0", self.data_bytes, crc, len(head))
        return bytes(head)

    def tail(self, crc: int) -> bytes:
        """Return the bytes after `data/0`: the central directory."""
        directory = bytearray()
        offset = 0
        for name, data in self._records:
            directory += _central_header(name, len(data), zlib.crc32(data), offset)
            offset += len(_local_header(name, len(data), 0, offset)) + len(data)
        count = len(self._records)
        if self.data_bytes is not None:
            directory += _central_header(b"archive/data/0", self.data_bytes, crc, offset)
            offset += len(_local_header(b"archive/data/0", self.data_bytes, 0, offset)) + self.data_bytes
            count += 1
        return bytes(directory) + _end_record(count, len(directory), offset)

    @property
    def length(self) -> int:
        return len(self.head(0)) + (self.data_bytes or 0) + len(self.tail(0))


# The zip format: APPNOTE.TXT 4.3.7 (local header), 4.3.12 (central), 4.3.14-16 (end), 4.5.3 (64-bit sizes).
ZIP32_LIMIT = 0xFFFFFFFF
VERSION_32, VERSION_64 = 20, 45


def _local_header(name: bytes, size: int, crc: int, offset: int) -> bytes:
    """Return a record's header, padded so that its content begins at a multiple of 64 bytes, as in torch."""
    wide = size >= ZIP32_LIMIT
    extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
    padding = -(offset + 30 + len(name) + len(extra) + 4) % 64
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    shown = ZIP32_LIMIT if wide else size
    fixed = (0x04034B50, VERSION_64 if wide else VERSION_32, 0, 0, 0, 0, crc, shown, shown, len(name), len(extra))
    return struct.pack("<IHHHHHIIIHH", *fixed) + name + extra


def _central_header(name: bytes, size: int, crc: int, offset: int) -> bytes:
    wide = size >= ZIP32_LIMIT  # the large record is the last, so offsets never reach the limit
    version, shown = (VERSION_64, ZIP32_LIMIT) if wide else (VERSION_32, size)
    extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
    names = (len(name), len(extra), 0, 0, 0, 0, offset)
    return (
        struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, version, version, 0, 0, 0, 0, crc, shown, shown, *names)
        + name
        + extra
    )


def _end_record(count: int, size: int, offset: int) -> bytes:
    wide = b""
    if offset >= ZIP32_LIMIT:
        wide = struct.pack(
            "<IQHHIIQQQQ", 0x06064B50, 44, VERSION_64, VERSION_64, 0, 0, count, count, size, offset
        ) + struct.pack("<IIQI", 0x07064B50, 0, offset + size, 1)
    shown = min(offset, ZIP32_LIMIT)
    return wide + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, size, shown, 0)


def describe_tensor(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return `data.pkl` of a contiguous tensor."""
    strides = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    storage = _Storage(("storage", Global("torch", TORCH_TYPES[dtype][1]), "0", "cpu", math.prod(shape)))
    arguments: tuple[Any, ...] = (storage, 0, shape, strides, False, OrderedDict())
    return pickled(Rebuilt(Global("torch._utils", "_rebuild_tensor_v2"), arguments))
