"""Safetensors files are read and written like the library does, and damaged files are rejected."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from convert import safetensors_files
from convert.safetensors_files import INDEX, read_folder, write_folder
from convert.stored import blocks
from prune_distill.errors import InputError
from prune_distill.model import hf_weights

FILE = "model.safetensors"
A, B = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.randn(4, 2).bfloat16()


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_tensors(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors = read_folder(folder)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == (tuple(expected[name].shape) or (1,)), name
        assert b"".join(map(bytes, blocks(tensor))) == content(expected[name]), name


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(dtype): torch.arange(6).reshape(3, 2).to(dtype) for dtype in types}
    tensors |= {"fp8": torch.randn(3).to(torch.float8_e4m3fn), "wide fp8": torch.randn(3).to(torch.float8_e5m2)}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "no columns": torch.empty(4, 0)}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    assert_tensors(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_the_library_reads_written_files(tmp_path: Path, dtype: str | None) -> None:
    tensors = {"b": B, "a": A, "none": torch.empty(0, 3), "ключ": torch.ones(1)}
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    save_file(tensors, source / FILE)
    write_folder(read_folder(source).values(), target, dtype=dtype, threads=2)
    assert [path.name for path in target.iterdir()] == [FILE]
    loaded = load_file(target / FILE)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor if dtype is None else tensor.bfloat16())
    with safe_open(target / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 40)
    tensors = {"a": A, "b": B, "large": torch.ones(30), "d": torch.ones(2)}  # of 24, 16, 120 and 8 bytes
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    save_file(tensors, source / FILE)
    found = read_folder(source)
    write_folder([found[name] for name in tensors], target, dtype=None, threads=2)
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in target.iterdir()) == [*shards, INDEX]
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"] == {"total_size": 168}
    assert index["weight_map"] == dict(zip(tensors, (shards[0], shards[0], shards[1], shards[2]), strict=True))
    assert [set(load_file(target / shard)) for shard in shards] == [{"a", "b"}, {"large"}, {"d"}]
    assert_tensors(target, tensors)


def test_weights_may_be_links(tmp_path: Path) -> None:
    """As in the Hub's cache."""
    (tmp_path / "blobs").mkdir()
    save_file({"a": A}, tmp_path / "blobs" / "0f3a")
    (tmp_path / FILE).symlink_to(tmp_path / "blobs" / "0f3a")
    assert_tensors(tmp_path, {"a": A})


def test_a_single_file_takes_precedence_over_an_index(tmp_path: Path) -> None:
    """As in transformers (modeling_utils.py, _get_resolved_checkpoint_files); the index may be from an older save."""
    save_file({"a": A}, tmp_path / FILE)
    save_file({"b": B}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "model-00001-of-00001.safetensors"}}))
    assert_tensors(tmp_path, {"a": A})


