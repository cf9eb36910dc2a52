"""Checkpoints in Megatron's format: torch reads ours, and we read those of torch."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from convert import torch_dist
from convert.stored import Rows, Span, StoredTensor, blocks
from convert.torch_dist import TorchDistReader, TorchDistWriter
from convert.torch_save import TORCH_TYPES, SavedZip, describe_tensor
from prune_distill.errors import InputError
from tests.helpers.dcp_metadata import read_metadata

TYPES = {ours: getattr(torch, theirs) for ours, (theirs, _) in TORCH_TYPES.items()}


def stored(tensor: torch.Tensor, folder: Path) -> StoredTensor:
    """Store a tensor in a new file."""
    number = len(list(folder.glob("*.raw")))
    path = folder / f"{number}.raw"
    path.write_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    dtype = next(ours for ours, theirs in TYPES.items() if theirs == tensor.dtype)
    rows = Rows(len(tensor), (Span(path, 0, tensor[0].nbytes),))
    return StoredTensor("source", dtype, tuple(tensor.shape), (rows,))


def numbers(tensor: StoredTensor) -> torch.Tensor:
    data = bytearray(b"".join(map(bytes, blocks(tensor))))
    return torch.frombuffer(data, dtype=TYPES[tensor.dtype]).reshape(tensor.shape)


def write(folder: Path, whole: dict[str, torch.Tensor], cuts: dict[str, list[int]], **options: Any) -> Path:
    """Write tensors to a checkpoint; `cuts`: sizes of a tensor's chunks along its dimensions."""
    writer = TorchDistWriter()
    for key, tensor in whole.items():
        for offsets, chunk in pieces(tensor, cuts.get(key, [])):
            writer.add(
                key, tuple(tensor.shape), offsets, stored(chunk.squeeze(0) if tensor.dim() > 2 else chunk, folder)
            )
    writer.add_object("module.mlp._extra_state/shard_0_1", [None])
    weights = folder / "weights"
    writer.write(weights, {"epoch": 3, "state": {"a": [1, 2.5, None, "ü"]}}, threads=2, **options)
    return weights


def pieces(tensor: torch.Tensor, sizes: list[int]) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    found = [((), tensor)]
    for dimension, size in enumerate(sizes):
        found = [
            ((*offsets, place), part.narrow(dimension, place, min(size, part.shape[dimension] - place)))
            for offsets, part in found
            for place in range(0, part.shape[dimension], size)
        ]
    return [((*offsets, *[0] * (tensor.dim() - len(offsets))), part) for offsets, part in found]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {dtype: torch.randn(5, 7).to(theirs) for dtype, theirs in TYPES.items()}
    return {**found, "stacked": torch.randn(3, 5, 7).bfloat16(), "vector": torch.randn(11)}


CUTS = {"stacked": [1], "F32": [2, 4], "BF16": [5, 2]}


@pytest.mark.parametrize("checksum", [True, False])
def test_torch_reads_written_checkpoints(tmp_path: Path, checksum: bool) -> None:
    expected = tensors()
    weights = write(tmp_path, expected, CUTS, checksum=checksum)
    # Load into empty tensors; torch accepts Megatron's class of `.metadata`.
    state: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    dcp.load(state, storage_reader=MegatronsReader(weights), no_dist=True)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    assert torch.load(weights / "common.pt", weights_only=True) == {"epoch": 3, "state": {"a": [1, 2.5, None, "ü"]}}
    assert sorted(path.name for path in weights.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__0_1.distcp",
        "common.pt",
        "metadata.json",
    ]


class MegatronsReader(dcp.FileSystemReader):
    def read_metadata(self) -> Any:
        return read_metadata(Path(self.path))


