"""Read and write Megatron's `torch_dist` checkpoints as streams.

A folder contains `.metadata` (a pickle of every tensor's shape, type and chunks, and the location of each chunk),
`__RANK_N.distcp` (concatenated chunks, each written by `torch.save`: a zip file whose record `data/0` holds the
values), `common.pt` and `metadata.json`. Written by megatron/core/dist_checkpointing/strategies/torch.py and
filesystem_async.py with torch/distributed/checkpoint/filesystem.py. Pickles are read with only the classes that such
a description needs, so checkpoints from untrusted sources run no code.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import uuid
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.dcp_metadata import MCORE_METADATA, read_description, torch_object, torch_size
from convert.stored import CopyResult, Rows, Span, StoredTensor, copy, write
from convert.torch_save import (
    SAFETENSORS_NAMES,
    TORCH_TYPES,
    Global,
    Rebuilt,
    SavedTensor,
    SavedZip,
    describe_tensor,
    is_contiguous,
    pickled,
)
from prune_distill.errors import InputError
from prune_distill.model.hf_weights import ITEM_BYTES
from prune_distill.nemo.saved_records import Record, Window, read_record, record_begin
from prune_distill.regular_files import folder_faults

# Minimum number of files for the chunks: that of Megatron's writer.
FILES = 2
FILE_BYTES = 16 << 30


@dataclass(frozen=True)
class Chunk:
    """A part of the tensor `key`: its offsets and sizes in the tensor, and its location in a file."""

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
    """Reads the tensors of a checkpoint, saved under any parallel layout.

    Attributes:
        tensors: tensors by Megatron's key.
        objects: locations of the pickled objects.
        other_names: other classes and functions that `.metadata` names.

    Raises:
        InputError: the folder is not a checkpoint, or its description is damaged.
    """

    def __init__(self, weights: Path) -> None:
        self.folder = weights
        self.tensors: dict[str, ChunkedTensor] = {}
        self.objects: list[Chunk] = []
        self._records: dict[tuple[Path, int], Record] = {}
        path = weights / ".metadata"
        if not path.is_file():
            raise InputError(f"{weights} is not a torch_dist checkpoint (it has no .metadata)")
        if faults := folder_faults(weights, allow_outside_links=True):
            raise InputError("; ".join(faults))
        try:
            metadata, self.other_names = read_description(path)
            self._read_chunks(metadata)
        except Exception as error:  # damaged pickles raise errors of any kind
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error})") from error

    def _read_chunks(self, metadata: Any) -> None:
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
                raise InputError(f"it names {name}, which is outside its folder")
            offsets = tuple(index.offset or ())
            extents = sizes[index.fqn, offsets] if index.fqn in self.tensors else ()
            chunk = Chunk(index.fqn, offsets, extents, self.folder / name, place.offset, place.length)
            chunks = self.tensors[index.fqn].chunks if index.fqn in self.tensors else self.objects
            chunks.append(chunk)

    def tensor(self, key: str, *index: int) -> StoredTensor:
        """Return a tensor, or its part at `index` of the first dimensions, assembled from its chunks.

        Raises:
            InputError: there is no such tensor, a chunk is missing or truncated, or its type is unknown.
        """
        if key not in self.tensors:
            raise InputError(f"{self.folder} has no tensor {key}")
        whole = self.tensors[key]
        if whole.dtype not in ITEM_BYTES:
            raise InputError(f"{self.folder}: {key} has the unsupported type {whole.dtype}")
        shape = whole.shape[len(index) :]
        name = f"{key}{list(index)}" if index else key
        if not shape:
            raise InputError(f"{self.folder}: {key} has shape {list(whole.shape)} and no part {list(index)}")
        parts = [part for chunk in whole.chunks if (part := self._find_overlap(whole, chunk, index)) is not None]
        cuts = sorted({0, shape[0], *(edge for part in parts for edge in (part.row, part.row + part.rows))})
        rows = [
            self._assemble_rows(name, whole, parts, start, end - start, shape)
            for start, end in itertools.pairwise(cuts)
        ]
        return StoredTensor(name, whole.dtype, shape, tuple(rows))

    def _find_overlap(self, whole: ChunkedTensor, chunk: Chunk, index: tuple[int, ...]) -> _Part | None:
        """Return the overlap of a chunk with the part at `index`; None if there is none."""
        depth, item = len(index), ITEM_BYTES[whole.dtype]
        skipped = 0
        for position, offset, size in zip(index, chunk.offsets, chunk.sizes, strict=False):
            if not offset <= position < offset + size:
                return None
            skipped = skipped * size + position - offset
        sizes, offsets, shape = chunk.sizes[depth:], chunk.offsets[depth:], whole.shape[depth:]
        if sizes[2:] != shape[2:]:
            raise InputError(f"{self.folder}: {whole.key} is sharded along an inner dimension; save it unsharded")
        width = math.prod(sizes[1:]) * item
        column = offsets[1] * math.prod(shape[2:]) * item if len(shape) > 1 else 0
        return _Part(chunk, skipped * sizes[0] * width, offsets[0], sizes[0], column, width)

    def _assemble_rows(
        self, name: str, whole: ChunkedTensor, parts: list[_Part], start: int, count: int, shape: tuple[int, ...]
    ) -> Rows:
        """Return rows that consist of the same chunks."""
        across = [part for part in parts if part.row <= start and start + count <= part.row + part.rows]
        spans: list[Span] = []
        reached = 0
        for part in sorted(across, key=lambda part: part.column):
            if part.column != reached:
                break
            spans.append(self._locate_rows(whole, part, start))
            reached += part.row_bytes
        if reached != math.prod(shape[1:]) * ITEM_BYTES[whole.dtype]:
            raise InputError(f"{self.folder}: a part of {name} is missing (rows {start} to {start + count - 1})")
        return Rows(count, tuple(spans))

    def _locate_rows(self, whole: ChunkedTensor, part: _Part, row: int) -> Span:
        chunk = part.chunk
        place = (chunk.file, chunk.offset)
        if place not in self._records:
            self._records[place] = _data_record(chunk, math.prod(chunk.sizes) * ITEM_BYTES[whole.dtype], whole)
        record = self._records[place]
        offset = record.begin + part.skipped + (row - part.row) * part.row_bytes
        return Span(chunk.file, offset, part.row_bytes, record)


@dataclass(frozen=True)
class _Part:
    """The part of a matrix in a chunk: rows from `row` on, from the byte `column` of each, after `skipped` bytes."""

    chunk: Chunk
    skipped: int
    row: int
    rows: int
    column: int
    row_bytes: int


def _data_record(chunk: Chunk, size: int, whole: ChunkedTensor) -> Record:
    """Locate the values of a saved tensor in its file.

    Raises:
        InputError: it is truncated, not contiguous, or of another type than described.
    """
    try:
        with Window(chunk.file, chunk.offset, chunk.length) as window, zipfile.ZipFile(window) as saved:
            record = next(info for info in saved.infolist() if info.filename.endswith("/data/0"))
            described = read_record(saved, record.filename.removesuffix("/data/0") + "/data.pkl")
            begin = record_begin(window, record)
        (_, storage, *_), first, shape, strides, *_ = SavedTensor(io.BytesIO(described)).load()
        in_rows = (record.file_size, record.compress_type, first) == (size, zipfile.ZIP_STORED, 0)
        in_rows = in_rows and is_contiguous(shape, strides)
    except Exception as error:  # damaged zips and pickles raise errors of any kind
        raise InputError(
            f"{chunk.file} is truncated or damaged: {whole.key} cannot be read ({error!r}); restore it from a copy"
        ) from error
    if not in_rows or storage != TORCH_TYPES[whole.dtype][1]:
        raise InputError(f"{chunk.file}: a part of {whole.key} is not contiguous; save the model again")
    return Record(chunk.file, chunk.offset + begin, record.file_size, record.CRC, whole.key, whole.dtype)


@dataclass(frozen=True)
class _Piece:
    """A chunk or, if `tensor` is None, a pickled object to write."""

    key: str
    zip: SavedZip
    tensor: StoredTensor | None = None
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class TorchDistWriter:
    """Collects the content of a checkpoint, then writes it."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(self, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], chunk: StoredTensor) -> None:
        """Add a chunk at `offsets` of the tensor `key`; missing leading dimensions have size 1."""
        sizes = (1,) * (len(shape) - len(chunk.shape)) + chunk.shape
        self._shapes[key] = (chunk.dtype, shape)
        saved = SavedZip(describe_tensor(chunk.dtype, sizes), chunk.bytes)
        self._pieces.append(_Piece(key, saved, chunk, offsets, sizes))

    def add_object(self, key: str, value: Any) -> None:
        """Add a small object of plain Python types."""
        self._pieces.append(_Piece(key, SavedZip(pickled(value))))

    def write(self, weights: Path, common: dict[str, object], *, threads: int, checksum: bool = True) -> bool:
        """Write the folder `weights` and sync it to disk; `.metadata`, which completes it, is written last.

        Args:
            common: the state that all ranks share, of plain Python types.
            checksum: whether to write the CRC-32 of the chunks, which readers check.

        Returns:
            Whether all values are finite.
        """
        weights.mkdir(parents=True)
        total = sum(piece.zip.length for piece in self._pieces)
        names = [f"__0_{number}.distcp" for number in range(max(FILES, -(-total // FILE_BYTES)))]
        files = [os.open(weights / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644) for name in names]
        places: list[tuple[str, int, int]] = []
        filled = [0] * len(files)
        pool = ThreadPoolExecutor(threads)
        try:
            futures: list[Future[bool]] = []
            for piece in self._pieces:
                number = filled.index(min(filled))
                futures.append(pool.submit(_write_piece, piece, files[number], filled[number], checksum))
                places.append((names[number], filled[number], piece.zip.length))
                filled[number] += piece.zip.length
            finite = True
            for future in futures:
                finite &= future.result()
            list(pool.map(os.fsync, files))
        finally:
            pool.shutdown(cancel_futures=True)
            for file in files:
                os.close(file)
        saved = SavedZip(pickled(common))
        _write_synced(weights / "common.pt", saved.head(0) + saved.tail(0))
        backends = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        _write_synced(weights / "metadata.json", json.dumps(backends).encode())
        _write_synced(weights / ".metadata", self._metadata(weights, places))
        return finite

    def _metadata(self, weights: Path, places: list[tuple[str, int, int]]) -> bytes:
        described: dict[str, Rebuilt] = {}
        chunks: dict[str, list[Any]] = {key: [] for key in self._shapes}
        storage: dict[Any, Any] = {}
        for piece, place in zip(self._pieces, places, strict=True):
            if piece.tensor is None:
                described[piece.key] = torch_object("BytesStorageMetadata")
                storage[torch_object("MetadataIndex", piece.key)] = torch_object("_StorageInfo", *place)
                continue
            if piece.key not in described:
                dtype, shape = self._shapes[piece.key]
                properties = torch_object("TensorProperties", Global("torch", TORCH_TYPES[dtype][0]))
                tensor = (properties, torch_size(shape), chunks[piece.key])
                described[piece.key] = torch_object("TensorStorageMetadata", *tensor)
            offsets = torch_size(piece.offsets)
            chunks[piece.key].append(torch_object("ChunkStorageMetadata", offsets, torch_size(piece.sizes)))
            storage[torch_object("MetadataIndex", piece.key, offsets)] = torch_object("_StorageInfo", *place)
        state: dict[str, object] = {
            "state_dict_metadata": described,
            "planner_data": None,
            "storage_data": storage,
            "storage_meta": torch_object("StorageMeta", weights.name, str(uuid.uuid4())),
            "mcore_data": {key: {} for key in self._shapes},
            "version": "1.0.0",  # torch/distributed/checkpoint/filesystem.py, CURRENT_DCP_VERSION; torch 2.7 and later
        }
        return pickled(Rebuilt(Global(*MCORE_METADATA), (described,), state))


def _write_piece(piece: _Piece, file: int, offset: int, checksum: bool) -> bool:
    """Write a piece, and return whether all of its values are finite."""
    head = len(piece.zip.head(0))
    copied = CopyResult(0, finite=True)
    if piece.tensor is not None:
        copied = copy(piece.tensor, file, offset + head, checksum=checksum)
    write(file, piece.zip.head(copied.crc), offset)
    write(file, piece.zip.tail(copied.crc), offset + head + (piece.zip.data_bytes or 0))
    return copied.finite


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
