"""Tensors are copied as rows of bytes, with the same results as numpy and torch."""

from __future__ import annotations

import errno
import mmap
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import stored
from convert.stored import CopyResult, Rows, Span, StoredTensor, blocks, copy, report_nonfinite, stack
from prune_distill.errors import InputError
from prune_distill.nemo.saved_records import Record, is_finite

TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Store = Callable[..., StoredTensor]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a function that writes an array into a new file, after some other bytes."""

    def make(array: np.ndarray, name: str = "weight", dtype: str = "F32", gap: int = 13) -> StoredTensor:
        path = tmp_path / f"{name}.bin"
        path.write_bytes(bytes(gap) + array.tobytes())
        rows = Rows(len(array), (Span(path, gap, array.nbytes // len(array) if len(array) else 0),))
        return StoredTensor(name, dtype, array.shape, (rows,))

    return make


def matrix(rows: int = 10, columns: int = 3, start: int = 0) -> np.ndarray:
    return np.arange(start, start + rows * columns, dtype=np.float32).reshape(rows, columns)


def read(tensor: StoredTensor, dtype: str | None = None) -> bytes:
    return b"".join(bytes(block) for block in blocks(tensor, dtype))


def copied(tensor: StoredTensor, folder: Path, **options: object) -> tuple[bytes, int]:
    """Return the bytes that `copy` writes at offset 7 of a file, and its CRC-32."""
    content, found = copied_and_found(tensor, folder, **options)
    return content, found.crc


def copied_and_found(tensor: StoredTensor, folder: Path, **options: object) -> tuple[bytes, CopyResult]:
    with (folder / "target").open("wb+") as file:
        found = copy(tensor, file.fileno(), 7, **options)  # type: ignore[arg-type]
        file.seek(0)
        content = file.read()
    assert not any(content[:7])
    return content[7:], found


def test_rows_are_taken_and_stacked(store: Store) -> None:
    upper, lower = matrix(), matrix(start=100)
    whole = stack([store(upper, "upper"), store(lower, "lower")], "both")
    both = np.vstack((upper, lower))
    assert (whole.name, whole.shape, whole.bytes) == ("both", (20, 3), both.nbytes)
    for start, count in ((0, 20), (0, 3), (8, 4), (10, 10), (19, 1)):
        taken = whole.take(start, count)
        assert taken.shape == (count, 3)
        assert read(taken) == both[start : start + count].tobytes()
    assert read(whole.take(5, 10).take(4, 2)) == both[9:11].tobytes()


def test_taking_missing_rows_fails(store: Store) -> None:
    with pytest.raises(AssertionError, match="weight has no rows 8 to 12"):
        store(matrix()).take(8, 4)


def side_by_side(store: Store) -> tuple[StoredTensor, np.ndarray]:
    left, middle, right = matrix(columns=2), matrix(columns=1, start=50), matrix(columns=4, start=90)
    spans = tuple(store(part, name).rows[0].spans[0] for name, part in (("l", left), ("m", middle), ("r", right)))
    return StoredTensor("weight", "F32", (10, 7), (Rows(10, spans),)), np.hstack((left, middle, right))


@pytest.mark.parametrize("block_bytes", [1, 28, 60, 1 << 20])
def test_spans_are_concatenated_for_any_block_size(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", block_bytes)
    tensor, expected = side_by_side(store)
    assert len(list(blocks(tensor))) == -(-10 // max(1, block_bytes // 28))
    assert copied(tensor, tmp_path)[0] == expected.tobytes()
    assert copied(tensor.take(3, 5), tmp_path)[0] == expected[3:8].tobytes()


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_casts_match_torch(store: Store, tmp_path: Path, source: str, target: str) -> None:
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 70000.0, 1e-30, 2.0**-24, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    values = torch.cat((special, torch.randn(55))).to(TYPES[source]).reshape(8, 8)
    tensor = store(values.view(torch.uint8).numpy(), dtype=source)
    tensor = StoredTensor("weight", source, (8, 8), tensor.rows)
    expected = values.to(TYPES[target]).view(torch.uint8).numpy().tobytes()
    assert copied(tensor, tmp_path, dtype=target)[0] == expected


def test_the_checksum_covers_the_written_bytes(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 24)
    tensor = store(matrix(), gap=mmap.ALLOCATIONGRANULARITY - 50)  # it begins on one page and ends on the next
    for options in ({}, {"dtype": "BF16"}):
        content, crc = copied(tensor, tmp_path, checksum=True, **options)
        assert len(content) == (60 if options else 120)
        assert crc == zlib.crc32(content) != 0
    assert copied(tensor, tmp_path)[1] == 0


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("checksum", [False, True])
def test_copies_fall_back_to_memory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int, checksum: bool
) -> None:
    """It may fail at once, or after a part. The same rows occur twice, which is allowed."""
    part = store(matrix())
    tensor = stack([part, part, store(matrix(start=100), "other")], "both")
    calls = 0

    def refusing(source: int, target: int, count: int, position: int, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return os.pwrite(target, os.pread(source, min(count, 70), position), offset)  # a part of 120 bytes

    monkeypatch.setattr(os, "copy_file_range", refusing)
    expected = np.vstack((matrix(), matrix(), matrix(start=100))).tobytes()
    assert copied(tensor, tmp_path, checksum=checksum) == (expected, zlib.crc32(expected) if checksum else 0)
    assert calls == after + 1


def test_copies_fall_back_to_memory_without_mmap(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refusing)
    expected = matrix().tobytes()
    assert copied(store(matrix()), tmp_path, checksum=True) == (expected, zlib.crc32(expected))


def test_other_failures_of_the_file_system_are_not_hidden(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        copied(store(matrix()), tmp_path)


@pytest.mark.parametrize("options", [{}, {"checksum": True}, {"dtype": "BF16"}])
def test_a_truncated_file_is_reported_with_the_tensor(store: Store, tmp_path: Path, options: dict[str, object]) -> None:
    tensor = store(matrix())
    os.truncate(tmp_path / "weight.bin", 100)
    with pytest.raises(InputError, match=r"weight\.bin is truncated: it ends within weight"):
        copied(tensor, tmp_path, **options)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("options", [{}, {"checksum": True}, {"dtype": "BF16"}])
def test_an_empty_tensor_has_no_bytes(
    store: Store, tmp_path: Path, shape: tuple[int, int], options: dict[str, object]
) -> None:
    assert copied(store(np.empty(shape, np.float32)), tmp_path, **options) == (b"", 0)


SPECIAL = [torch.nan, -torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_single_non_finite_number_is_detected(dtype: str, value: float) -> None:
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0]).to(TYPES[dtype])
    largest = torch.finfo(TYPES[dtype])
    numbers = torch.cat((numbers, torch.tensor([largest.max, largest.min, largest.tiny], dtype=TYPES[dtype])))
    assert is_finite(numbers.view(torch.uint8).numpy().tobytes(), dtype)
    numbers[3] = value
    assert not is_finite(numbers.view(torch.uint8).numpy().tobytes(), dtype)


def test_other_types_count_as_finite() -> None:
    assert is_finite(b"\xff" * 8, "I64")
    assert is_finite(b"", "F32")


@pytest.mark.parametrize("spans", ["one", "several", "in a record"])
@pytest.mark.parametrize("checksum", [False, True])
def test_copying_detects_non_finite_values(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: str, checksum: bool
) -> None:
    """Also in the block before the last one."""
    monkeypatch.setattr(stored, "BLOCK_BYTES", 28)
    array = matrix(columns=7)
    for place, finite in (((0, 0), False), ((9, 6), False), (None, True)):
        changed = array.copy()
        if place is not None:
            changed[place] = np.nan
        tensor = store(changed)
        if spans == "several":
            left, right = (
                store(np.ascontiguousarray(part), name) for part, name in ((changed[:, :3], "l"), (changed[:, 3:], "r"))
            )
            tensor = StoredTensor(
                "weight", "F32", (10, 7), (Rows(10, (left.rows[0].spans[0], right.rows[0].spans[0])),)
            )
        if spans == "in a record":
            (span,) = tensor.rows[0].spans
            record = Record(span.file, span.offset, changed.nbytes, zlib.crc32(changed.tobytes()), "weight", "F32")
            tensor = StoredTensor("weight", "F32", (10, 7), (Rows(10, (replace(span, record=record),)),))
        content, found = copied_and_found(tensor, tmp_path, checksum=checksum)
        assert content == changed.tobytes()
        assert found.finite == finite


@pytest.mark.parametrize(("value", "finite"), [(65504.0, True), (65519.0, True), (65520.0, False), (-1e5, False)])
def test_a_number_too_large_for_an_export_is_detected(store: Store, tmp_path: Path, value: float, finite: bool) -> None:
    """Above 65504 fp16 rounds: up to 65519.99 to 65504, from 65520 on to infinity."""
    array = matrix()
    array[4, 1] = value
    tensor = store(array)
    assert copied_and_found(tensor, tmp_path, dtype="F16")[1].finite == finite
    assert copied_and_found(tensor, tmp_path)[1].finite
    if not finite:
        with pytest.raises(
            InputError, match=r"source: 1 tensors .*: weight \(1 too large for F16\).*allow_nonfinite=true"
        ):
            report_nonfinite([tensor], Path("source"), "F16", allow=False)


def test_non_finite_tensors_are_reported_with_counts(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    spoiled = matrix(columns=1)
    spoiled[3:5] = np.inf
    both = spoiled.copy()
    both[0] = 1e9
    tensors = [store(matrix(), "good"), store(spoiled, "bad"), store(both, "worse")]
    with pytest.raises(InputError) as refused:
        report_nonfinite(tensors, Path("model"), "BF16", allow=False)
    assert "2 tensors contain non-finite values: bad (2 NaN or infinite), worse (2 NaN or infinite);" in str(
        refused.value
    )
    report_nonfinite(tensors, Path("model"), "F16", allow=True)
    assert "bad (2 NaN or infinite), worse (2 NaN or infinite, 1 too large for F16)" in caplog.text
    report_nonfinite(tensors[:1], Path("model"), allow=False)


def test_reading_any_part_checks_the_crc(store: Store, tmp_path: Path) -> None:
    array = matrix()
    plain = store(array)
    (span,) = plain.rows[0].spans
    path = span.file

    def recorded(crc: int) -> StoredTensor:
        record = Record(path, span.offset, array.nbytes, crc, "weight")
        return StoredTensor("weight", "F32", array.shape, (Rows(10, (Span(path, span.offset, 12, record),)),))

    crc = zlib.crc32(array.tobytes())
    assert copied(recorded(crc), tmp_path)[0] == read(recorded(crc)) == array.tobytes()
    with path.open("r+b") as file:
        file.seek(span.offset + 100)
        file.write(b"\x01")
    for use in (lambda tensor: read(tensor), lambda tensor: copied(tensor, tmp_path)):
        # The first rows, which are intact.
        with pytest.raises(InputError, match=r"weight\.bin is damaged: the CRC-32 of weight"):
            use(recorded(crc).take(0, 1))
        assert use(recorded(0)) is not None  # written without one
    os.truncate(path, span.offset + 100)
    with pytest.raises(InputError, match="is damaged"):
        read(recorded(crc).take(0, 1))