@pytest.mark.parametrize("checksum", [True, False])
def test_every_chunk_is_a_file_of_torch_save(tmp_path: Path, checksum: bool) -> None:
    expected = tensors()
    reader = TorchDistReader(write(tmp_path, expected, CUTS, checksum=checksum))
    chunks = [chunk for tensor in reader.tensors.values() for chunk in tensor.chunks]
    assert len(chunks) == 3 + 6 + 4 + 3
    for chunk in chunks:
        data = chunk.file.read_bytes()[chunk.offset : chunk.offset + chunk.length]
        part = torch.load(io.BytesIO(data), weights_only=True)
        whole = expected[chunk.key]
        for dimension, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            whole = whole.narrow(dimension, offset, size)
        assert torch.equal(part, whole)
        with zipfile.ZipFile(io.BytesIO(data)) as saved:
            assert saved.testzip() == (None if checksum else "archive/data/0")  # the first record with a wrong CRC-32
            begin = torch_dist._data_record(chunk, part.nbytes, reader.tensors[chunk.key]).begin - chunk.offset
            assert begin % 64 == 0  # torch maps files into memory
    (extra,) = reader.objects
    data = extra.file.read_bytes()[extra.offset : extra.offset + extra.length]
    assert torch.load(io.BytesIO(data), weights_only=True) == [None]


@pytest.mark.parametrize("cuts", [[], [1], [2], [3, 2], [1, 5, 3], [1, 2, 7], [2, 5, 4], [2, 2, 3], [3, 1, 1]])
def test_chunks_of_any_layout_are_assembled(tmp_path: Path, cuts: list[int]) -> None:
    """Saved by torch with tensor, pipeline and expert parallelism, alone and together, in any order."""
    whole = torch.arange(3 * 5 * 7, dtype=torch.float32).reshape(3, 5, 7)
    weights = save_as_torch(tmp_path, whole, pieces(whole, cuts))
    reader = TorchDistReader(weights)
    for layer in range(3):
        assert torch.equal(numbers(reader.tensor("key", layer)), whole[layer])
        assert torch.equal(numbers(reader.tensor("key", layer).take(1, 3)), whole[layer, 1:4])
        for row in (0, 4):
            assert torch.equal(numbers(reader.tensor("key", layer, row)), whole[layer, row])
    if len(cuts) < 3:  # the innermost dimension is whole
        assert torch.equal(numbers(reader.tensor("key")), whole)


