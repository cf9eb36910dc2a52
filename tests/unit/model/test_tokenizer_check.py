"""Comparison of two checkpoints' tokenizers, also without a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prune_distill.errors import InputError
from prune_distill.model.tokenizer_check import check_tokenizers

FILES = {"tokenizer.model": b"\0pieces", "vocab.json": b'{"a": 0}', "merges.txt": b"a b"}


def checkpoint(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_the_same_files_are_the_same_tokenizer(tmp_path: Path) -> None:
    check_tokenizers(checkpoint(tmp_path / "a", FILES), checkpoint(tmp_path / "b", FILES))
    prose = {**FILES, "README.md": b"x", "tokenizer_config.json": b"{}"}
    check_tokenizers(tmp_path / "a", checkpoint(tmp_path / "c", prose))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"other"])
def test_different_or_missing_files_are_another_tokenizer(tmp_path: Path, name: str, content: bytes | None) -> None:
    other = {key: value for key, value in {**FILES, name: content}.items() if value is not None}
    with pytest.raises(InputError, match=r"student.*teacher"):
        check_tokenizers(checkpoint(tmp_path / "a", FILES), checkpoint(tmp_path / "b", other))


def test_the_first_different_ids_are_reported(tmp_path: Path) -> None:
    def described(vocab: dict[str, int]) -> dict[str, bytes]:
        content = {"model": {"vocab": vocab, "merges": []}, "added_tokens": [{"content": "<e>", "id": 9}]}
        return {"tokenizer.json": json.dumps(content).encode(), "merges.txt": str(vocab).encode()}

    first = checkpoint(tmp_path / "a", described({"a": 0, "b": 1, "c": 2, "d": 3}))
    second = checkpoint(tmp_path / "b", described({"a": 0, "b": 1, "d": 2, "c": 3}))
    with pytest.raises(InputError, match=r"in the ids 2 \('c' and 'd'\), 3 \('d' and 'c'\);"):
        check_tokenizers(first, second)
    alone = described({"a": 0, "b": 1, "c": 2, "d": 3})["tokenizer.json"]
    check_tokenizers(first, checkpoint(tmp_path / "c", {"tokenizer.json": alone}))
