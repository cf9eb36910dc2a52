"""Megatron's `torch_dist` checkpoints, read and written as streams.

A folder holds `.metadata` (a pickle: every tensor's shape, type and chunks, and where each chunk lies),
`__RANK_N.distcp` (chunks end to end, each as `torch.save` writes it: a zip file whose record `data/0` holds the
numbers), `common.pt` and `metadata.json`. Written by megatron/core/dist_checkpointing/strategies/torch.py and
filesystem_async.py upon torch/distributed/checkpoint/filesystem.py. Pickles are read here with nothing but the classes
that such a description needs, so a stranger's checkpoint runs no code.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
import struct
import uuid
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from conf.errors import InputError
from convert.stored import ITEM_BYTES, Rows, Span, StoredTensor, copy, write

# By safetensors' names: torch's own, and that of the storage class in a saved tensor.
TORCH_TYPES = {
    "F64": ("float64", "DoubleStorage"),
    "F32": ("float32", "FloatStorage"),
    "BF16": ("bfloat16", "BFloat16Storage"),
    "F16": ("float16", "HalfStorage"),
}
SAFETENSORS_NAMES = {name: ours for ours, (name, _) in TORCH_TYPES.items()}
MCORE_METADATA = ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")
# Files that chunks are spread over: as many as Megatron's writer makes, more for large checkpoints.
FILES = 2
FILE_BYTES = 16 << 30


@dataclass(frozen=True)
class Chunk:
    """A part of the tensor `key`: where it begins in it, its extents, and where it lies, as `torch.save` wrote it."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    offset: int
    length: int


@dataclass
class ChunkedTensor:
    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


class TorchDistReader:
    """The tensors of a checkpoint, under whatever layout it was saved.

    Attributes:
        tensors: by Megatron's key.
        objects: where the pickled objects lie.
        other_names: classes and functions that `.metadata` names and that were not needed to read it.

    Raises:
        InputError: the folder holds no checkpoint, or its description is damaged.
    """

    def __init__(self, weights: Path) -> None:
        self.folder = weights
        self.tensors: dict[str, ChunkedTensor] = {}
        self.objects: list[Chunk] = []
        path = weights / ".metadata"
        if not path.exists():
            raise InputError(f"{weights} is no torch_dist checkpoint (it has no .metadata)")
        try:
            metadata, self.other_names = _load_inert(path)
            self._take_over(metadata)
        except Exception as error:  # whatever a damaged pickle makes its classes raise
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error})") from error

    def _take_over(self, metadata: Any) -> None:
        sizes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
        for key, value in metadata.state_dict_metadata.items():
            if not hasattr(value, "chunks"):
                continue
            dtype = str(value.properties.dtype)
            self.tensors[key] = ChunkedTensor(key, SAFETENSORS_NAMES.get(dtype, dtype), tuple(value.size))
            sizes |= {(key, tuple(chunk.offsets)): tuple(chunk.sizes) for chunk in value.chunks}
        for index, place in metadata.storage_data.items():
            name = place.relative_path
            if Path(name).name != name:
                raise InputError(f"it names {name}, which can be no file of its folder")
            offsets = tuple(index.offset or ())
            extents = sizes[index.fqn, offsets] if index.fqn in self.tensors else ()
            chunk = Chunk(index.fqn, offsets, extents, self.folder / name, place.offset, place.length)
            chunks = self.tensors[index.fqn].chunks if index.fqn in self.tensors else self.objects
            chunks.append(chunk)

    def tensor(self, key: str, *index: int) -> StoredTensor:
        """A tensor, or its part at `index` of the first dimensions, put together from its chunks.

        Raises:
            InputError: there is no such tensor, a chunk is missing or cut short, or its type is not known.
        """
        if key not in self.tensors:
            raise InputError(f"{self.folder} lacks {key}")
        whole = self.tensors[key]
        if whole.dtype not in ITEM_BYTES:
            raise InputError(f"{self.folder}: {key} is of type {whole.dtype}, which is not known here")
        shape = whole.shape[len(index) :]
        name = f"{key}{list(index)}" if index else key
        if not shape:
            raise InputError(f"{self.folder}: {key} is {list(whole.shape)}, which has no part {list(index)}")
        parts = [part for chunk in whole.chunks if (part := self._part(whole, chunk, index)) is not None]
        cuts = sorted({0, shape[0], *(edge for part in parts for edge in (part.row, part.row + part.rows))})
        rows = [self._band(name, whole, parts, start, end - start, shape) for start, end in itertools.pairwise(cuts)]
        return StoredTensor(name, whole.dtype, shape, tuple(rows))

    def _part(self, whole: ChunkedTensor, chunk: Chunk, index: tuple[int, ...]) -> _Part | None:
        """What a chunk holds of the part at `index`."""
        depth, item = len(index), ITEM_BYTES[whole.dtype]
        skipped = 0
        for wanted, offset, size in zip(index, chunk.offsets, chunk.sizes, strict=False):
            if not offset <= wanted < offset + size:
                return None
            skipped = skipped * size + wanted - offset
        sizes, offsets, shape = chunk.sizes[depth:], chunk.offsets[depth:], whole.shape[depth:]
        if sizes[2:] != shape[2:]:  # only whole rows, or whole elements of a row, are rows of bytes
            raise InputError(f"{self.folder}: {whole.key} is cut along a dimension behind its rows; save it whole")
        width = math.prod(sizes[1:]) * item
        column = offsets[1] * math.prod(shape[2:]) * item if len(shape) > 1 else 0
        return _Part(chunk, skipped * sizes[0] * width, offsets[0], sizes[0], column, width)

    def _band(
        self, name: str, whole: ChunkedTensor, parts: list[_Part], start: int, count: int, shape: tuple[int, ...]
    ) -> Rows:
        """Rows that the same chunks make up, side by side."""
        across = [part for part in parts if part.row <= start and start + count <= part.row + part.rows]
        spans: list[Span] = []
        reached = 0
        for part in sorted(across, key=lambda part: part.column):
            if part.column != reached:
                break
            spans.append(self._data(whole, part, start))
            reached += part.row_bytes
        if reached != math.prod(shape[1:]) * ITEM_BYTES[whole.dtype]:
            raise InputError(f"{self.folder} lacks a part of {name} (rows {start} to {start + count - 1})")
        return Rows(count, tuple(spans))

    def _data(self, whole: ChunkedTensor, part: _Part, row: int) -> Span:
        chunk = part.chunk
        offset = _data_offset(chunk, math.prod(chunk.sizes) * ITEM_BYTES[whole.dtype], whole)
        return Span(chunk.file, offset + part.skipped + (row - part.row) * part.row_bytes, part.row_bytes)