def save_as_torch(folder: Path, whole: torch.Tensor, chunks: list[tuple[tuple[int, ...], torch.Tensor]]) -> Path:
    """Write a checkpoint of one tensor with torch's classes, in chunks of `torch.save`."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    random.Random(0).shuffle(chunks)
    weights = folder / "weights"
    weights.mkdir()
    places, storage = [], {}
    with (weights / "__3_0.distcp").open("wb") as file:
        for offsets, part in chunks:
            begin = file.tell()
            torch.save(part.clone(), file)
            places.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
            place = _StorageInfo("__3_0.distcp", begin, file.tell() - begin)
            storage[MetadataIndex("key", torch.Size(offsets))] = place
    described = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.shape, places)
    with (weights / ".metadata").open("wb") as file:
        pickle.dump(Metadata({"key": described}, None, storage), file)
    return weights


def test_sharding_along_an_inner_dimension_is_rejected(tmp_path: Path) -> None:
    whole = torch.zeros(3, 5, 7)
    reader = TorchDistReader(save_as_torch(tmp_path, whole, pieces(whole, [3, 5, 4])))
    with pytest.raises(InputError, match="key is sharded along an inner dimension"):
        reader.tensor("key")


def test_missing_parts_are_reported(tmp_path: Path) -> None:
    whole = torch.zeros(3, 5, 7)
    chunks = [(offsets, part) for offsets, part in pieces(whole, [1, 2]) if offsets != (1, 2, 0)]
    reader = TorchDistReader(save_as_torch(tmp_path, whole, chunks))
    assert reader.tensor("key", 0).shape == (5, 7)
    for index, part in (((1,), r"key\[1\] is missing \(rows 2 to 3\)"), ((3,), r"key\[3\] is missing \(rows 0 to 4\)")):
        with pytest.raises(InputError, match=part):
            reader.tensor("key", *index)
    with pytest.raises(InputError, match="has no tensor other"):
        reader.tensor("other")
    with pytest.raises(InputError, match=r"key has shape \[3, 5, 7\] and no part \[0, 0, 0\]"):
        reader.tensor("key", 0, 0, 0)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (torch.zeros(8, 7)[2:7], "is not contiguous"),  # its storage holds more
        (torch.zeros(7, 5).t(), "is not contiguous"),
        (torch.zeros(5, 7, dtype=torch.int32), "is not contiguous"),  # as many bytes of another type
        (torch.zeros(5, 7, dtype=torch.float64), "is not contiguous"),
        ({"a": 1}, "is truncated or damaged: key"),
        (print, "is truncated or damaged: key"),
    ],
)
def test_chunks_that_are_not_contiguous_are_rejected(tmp_path: Path, part: Any, message: str) -> None:
    whole = torch.zeros(5, 7)
    weights = save_as_torch(tmp_path, whole, [((0, 0), whole)])
    torch.save(part, weights / "__3_0.distcp")
    describe_the_whole_file(weights)
    with pytest.raises(InputError, match=message):
        TorchDistReader(weights).tensor("key")


def test_a_compressed_chunk_is_rejected(tmp_path: Path) -> None:
    """Its bytes are wrong, although its size in the directory is right."""
    weights = save_as_torch(tmp_path, torch.zeros(5, 7), [((0, 0), torch.zeros(5, 7))])
    repack(weights, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="a part of key is not contiguous"):
        TorchDistReader(weights).tensor("key")


@pytest.mark.parametrize("name", [".metadata", "__3_0.distcp"])
def test_a_fifo_in_a_checkpoint_does_not_hang(tmp_path: Path, name: str) -> None:
    weights = save_as_torch(tmp_path, torch.zeros(5, 7), [((0, 0), torch.zeros(5, 7))])
    (weights / name).unlink()
    os.mkfifo(weights / name)
    with pytest.raises(InputError, match="is not a torch_dist checkpoint|it is a FIFO"):
        TorchDistReader(weights)


def test_the_crc_of_torch_detects_a_changed_byte(tmp_path: Path) -> None:
    """torch itself loads it. A checkpoint without CRCs is not checked."""
    whole = torch.arange(35, dtype=torch.float32).reshape(5, 7)
    for with_crc in (True, False):
        (tmp_path / str(with_crc)).mkdir()
        torch.serialization.set_crc32_options(with_crc)
        try:
            weights = save_as_torch(tmp_path / str(with_crc), whole, [((0, 0), whole)])
        finally:
            torch.serialization.set_crc32_options(True)
        assert torch.equal(numbers(TorchDistReader(weights).tensor("key")), whole)
        (path,) = weights.glob("*.distcp")
        content = bytearray(path.read_bytes())
        content[content.index(whole.numpy().tobytes()) + 4 * 34] ^= 1  # the last number
        path.write_bytes(content)
        first_row = TorchDistReader(weights).tensor("key").take(0, 1)
        if with_crc:
            with pytest.raises(InputError, match=r"__3_0\.distcp is damaged: the CRC-32 of key"):
                numbers(first_row)
        else:
            assert torch.equal(numbers(first_row), whole[:1])


def repack(weights: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Rewrite the only chunk of a checkpoint with other records."""
    path = weights / "__3_0.distcp"
    with zipfile.ZipFile(path) as saved:
        records = {name: saved.read(name) for name in saved.namelist()}
    with zipfile.ZipFile(path, "w", compression) as packed:
        for name, data in records.items():
            packed.writestr(name, change(name, data))
    describe_the_whole_file(weights)


