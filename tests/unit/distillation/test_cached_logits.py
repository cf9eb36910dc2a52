"""The format of cached logits: round trips, and rejection of truncated, damaged and foreign files."""

from __future__ import annotations

import os
import pickle
import signal as signals
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prune_distill.distillation import cached_logits
from prune_distill.distillation.cached_logits import (
    CachedLogits,
    CachedLogitsReader,
    Description,
    ShardWriter,
    shard_name,
)
from prune_distill.errors import InputError

SEQUENCES, SEQ_LENGTH, TOP_K, VOCAB = 7, 13, 5, 151_936
SHARD = 3
DESCRIPTION = Description(TOP_K, 2.0, VOCAB, SEQ_LENGTH, SEQUENCES, "0a1b2c3d")


def tokens(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, VOCAB, SEQ_LENGTH)


def exact(index: int, top_k: int = TOP_K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, log-probabilities and tails of some distributions, in fp64."""
    random = np.random.default_rng(1000 + index)
    logits = np.sort(4 * random.standard_normal((SEQ_LENGTH, 300)))[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = random.permuted(np.tile(np.arange(VOCAB - 300, VOCAB), (SEQ_LENGTH, 1)), axis=1)
    return ids[:, :top_k], logprobs[:, :top_k], np.log(np.exp(logprobs[:, top_k:]).sum(1))


def make_logits(index: int, top_k: int = TOP_K) -> CachedLogits:
    ids, logprobs, tail = exact(index, top_k)
    return CachedLogits(ids.astype(np.int32), logprobs.astype(np.float16), tail.astype(np.float32))


def write(folder: Path, shards: tuple[int, ...] = (0, 1, 2)) -> None:
    sizes = cached_logits.shard_sizes(SEQUENCES, SHARD)
    for number in shards:
        writer = ShardWriter(folder, number, number * SHARD)
        for index in range(number * SHARD, number * SHARD + sizes[number]):
            writer.add(cached_logits.encode(make_logits(index)), cached_logits.tokens_crc(tokens(index)))
        writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    cached_logits.write_index(tmp_path, DESCRIPTION, SHARD)
    return tmp_path


def test_sequences_are_read_in_any_order(folder: Path) -> None:
    reader = pickle.loads(pickle.dumps(CachedLogitsReader(folder)))  # as a data loader's worker may have it
    for index in (5, 0, 6, 2, 3, 1, 4):
        back = reader.read(index, tokens(index))
        for got, wanted in zip(back, make_logits(index), strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("top_k", [1, 64, 299])
def test_fp16_loses_at_most_a_thousandth_of_a_nat(top_k: int) -> None:
    ids, logprobs, tail = exact(0, top_k)
    back = cached_logits.decode(cached_logits.encode(make_logits(0, top_k)), SEQ_LENGTH, top_k)
    np.testing.assert_array_equal(back.ids, ids)
    # Half a unit of 11 bits, and half of the smallest step of fp16 near 0; the tail is rounded to 24 bits.
    np.testing.assert_allclose(back.logprobs, logprobs, rtol=2**-11, atol=2**-25)
    np.testing.assert_allclose(back.tail, tail, rtol=2**-24)
    # As in the KL divergence, weighted by the probabilities.
    assert (np.exp(logprobs) * np.abs(back.logprobs - logprobs)).sum(1).max() < 1e-3


def test_the_loss_of_cached_predictions() -> None:
    halves = CachedLogits(
        np.array([[3, 9], [4, 3]], np.int32),
        np.log(np.array([[0.5, 0.25], [0.5, 0.25]])).astype(np.float16),
        np.log(np.array([0.25, 0.25], np.float32)),
    )
    # The second of two top entries, and one of the eight others.
    loss = cached_logits.prediction_loss(halves, np.array([9, 7]), 10)
    assert loss == pytest.approx(-(np.log(0.25) + np.log(0.25 / 8)) / 2, abs=1e-3)  # fp16
    broken = halves._replace(logprobs=np.full((2, 2), np.nan, np.float16))
    assert np.isnan(cached_logits.prediction_loss(broken, np.array([9, 3]), 10))


def test_certainty_leaves_no_tail() -> None:
    certain = CachedLogits(
        np.array([[3, 9]], np.int32), np.array([[0.0, -np.inf]], np.float16), np.array([-np.inf], np.float32)
    )
    back = cached_logits.decode(cached_logits.encode(certain), 1, 2)
    for got, wanted in zip(back, certain, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("cut", ["all", "one byte", "the trailer"])
def test_a_truncated_shard_is_rejected_and_made_again(folder: Path, cut: str) -> None:
    shard = folder / shard_name(1)
    left = {"all": 0, "one byte": shard.stat().st_size - 1, "the trailer": shard.stat().st_size - 12}
    os.truncate(shard, left[cut])
    with pytest.raises(
        InputError, match=r"shard-000001.bin is truncated or damaged \(.*remove it and the manifest.json"
    ):
        CachedLogitsReader(folder).read(3, tokens(3))
    sizes = cached_logits.shard_sizes(SEQUENCES, SHARD)
    assert cached_logits.whole_shards(folder, sizes) == [0, 2]
    write(folder, (1,))
    assert cached_logits.whole_shards(folder, sizes) == [0, 1, 2]


def test_a_changed_byte_is_detected_on_read(folder: Path) -> None:
    shard = folder / shard_name(0)
    second = int(cached_logits.read_table(shard)["offset"][1])
    with shard.open("r+b") as file:
        file.seek(second + 7)
        byte = file.read(1)[0]
        file.seek(second + 7)
        file.write(bytes([byte ^ 1]))
    reader = CachedLogitsReader(folder)
    reader.read(0, tokens(0))
    with pytest.raises(InputError, match="the checksum of sequence 1 does not match"):
        reader.read(1, tokens(1))
    # A resumed stage makes that shard again.
    assert cached_logits.whole_shards(folder, cached_logits.shard_sizes(SEQUENCES, SHARD)) == [1, 2]


def test_shards_of_another_size_are_made_again(folder: Path) -> None:
    # The second of 4 + 3 sequences is as long as the second of 3 + 3 + 1, but begins elsewhere.
    assert cached_logits.whole_shards(folder, cached_logits.shard_sizes(SEQUENCES, 4)) == []
    assert list(folder.glob("shard-*")) == []


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / shard_name(2)).unlink()
    with pytest.raises(InputError, match=r"shard-000002.bin is truncated or damaged .*No such file"):
        CachedLogitsReader(folder).read(6, tokens(6))


def test_cached_logits_of_other_tokens_are_rejected(folder: Path) -> None:
    with pytest.raises(InputError, match="belong to other data: the tokens of sequence 4 differ"):
        CachedLogitsReader(folder).read(4, tokens(5))


def test_all_differences_are_named_at_once(folder: Path) -> None:
    reader = CachedLogitsReader(folder)
    reader.require(**vars(DESCRIPTION))
    with pytest.raises(InputError) as refused:
        reader.require(top_k=64, temperature=1.0, vocab_size=VOCAB, packing="ffffffff")
    message = str(refused.value)
    assert "top_k 5, not 64; temperature 2.0, not 1.0; packing 0a1b2c3d, not ffffffff" in message
    assert "distill.teacher_logits=live" in message


@pytest.mark.parametrize("content", [None, "", "{}", '{"format": 1, "shard_sequences": 3}'])
def test_a_folder_without_complete_cached_logits_is_rejected(folder: Path, content: str | None) -> None:
    (folder / cached_logits.INDEX).unlink()
    if content is not None:
        (folder / cached_logits.INDEX).write_text(content)
    with pytest.raises(InputError, match="holds no cached logits"):
        CachedLogitsReader(folder)


def test_another_format_is_rejected(folder: Path) -> None:
    index = folder / cached_logits.INDEX
    index.write_text(index.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="of format 2, and this version reads format 1"):
        CachedLogitsReader(folder)


def test_a_writer_that_is_killed_leaves_whole_shards_only(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.distillation import test_cached_logits as t;"
        "folder = Path(sys.argv[1]); t.write(folder, (0,)); writer = t.ShardWriter(folder, 1, 3);"
        "writer.add(t.cached_logits.encode(t.make_logits(3)), 0); writer.file.flush();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert killed.returncode == -signals.SIGKILL
    assert (tmp_path / f".partial.{shard_name(1)}").exists()
    sizes = cached_logits.shard_sizes(SEQUENCES, SHARD)
    assert cached_logits.whole_shards(tmp_path, sizes) == [0]
    write(tmp_path, (1, 2))
    cached_logits.write_index(tmp_path, DESCRIPTION, SHARD)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [cached_logits.INDEX, *map(shard_name, range(3))]


def test_the_packing_is_detected_from_a_sample() -> None:
    digest = cached_logits.packing_digest(tokens, 100)
    assert digest == cached_logits.packing_digest(tokens, 100)
    for changed in (0, 99):
        assert digest != cached_logits.packing_digest(
            lambda index, of=changed: tokens(7 if index == of else index), 100
        )
    assert digest != cached_logits.packing_digest(tokens, 101)
    assert len(cached_logits.packing_digest(tokens, 1)) == 8
