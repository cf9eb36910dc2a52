"""Cached logits as columns of a batch, from a folder to the last pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prune_distill.errors import InputError
from prune_distill.nemo import backend

backend.activate()

from prune_distill.distillation import cached_logits_batch  # noqa: E402
from prune_distill.distillation.cached_logits import (  # noqa: E402
    CachedLogits,
    CachedLogitsReader,
    Description,
    ShardWriter,
    encode,
    packing_digest,
    tokens_crc,
    write_index,
)
from prune_distill.distillation.loss_terms import TopK  # noqa: E402
from prune_distill.distillation.teacher_forward import compute_top_k  # noqa: E402
from tests.helpers.one_rank import VOCABULARY, core_model, one_rank, positions  # noqa: E402

SEQUENCES, LENGTH, TOP_K = 5, 6, 3
ONE_SOURCE = cached_logits_batch.SequenceSources(["train"], np.zeros(SEQUENCES, dtype=np.int16))


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


def tokens(index: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))


class Sequences:
    def __len__(self) -> int:
        return SEQUENCES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": tokens(index), "labels": tokens(index) + 1}


def signal(index: int) -> CachedLogits:
    ids = np.tile(np.arange(TOP_K, dtype=np.int32) + index, (LENGTH, 1))
    logprobs = np.log(np.tile([0.5, 0.25, 0.125], (LENGTH, 1))).astype(np.float16)
    return CachedLogits(ids, logprobs, np.full(LENGTH, np.log(0.125), np.float32))


def write(folder: Path, numbers: list[int]) -> CachedLogitsReader:
    """The cache of some sequences."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, 0, 0)
    for index in numbers:
        writer.add(encode(signal(index)), tokens_crc(tokens(index).numpy()))
    writer.close()
    packing = packing_digest(lambda place: tokens(numbers[place]).numpy(), len(numbers))
    write_index(folder, Description(TOP_K, 1.0, VOCABULARY, LENGTH, len(numbers), packing), SEQUENCES)
    return CachedLogitsReader(folder)


@pytest.fixture
def reader(tmp_path: Path) -> CachedLogitsReader:
    return write(tmp_path, list(range(SEQUENCES)))


def attach(sequences: Any, reader: CachedLogitsReader, length: int = LENGTH, count: int = SEQUENCES) -> Any:
    sources = ONE_SOURCE._replace(parts=ONE_SOURCE.parts[:count])
    return cached_logits_batch.attach_cached_logits(
        sequences, cached_logits_batch.TeacherCaches([reader]), length, sources
    )


def test_a_sequence_has_the_columns_of_its_own(reader: CachedLogitsReader) -> None:
    dataset = attach(Sequences(), reader)
    assert len(dataset) == SEQUENCES
    for index in (3, 0):
        item = dataset[index]
        assert torch.equal(item["tokens"], tokens(index))
        assert torch.equal(item["labels"], tokens(index) + 1)
        for name, expected in zip(("ids", "logprobs", "tail"), signal(index), strict=True):
            np.testing.assert_array_equal(item[f"cached_{name}"].numpy(), expected)