def describe_the_whole_file(weights: Path) -> None:
    """Describe the whole file as the only chunk of a checkpoint."""
    size = (weights / "__3_0.distcp").stat().st_size
    rewritten(weights, lambda metadata: [setattr(place, "length", size) for place in metadata.storage_data.values()])


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 300), os.unlink, lambda file: file.write_bytes(b"")])
def test_truncated_files_are_reported_with_the_tensor(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    weights = write(tmp_path, {"one": torch.zeros(5, 7), "two": torch.zeros(5, 7)}, {})
    damage(weights / "__0_0.distcp")
    reader = TorchDistReader(weights)
    assert not numbers(reader.tensor("two")).any()
    with pytest.raises(InputError, match=r"__0_0\.distcp is truncated or damaged: one"):
        reader.tensor("one")


def test_a_chunk_of_more_than_4_gib(tmp_path: Path) -> None:
    """64-bit sizes of zip, in a sparse file; torch maps it into memory."""
    rows, columns = 70_000, 32_768  # 4.59e9 bytes of bf16
    size = rows * columns * 2
    whole = SavedZip(describe_tensor("BF16", (rows, columns)), size)
    path = tmp_path / "__3_0.distcp"
    with path.open("wb") as file:
        head = whole.head(0)
        file.write(head)
        file.seek(len(head) + size - 2)
        file.write(b"\x80\x3f")  # 1.0
        file.write(whole.tail(0))
    assert path.stat().st_size == whole.length
    assert path.stat().st_blocks * 512 < 1 << 20
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded.shape == (rows, columns)
    assert loaded[-1, -2:].tolist() == [0, 1]
    chunk = torch_dist.Chunk("key", (0, 0), (rows, columns), path, 0, whole.length)
    tensor = torch_dist.ChunkedTensor("key", "BF16", (rows, columns), [chunk])
    assert torch_dist._data_record(chunk, size, tensor).begin == len(head)
    with zipfile.ZipFile(path) as saved:
        assert saved.getinfo("archive/data/0").file_size == size


def test_a_folder_without_metadata_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a torch_dist checkpoint \(it has no \.metadata\)"):
        TorchDistReader(tmp_path)


def rewritten(weights: Path, change: Callable[[Any], Any]) -> None:
    metadata = read_metadata(weights)
    change(metadata)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights: os.truncate(weights / ".metadata", 100),
        lambda weights: (weights / ".metadata").write_bytes(b""),
        lambda weights: (weights / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        lambda weights: rewritten(weights, lambda metadata: setattr(metadata, "storage_data", [])),
        lambda weights: rewritten(weights, lambda metadata: metadata.state_dict_metadata["one"].chunks.clear()),
        lambda weights: rewritten(weights, lambda metadata: vars(metadata).pop("state_dict_metadata")),
        lambda weights: rewritten(weights, leave_the_folder),
    ],
)
def test_a_damaged_description_is_rejected(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    weights = write(tmp_path, {"one": torch.zeros(5, 7)}, {})
    damage(weights)
    with pytest.raises(InputError, match=r"weights/\.metadata is damaged"):
        TorchDistReader(weights)


def leave_the_folder(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../../secret"


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_malicious_pickles_do_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = pickle.dumps(Evil(marker))
    pickle.loads(evil)
    assert marker.exists()  # the pickle is malicious
    marker.unlink()

    weights = write(tmp_path, {"one": torch.zeros(5, 7)}, {})
    honest = (weights / ".metadata").read_bytes()
    (weights / ".metadata").write_bytes(evil)
    with pytest.raises(InputError, match="is damaged"):
        TorchDistReader(weights)
    (weights / ".metadata").write_bytes(evil[:-1] + b"0" + honest)  # dropped from the stack, then as it was
    assert {name.replace("posix.", "os.") for name in TorchDistReader(weights).other_names} == {"os.system"}

    shutil.rmtree(weights)
    weights = save_as_torch(tmp_path, torch.zeros(5, 7), [((0, 0), torch.zeros(5, 7))])
    repack(weights, lambda name, data: evil if name.endswith("data.pkl") else data)
    with pytest.raises(InputError, match="system, which tensors do not need"):
        TorchDistReader(weights).tensor("key")
    assert not marker.exists()