def header(change: Callable[[dict[str, Any]], Any], file: Path) -> None:
    """Replace the header of a file by the result of `change`, without moving the tensors."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = change(json.loads(data[8 : 8 + length]))
    text = (text if isinstance(text, str) else json.dumps(text)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def entry(**values: Any) -> Callable[[Path], None]:
    """Return a change of the entry of tensor `b`."""
    return lambda file: header(lambda old: {**old, "b": {**old["b"], **values}}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 1), f"{FILE} is truncated: it ends within"),
        (lambda file: os.truncate(file, 20), "its header does not fit"),
        (lambda file: os.truncate(file, 5), "its header does not fit"),
        (lambda file: os.truncate(file, 0), "its header does not fit"),
        (lambda file: file.write_bytes(struct.pack("<Q", 1 << 63) + file.read_bytes()[8:]), "its header does not fit"),
        (lambda file: file.write_bytes(file.read_bytes() + b"more"), "has 4 bytes more than its header describes"),
        (lambda file: header(lambda _: "{no json", file), "has a damaged header"),
        (lambda file: header(lambda _: [], file), "has a damaged header"),
        (lambda file: header(lambda _: {"b": 3}, file), "has a damaged header"),
        (lambda file: header(lambda _: "[" * 100_000, file), "has a damaged header"),
        (lambda file: header(lambda old: {"b": old["b"]}, file), "b does not begin at the end of the previous one"),
        (entry(shape=[4, 3]), r"b has 16 bytes, not those of BF16 \[4, 3\]"),
        (entry(shape=[-4, -2]), r"b has 16 bytes, not those of BF16 \[-4, -2\]"),
        (entry(dtype="Q4"), "b has the unsupported type Q4"),
        (entry(data_offsets=[0, 16]), "does not begin at the end of the previous one"),
        (entry(data_offsets=[-16, 0]), "does not begin at the end of the previous one"),
        (entry(data_offsets=[1 << 70, (1 << 70) + 16]), f"{FILE} is truncated: it ends within b"),
        (entry(data_offsets=[float("inf"), 16]), "has a damaged header"),
    ],
)
def test_damaged_files_are_rejected(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    save_file({"a": A, "b": B}, tmp_path / FILE)
    damage(tmp_path / FILE)
    with pytest.raises(InputError, match=f"{tmp_path.name} cannot be read: .*{message}") as refused:
        read_folder(tmp_path)
    assert str(refused.value).count(FILE) == 1
    with pytest.raises((SafetensorError, OverflowError)):
        load_file(tmp_path / FILE)  # the library rejects it, too


def write_index(folder: Path, **files: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def test_unreadable_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "1.safetensors").mkdir()
    write_index(tmp_path, a="1.safetensors")
    with pytest.raises(InputError, match=r"1\.safetensors cannot be read \(Is a directory\)"):
        read_folder(tmp_path)


def test_all_faults_of_a_folder_are_reported_at_once(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": A, f"only {number}": B}, tmp_path / f"{number}.safetensors")
    (tmp_path / "3.safetensors").write_bytes(b"")
    (tmp_path / "4.safetensors").symlink_to(tmp_path / "gone")
    write_index(tmp_path, a="1.safetensors", b="2.safetensors", c="3.safetensors", d="4.safetensors", e="5.safetensors")
    with pytest.raises(InputError) as refused:
        read_folder(tmp_path)
    message = str(refused.value).removeprefix(f"{tmp_path} cannot be read: ").split("; ")
    assert f"4.safetensors, 5.safetensors, which {INDEX} names, are missing" in message
    assert "a is in two files, 1.safetensors and 2.safetensors" in message
    assert any(fault.startswith("3.safetensors is not a complete safetensors file") for fault in message)
    assert f"{INDEX} names b, which its files do not hold" in message


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "weights.safetensors"])
def test_files_that_transformers_would_not_find_are_rejected(tmp_path: Path, name: str) -> None:
    save_file({"a": A}, tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is not called {FILE}"):
        read_folder(tmp_path)
    save_file({"b": B}, tmp_path / "z.safetensors")
    with pytest.raises(InputError, match=rf"{name}, z\.safetensors are not named by an index"):
        read_folder(tmp_path)


def test_files_that_are_not_in_the_index_are_ignored(tmp_path: Path) -> None:
    """Some models contain their weights twice, such as Mistral's consolidated.safetensors."""
    save_file({"a": A}, tmp_path / "1.safetensors")
    save_file({"b": B}, tmp_path / "consolidated.safetensors")
    write_index(tmp_path, a="1.safetensors")
    assert_tensors(tmp_path, {"a": A})


def test_large_headers_are_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5 M tensors, and a sparse header of 90 MB, which is not parsed."""
    with (tmp_path / FILE).open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_008)
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(InputError, match="a header of 90000000 bytes"):
        read_folder(tmp_path)
    monkeypatch.undo()
    (tmp_path / FILE).unlink()
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(90_000_000)
    with pytest.raises(InputError, match="is larger than 12000000 bytes"):
        read_folder(tmp_path)


def test_headers_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": A}, tmp_path / "1.safetensors")
    save_file({"b": B}, tmp_path / "2.safetensors")
    write_index(tmp_path, a="1.safetensors", b="2.safetensors")
    (size,) = struct.unpack("<Q", (tmp_path / "1.safetensors").read_bytes()[:8])
    monkeypatch.setattr(hf_weights, "MAX_HEADER_BYTES", 2 * size)
    assert_tensors(tmp_path, {"a": A, "b": B})
    monkeypatch.setattr(hf_weights, "MAX_HEADER_BYTES", 2 * size - 1)
    with pytest.raises(InputError, match=r"2\.safetensors has a header of"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "is not an index of shards"),
        (b"\xff\xfe", "is not an index of shards"),
        (b"[]", "is not an index of shards"),
        (b'{"weight_map": ["a"]}', "is not an index of shards"),
        (b'{"weight_map": {"a": {}}}', "is not an index of shards"),
        (b'{"weight_map": {"a": 3}}', "names 3, which is outside its folder"),
        (b'{"weight_map": {"a": "../a"}}', r"names '\.\./a'"),
        (b'{"weight_map": {"a": "/etc/hosts"}}', "names '/etc/hosts'"),
        (b'{"weight_map": {"a": ""}}', "names ''"),
    ],
)
def test_invalid_indices_are_rejected(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path)