@pytest.mark.parametrize(
    ("length", "count", "named"), [(LENGTH + 1, SEQUENCES, "seq_length"), (LENGTH, 4, "sequences")]
)
def test_cached_logits_of_another_training_are_rejected(
    reader: CachedLogitsReader, length: int, count: int, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        attach(Sequences(), reader, length, count)


def test_other_sequences_are_detected_before_reading(reader: CachedLogitsReader) -> None:
    class Other(Sequences):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return super().__getitem__((index + 1) % SEQUENCES)

    with pytest.raises(InputError, match="packing"):
        attach(Other(), reader)


def test_each_sequence_has_the_logits_of_its_sources_teacher(tmp_path: Path) -> None:
    parts = np.array([2, 0, 1, 2, 0], dtype=np.int16)  # web, code and web again
    sources = cached_logits_batch.SequenceSources(["code", "web", "web"], parts)
    readers = [write(tmp_path / "web", [0, 2, 3]), write(tmp_path / "code", [1, 4])]
    caches = cached_logits_batch.TeacherCaches(readers, {"web": 0, "code": 1})
    dataset = cached_logits_batch.attach_cached_logits(Sequences(), caches, LENGTH, sources)
    for index in range(SEQUENCES):
        np.testing.assert_array_equal(dataset[index]["cached_ids"].numpy(), signal(index).ids)
    swapped = cached_logits_batch.TeacherCaches(readers[::-1], {"web": 0, "code": 1})
    with pytest.raises(InputError, match="sequences 2, not 3"):
        cached_logits_batch.attach_cached_logits(Sequences(), swapped, LENGTH, sources)


def test_only_the_last_pipeline_stage_reads_cached_logits(
    reader: CachedLogitsReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_logits_batch.parallel_state, "is_pipeline_last_stage", lambda: False)
    sequences = Sequences()
    assert attach(sequences, reader) is sequences


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_keeps_the_columns_and_what_nemo_keeps(reader: CachedLogitsReader, wrapped: bool) -> None:
    dataset = attach(Sequences(), reader)
    items = [dataset[0], dataset[1]]
    batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    batch |= {"loss_mask": torch.ones(2, LENGTH), "position_ids": positions(batch["tokens"])}
    given = iter([(batch, 0, 0) if wrapped else batch])
    step = cached_logits_batch.data_step(given)
    for name in batch:
        assert torch.equal(step[name], batch[name]), name


def test_a_step_without_cached_logits_has_no_columns() -> None:
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    batch = {"tokens": ids, "labels": ids, "loss_mask": torch.ones(2, LENGTH), "position_ids": ids}
    assert not set(cached_logits_batch.COLUMNS) & set(cached_logits_batch.data_step(iter([batch])))


def test_the_teachers_top_k_of_each_sequence_in_order() -> None:
    model = core_model(seed=4)
    sequences = [tokens(index) for index in range(SEQUENCES)]
    found: list[TopK] = []
    compute_top_k(model.train(), sequences, micro_batch_size=2, top_k=4, temperature=2.0, receive=found.append)
    assert len(found) == SEQUENCES  # the third micro batch is padded
    for ids, top in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = model(ids[None], positions(ids[None]), None)[0]
        log_probs, expected = (logits / 2.0).log_softmax(-1).topk(4, -1)
        assert torch.equal(top.ids, expected)
        torch.testing.assert_close(top.log_probs, log_probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(top.tail, torch.log1p(-log_probs.exp().sum(-1)), rtol=1e-4, atol=1e-4)


def test_the_teachers_top_k_is_of_the_ids_that_the_student_has() -> None:
    model, (ids,) = core_model(seed=4), [tokens(0)]
    found: list[TopK] = []
    compute_top_k(model, [ids], micro_batch_size=1, top_k=4, temperature=2.0, receive=found.append, shared=20)
    (top,) = found
    with torch.no_grad():
        logits = model(ids[None], positions(ids[None]), None)[0, :, :20]
    log_probs, expected = (logits / 2.0).log_softmax(-1).topk(4, -1)
    assert torch.equal(top.ids, expected)
    torch.testing.assert_close(top.log_probs, log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(top.tail, torch.log1p(-log_probs.exp().sum(-1)), rtol=1e-4, atol=1e-4)


def test_chunks_of_teacher_logits_are_concatenated(monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_distill.distillation import teacher_forward

    model, (ids,) = core_model(seed=4), [tokens(0)]
    whole: list[TopK] = []
    for chunk in (4, 256):
        monkeypatch.setattr(teacher_forward, "CHUNK_TOKENS", chunk)
        compute_top_k(model, [ids], micro_batch_size=1, top_k=2, temperature=1.0, receive=whole.append)
    assert whole[0].ids.shape == (LENGTH, 2)
    assert torch.equal(whole[0].ids, whole[1].ids)
    torch.testing.assert_close(whole[0].tail, whole[1].tail)
