"""Shards equal Megatron's files byte by byte, and are published atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prune_distill.data import shards
from prune_distill.data.shards import (
    Index,
    SplitWriter,
    publish,
    read_document_info,
    read_documents,
    token_dtype,
    write_index,
)
from prune_distill.errors import InputError

DOCUMENTS = [np.arange(1 + number % 17, dtype=np.int64) + number for number in range(300)]


def write(prefix: Path, vocab_size: int, documents: list[np.ndarray] = DOCUMENTS) -> Any:
    writer = SplitWriter(prefix, token_dtype(vocab_size), vocab_size)
    for number, ids in enumerate(documents):
        writer.add([ids[:3], ids[3:]], (number, number % 5, 10))
    return writer.finish()


@pytest.mark.parametrize("vocab_size", [1000, 65_499, 65_500, 150_000])
@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_files_equal_those_of_megatrons_builder(
    tmp_path: Path, vocab_size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    monkeypatch.setattr(shards, "BLOCK_TOKENS", block)
    monkeypatch.setattr(shards, "INDEX_BLOCK", block)
    written = write(tmp_path / "ours", vocab_size)
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for ids in DOCUMENTS:
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert (written.documents, written.tokens, written.bytes) == (300, sum(map(len, DOCUMENTS)), 3000)
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[number].tolist() for number in range(300)] == [ids.tolist() for ids in DOCUMENTS]
    assert [ids.tolist() for ids in read_documents(tmp_path / "ours")] == [ids.tolist() for ids in DOCUMENTS]
    assert read_document_info(tmp_path / "ours")["cluster"].tolist() == [number % 5 for number in range(300)]


def test_megatron_skips_documents_that_are_not_in_the_index(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write(tmp_path / "all", 1000)
    index, keep = Index.read(tmp_path / "all.idx"), np.arange(300) % 3 == 1
    (tmp_path / "some.bin").symlink_to("all.bin")
    write_index(tmp_path / "some.idx", index.dtype, index.lengths[keep], index.pointers[keep])
    dataset = IndexedDataset(str(tmp_path / "some"))
    assert [dataset[n].tolist() for n in range(len(dataset))] == [ids.tolist() for ids in DOCUMENTS[1::3]]


def test_ids_outside_the_vocabulary_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="returns token id 309, but the model's vocab_size is 300"):
        write(tmp_path / "a", 300)


def test_a_split_without_documents_has_no_files(tmp_path: Path) -> None:
    assert write(tmp_path / "a", 100, []).documents == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [0, 20, 34, 100, -1])
def test_a_damaged_index_is_rejected(tmp_path: Path, left: int) -> None:
    write(tmp_path / "a", 1000)
    path = tmp_path / "a.idx"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="not a Megatron index|truncated"):
        Index.read(path)


def test_the_first_of_two_equal_shards_is_kept(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "made_by").write_text(name)
        publish(tmp_path / name, tmp_path / "shard", {"by": name})
    assert (tmp_path / "shard" / "made_by").read_text() == "one"
    assert shards.read_manifest(tmp_path / "shard") == {"by": "one"}
    assert not (tmp_path / "two").exists()
    # A process that was presumed dead, and whose files were removed.
    publish(tmp_path / "gone", tmp_path / "shard", {"by": "gone"})
    assert shards.read_manifest(tmp_path / "shard") == {"by": "one"}
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]
