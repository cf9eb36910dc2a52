"""Files of `torch.save` are read without running code in them."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.pickled_files import INDEX, read_folder
from convert.stored import blocks
from prune_distill.errors import InputError

FILE = "pytorch_model.bin"


def assert_tensors(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors = read_folder(folder)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        value = expected[name].detach()
        assert tensor.shape == (tuple(value.shape) or (1,)), name
        content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(map(bytes, blocks(tensor))) == content, name


def test_state_dicts_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    state = {str(dtype): torch.randn(3, 2).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    state |= {
        "half": torch.randn(5).half(),
        "whole": shared,
        "tied": shared,
        "rows of it": shared[2:5],
        "one of it": shared[1],
        "parameter": torch.nn.Parameter(torch.randn(2, 3, 2)),
        "without gradient": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "position_ids": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
    }
    torch.save(state, tmp_path / FILE)
    assert_tensors(tmp_path, state)


def test_a_modules_own_state_is_read(tmp_path: Path) -> None:
    """It is an OrderedDict with an attribute."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / FILE)
    assert_tensors(tmp_path, OrderedDict(module.state_dict()))


def test_several_files_with_and_without_an_index(tmp_path: Path) -> None:
    parts = {f"pytorch_model-0000{number}-of-00002.bin": {f"w{number}": torch.randn(2)} for number in (1, 2)}
    for name, part in parts.items():
        torch.save(part, tmp_path / name)
    whole = {name: tensor for part in parts.values() for name, tensor in part.items()}
    assert_tensors(tmp_path, whole)
    index = {tensor: file for file, part in parts.items() for tensor in part}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    assert_tensors(tmp_path, whole)
    torch.save({"w1": torch.randn(2)}, tmp_path / next(reversed(parts)))
    with pytest.raises(InputError, match="w1 is in pytorch_model-00002-of-00002.bin and in another file"):
        read_folder(tmp_path)
    (tmp_path / next(iter(parts))).unlink()
    with pytest.raises(InputError, match="has no pytorch_model-00001-of-00002.bin"):
        read_folder(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(InputError, match="is not an index of shards"):
        read_folder(tmp_path)


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def saved(value: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path, **options)


def damaged(how: Callable[[Path], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save({"w": torch.randn(50)}, path)
        how(path)

    return write


def repack(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            if (changed := change(name, data)) is not None:
                new.writestr(name, changed)


def without(end: str) -> Callable[[Path], None]:
    return lambda path: repack(path, lambda name, data: None if name.endswith(end) else data)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False), "is not a complete file of torch.save"),
        (saved({"w": torch.ones(3, 2).t()}), "w is not contiguous"),
        (saved({"w": torch.ones(3, 4)[:, :2]}), "w is not contiguous"),
        (saved({"w": torch.ones(2).expand(3, 2)}), "w is not contiguous"),
        (saved([torch.ones(2)]), "does not contain a dict of tensors"),
        (saved({"epoch": 3}), "epoch is not a tensor"),
        (saved({"w": torch.ones(2), "code": Evil()}), r"names (posix|os)\.system, which could be code"),
        (saved(torch.nn.Linear(2, 2)), r"names torch\.nn\.modules\.linear\.Linear"),
        (saved({"w": torch.ones(2).to(torch.complex64)}), "names torch.ComplexFloatStorage"),
        (damaged(lambda path: os.truncate(path, path.stat().st_size - 50)), "is not a complete file of torch.save"),
        (damaged(lambda path: path.write_bytes(b"")), "is not a complete file of torch.save"),
        (damaged(without("data.pkl")), "is not a complete file of torch.save"),
        (damaged(without("data/0")), "does not contain w"),
        (damaged(lambda path: repack(path, lambda name, data: data, zipfile.ZIP_DEFLATED)), "does not contain w"),
        (
            damaged(lambda path: repack(path, lambda name, data: data[:100] if name.endswith("/0") else data)),
            "does not contain w",
        ),
        (
            damaged(lambda path: repack(path, lambda name, data: b"\x80\x02(." if "pkl" in name else data)),
            "is not a complete file of torch.save",
        ),
    ],
)
def test_files_without_a_state_dict_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / FILE)
    with pytest.raises(InputError, match=message) as refused:
        read_folder(tmp_path)
    assert str(refused.value).startswith(str(tmp_path / FILE))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_folder_without_files_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no pytorch_model.bin"):
        read_folder(tmp_path)