@dataclass(frozen=True)
class _Part:
    """What a chunk holds of a matrix: rows from `row` on, from the byte `column` of each; `skipped` bytes before."""

    chunk: Chunk
    skipped: int
    row: int
    rows: int
    column: int
    row_bytes: int


class _Window(io.RawIOBase):
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


def _data_offset(chunk: Chunk, size: int, whole: ChunkedTensor) -> int:
    """Where in its file the numbers of a saved tensor begin.

    Raises:
        InputError: it is cut short, is of another type than described, or its numbers do not lie row by row.
    """
    try:
        with _Window(chunk.file, chunk.offset, chunk.length) as window, zipfile.ZipFile(window) as saved:
            record = next(info for info in saved.infolist() if info.filename.endswith("/data/0"))
            described = saved.read(record.filename.removesuffix("/data/0") + "/data.pkl")
            window.seek(record.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", window.read(4))
        (_, storage, *_), first, shape, strides, *_ = _SavedTensor(io.BytesIO(described)).load()
        in_rows = (record.file_size, record.compress_type, first) == (size, zipfile.ZIP_STORED, 0)
        in_rows = in_rows and _is_contiguous(shape, strides)
    except Exception as error:  # whatever a damaged zip or pickle makes its reader raise
        raise InputError(
            f"{chunk.file} does not hold all of {whole.key} ({error!r}): it is cut short or damaged"
        ) from error
    if not in_rows or storage != TORCH_TYPES[whole.dtype][1]:
        raise InputError(f"{chunk.file}: a part of {whole.key} does not lie in rows of its own; save the model again")
    return chunk.offset + record.header_offset + 30 + int(name_bytes) + int(extra_bytes)


class _SavedTensor(pickle.Unpickler):
    """Reads `data.pkl` of a saved tensor as the arguments that would rebuild it."""

    def persistent_load(self, identity: Any) -> Any:
        return identity

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if module == "torch":  # the storage's type
            return name
        raise InputError(f"a saved tensor names {module}.{name}, which none needs")


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


# The classes of torch's description of a checkpoint and the order of their fields
# (torch/distributed/checkpoint/metadata.py and filesystem.py).
DESCRIPTION: dict[str, dict[str, tuple[str, ...]]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata": (),
        "ChunkStorageMetadata": ("offsets", "sizes"),
        "Metadata": ("state_dict_metadata",),
        "MetadataIndex": ("fqn", "offset"),
        "StorageMeta": ("checkpoint_id", "save_id"),
        "TensorProperties": ("dtype",),
        "TensorStorageMetadata": ("properties", "size", "chunks"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": ("relative_path", "offset", "length")},
}
# Where torch pickles a type by its name, the name is what is wanted.
TYPE_NAMES = {*(name for name, _ in TORCH_TYPES.values()), "int64", "int32", "uint8", "bool"}


class _Record:
    """Stands for an object of torch's description: its constructor's arguments or its state, under their names.

    torch itself is not imported, which takes longer than reading a description and more memory than all the rest.
    """

    FIELDS: tuple[str, ...] = ()

    def __init__(self, *values: Any) -> None:
        self.__dict__ |= dict(zip(self.FIELDS, values, strict=False))

    def __setstate__(self, state: Any) -> None:
        # That of TensorProperties is a tuple (metadata.py, TensorProperties.__getstate__).
        self.__init__(*state) if isinstance(state, tuple) else self.__dict__.update(state)  # type: ignore[misc]


_RECORDS = {
    (module, name): type(name, (_Record,), {"FIELDS": fields, **dict.fromkeys(fields)})
    for module, classes in DESCRIPTION.items()
    for name, fields in classes.items()
}
_RECORDS[MCORE_METADATA] = _RECORDS["torch.distributed.checkpoint.metadata", "Metadata"]


class _Inert:
    """Stands for an object that is not needed here, such as Megatron's record of its save plans; takes anything."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Makes objects of torch's own description of a checkpoint, and inert ones of everything else.

    Attributes:
        inert: the names of everything else.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.inert: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in TYPE_NAMES:
            return name
        self.inert.add(f"{module}.{name}")
        return _Inert


def _load_inert(path: Path) -> tuple[Any, set[str]]:
    """What a pickle makes of a checkpoint's description, and the names of all else in it."""
    with path.open("rb") as file:
        unpickler = _InertUnpickler(file)
        return unpickler.load(), unpickler.inert


def names_in_pickle(path: Path) -> set[str]:
    """The classes and functions that unpickling a file would import and call. None of them is.

    Raises:
        InputError: it is no pickle.
    """
    try:
        return _load_inert(path)[1]
    except Exception as error:  # whatever a damaged pickle makes its classes raise
        raise InputError(f"{path} is no whole pickle ({type(error).__name__}: {error})") from error


class _Global:
    """Pickled as a reference to a class or function that need not be imported."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Pickle asks that what rebuilds an object can be called."""


class _Rebuilt:
    """Pickled as `function(*arguments)`, with `state` set on the result."""

    def __init__(self, function: _Global, arguments: tuple[Any, ...], state: Any = None) -> None:
        self._reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self._reduced


class _Storage(tuple[Any, ...]):
    """Pickled as torch pickles a tensor's storage: by what tells where its bytes are."""


class _Pickler(pickle._Pickler):
    """The pickler in Python: to the one in C nothing can be added where it saves."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> Any:
        if isinstance(obj, _Global):
            return self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())  # type: ignore[attr-defined]
        return super().save(obj, save_persistent_id)  # type: ignore[misc]

    def persistent_id(self, obj: Any) -> Any:
        return tuple(obj) if isinstance(obj, _Storage) else None


def _pickle(value: Any) -> bytes:
    data = io.BytesIO()
    _Pickler(data, protocol=2).dump(value)
    return data.getvalue()


@dataclass
class _Zip:
    """The records that `torch.save` writes, the last one, `data/0`, without its bytes (torch/serialization.py).

    Attributes:
        data_bytes: of `data/0`; None where there is none.
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
        """All that goes before the numbers, whose CRC-32 is `crc`."""
        head = bytearray()
        for name, data in self._records:
            head += _local_header(name, len(data), zlib.crc32(data), len(head)) + data
        if self.data_bytes is not None:
            head += _local_header(b"archive/data/0", self.data_bytes, crc, len(head))
        return bytes(head)

    def tail(self, crc: int) -> bytes:
        """The central directory, which goes after the numbers."""
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
    """A record's header, padded so that its bytes begin at a multiple of 64, as torch's writer does."""
    wide = size >= ZIP32_LIMIT
    extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
    padding = -(offset + 30 + len(name) + len(extra) + 4) % 64
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    shown = ZIP32_LIMIT if wide else size
    fixed = (0x04034B50, VERSION_64 if wide else VERSION_32, 0, 0, 0, 0, crc, shown, shown, len(name), len(extra))
    return struct.pack("<IHHHHHIIIHH", *fixed) + name + extra


def _central_header(name: bytes, size: int, crc: int, offset: int) -> bytes:
    wide = size >= ZIP32_LIMIT  # the numbers come last, so a record never begins beyond the limit
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


def _describe(dtype: str, shape: tuple[int, ...]) -> bytes:
    """`data.pkl` of a contiguous tensor."""
    strides = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    storage = _Storage(("storage", _Global("torch", TORCH_TYPES[dtype][1]), "0", "cpu", math.prod(shape)))
    arguments: tuple[Any, ...] = (storage, 0, shape, strides, False, OrderedDict())
    return _pickle(_Rebuilt(_Global("torch._utils", "_rebuild_tensor_v2"), arguments))


@dataclass(frozen=True)
class _Piece:
    """A chunk, or (`tensor` None) a pickled object, that is to be written."""

    key: str
    zip: _Zip
    tensor: StoredTensor | None = None
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class TorchDistWriter:
    """Collects what a checkpoint holds, and writes it all at once."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(self, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], chunk: StoredTensor) -> None:
        """A chunk that begins at `offsets` of the tensor `key`; leading dimensions that it lacks are 1 there."""
        sizes = (1,) * (len(shape) - len(chunk.shape)) + chunk.shape
        self._shapes[key] = (chunk.dtype, shape)
        saved = _Zip(_describe(chunk.dtype, sizes), chunk.bytes)
        self._pieces.append(_Piece(key, saved, chunk, offsets, sizes))

    def add_object(self, key: str, value: Any) -> None:
        """A small object of plain Python types."""
        self._pieces.append(_Piece(key, _Zip(_pickle(value))))

    def write(self, weights: Path, common: dict[str, Any], *, threads: int, checksum: bool = True) -> None:
        """Writes the folder `weights` and syncs it to disk; `.metadata`, without which it is none, comes last.

        Args:
            common: what every rank shares, of plain Python types.
            checksum: whether to write the chunks' CRC-32, which nothing of torch checks but zip tools do; without it
                the bytes need not pass through memory.
        """
        weights.mkdir(parents=True)
        total = sum(piece.zip.length for piece in self._pieces)
        names = [f"__0_{number}.distcp" for number in range(max(FILES, -(-total // FILE_BYTES)))]
        files = [os.open(weights / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644) for name in names]
        places: list[tuple[str, int, int]] = []
        filled = [0] * len(files)
        pool = ThreadPoolExecutor(threads)
        try:
            waiting: list[Future[None]] = []
            for piece in self._pieces:
                number = filled.index(min(filled))
                waiting.append(pool.submit(_write_piece, piece, files[number], filled[number], checksum))
                places.append((names[number], filled[number], piece.zip.length))
                filled[number] += piece.zip.length
            for done in waiting:
                done.result()
            list(pool.map(os.fsync, files))
        finally:
            pool.shutdown(cancel_futures=True)
            for file in files:
                os.close(file)
        saved = _Zip(_pickle(common))
        _write_synced(weights / "common.pt", saved.head(0) + saved.tail(0))
        backends = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        _write_synced(weights / "metadata.json", json.dumps(backends).encode())
        _write_synced(weights / ".metadata", self._metadata(weights, places))

    def _metadata(self, weights: Path, places: list[tuple[str, int, int]]) -> bytes:
        described: dict[str, Any] = {}
        chunks: dict[str, list[Any]] = {key: [] for key in self._shapes}
        storage: dict[Any, Any] = {}
        for piece, place in zip(self._pieces, places, strict=True):
            if piece.tensor is None:
                described[piece.key] = _described("BytesStorageMetadata")
                storage[_described("MetadataIndex", piece.key)] = _described("_StorageInfo", *place)
                continue
            if piece.key not in described:
                dtype, shape = self._shapes[piece.key]
                properties = _described("TensorProperties", _Global("torch", TORCH_TYPES[dtype][0]))
                tensor = (properties, _size(shape), chunks[piece.key])
                described[piece.key] = _described("TensorStorageMetadata", *tensor)
            offsets = _size(piece.offsets)
            chunks[piece.key].append(_described("ChunkStorageMetadata", offsets, _size(piece.sizes)))
            storage[_described("MetadataIndex", piece.key, offsets)] = _described("_StorageInfo", *place)
        state: dict[str, Any] = {
            "state_dict_metadata": described,
            "planner_data": None,
            "storage_data": storage,
            "storage_meta": _described("StorageMeta", weights.name, str(uuid.uuid4())),
            "mcore_data": {key: {} for key in self._shapes},
            "version": "1.0.0",  # torch/distributed/checkpoint/filesystem.py, CURRENT_DCP_VERSION; torch 2.7 and later
        }
        return _pickle(_Rebuilt(_Global(*MCORE_METADATA), (described,), state))


def _described(name: str, *values: Any) -> _Rebuilt:
    """An object of torch's description, rebuilt by its own constructor."""
    module = next(module for module, classes in DESCRIPTION.items() if name in classes)
    return _Rebuilt(_Global(module, name), values)


def _size(extents: tuple[int, ...]) -> _Rebuilt:
    return _Rebuilt(_Global("torch", "Size"), (extents,))


def _write_piece(piece: _Piece, file: int, offset: int, checksum: bool) -> None:
    head = len(piece.zip.head(0))
    crc = 0
    if piece.tensor is not None:
        crc = copy(piece.tensor, file, offset + head, checksum=checksum)
    write(file, piece.zip.head(crc), offset)
    write(file, piece.zip.tail(crc), offset + head + (piece.zip.data_bytes or 0))


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
