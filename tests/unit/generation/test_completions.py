"""Completions as training data: rows of whole completions, and masks of what is learned."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from prune_distill.config.values import OFF_POLICY, ON_POLICY
from prune_distill.data.folder import DataFolder, read_training_data
from prune_distill.data.shards import read_documents
from prune_distill.data.tokenizer import TokenizerSpec
from prune_distill.generation.completions import (
    Completed,
    count,
    pack,
    read_shard,
    sample_seed,
    summarize,
    write_data,
    write_shard,
)
from prune_distill.generation.engines import Completion, Request
from prune_distill.nemo import backend
from prune_distill.pipeline.artifact import write_json
from prune_distill.schema import Phase, Training

backend.activate()

from prune_distill.training.batches import Batches  # noqa: E402
from tests.helpers.one_rank import TOKENIZER, VOCABULARY, one_rank  # noqa: E402
from tests.helpers.one_rank import write_data as write_documents  # noqa: E402

EOD, STOP, LENGTH = 0, 9, 8
ENDED = Completed([1, 2], [3, EOD], ended=True)
CUT = Completed([4], [5, 6], ended=False)
OTHER_STOP = Completed([7], [STOP], ended=True)


def test_rows_hold_whole_completions_of_which_the_prompt_and_the_padding_are_not_learned() -> None:
    rows = [(row.tolist(), mask.tolist()) for row, mask in pack([ENDED, CUT, OTHER_STOP], LENGTH, EOD)]
    assert rows == [
        # The end of a completion that was cut off is not learned.
        ([1, 2, 3, EOD, 4, 5, 6, EOD], [0, 0, 1, 1, 0, 1, 1, 0]),
        # A stop token that ends no documents is followed by the one that does.
        ([7, STOP, EOD, EOD, EOD, EOD, EOD, EOD], [0, 1, 0, 0, 0, 0, 0, 0]),
    ]


def test_a_completion_that_does_not_fit_begins_a_row() -> None:
    long = Completed([1] * 4, [2] * 3, ended=False)
    rows = [row.tolist() for row, _ in pack([CUT, long, CUT], LENGTH, EOD)]
    assert rows == [[4, 5, 6, *[EOD] * 5], [1, 1, 1, 1, 2, 2, 2, EOD], [4, 5, 6, *[EOD] * 5]]


def test_the_summary_counts_what_ended_at_once_and_what_was_cut_off() -> None:
    counts: Counter[str] = Counter()
    assert list(count([ENDED, CUT, OTHER_STOP], counts)) == [ENDED, CUT, OTHER_STOP]
    assert summarize(counts, 16) == {
        "completions": 3,
        "empty": 1,
        "truncated": 1,
        "completion_tokens": 5,
        "prompt_tokens": 4,
        "tokens": 16,
        "padding_share": round(1 - 9 / 16, 4),
    }


class Echo:
    """Completes a prompt with its seed, as far as the vocabulary goes."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        self.requests += requests
        return [Completion([request.seed % VOCABULARY, EOD], True) for request in requests]

    def close(self) -> None: ...


def test_seeds_follow_from_the_prompt_and_the_sample_alone(tmp_path: Path) -> None:
    engine, prompts = Echo(), [[1], [2], [3], [4]]
    assert write_shard(tmp_path / "whole", engine, prompts, first=0, samples=2, seed=5) == 16
    assert write_shard(tmp_path / "end", engine, prompts[2:], first=2, samples=2, seed=5) == 8
    assert read_shard(tmp_path / "whole")[4:] == read_shard(tmp_path / "end")
    assert len({request.seed for request in engine.requests}) == 8
    assert sample_seed(5, 0, 1) != sample_seed(5, 1, 0) != sample_seed(6, 1, 0)


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    """A data folder of completions in two shards."""
    folder, tokenizer = tmp_path / "completions", TokenizerSpec("t", None, EOD, VOCABULARY, False)
    folder.mkdir()
    shards = [folder / "0.jsonl", folder / "1.jsonl"]
    for shard, completed in zip(shards, ([ENDED, CUT], [OTHER_STOP]), strict=True):
        shard.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in completed))
    write_data(shards, folder, tokenizer, LENGTH)
    return folder


def test_the_folder_of_completions_is_one_of_prepared_data(completions: Path) -> None:
    folder = DataFolder.read(completions)
    assert (folder.train_documents, folder.train_tokens, folder.masked) == (2, 16, True)
    assert [len(row) for row in read_documents(completions / "train")] == [LENGTH, LENGTH]
    masks = np.stack(list(read_documents(completions / "train_mask")))
    assert int(masks.sum()) == 5
    assert sorted(path.name for path in completions.iterdir() if path.suffix != ".jsonl") == [
        *("data.json", "train.bin", "train.idx", "train_mask.bin", "train_mask.idx")
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared data of two sources, whose weights are 2 and 1."""
    documents = {"web": [[11] * 20] * 2, "code": [[12] * 20]}
    own = write_documents(tmp_path / "data", documents, [[13] * 20], weights={"web": 2.0, "code": 1.0})
    validation = {"documents": 1, "tokens": own.validation_tokens, "bytes": own.validation_bytes}
    content = {"vocab_size": VOCABULARY, "eod_token": EOD, "train": own.train, "validation": validation}
    write_json(own.folder / "data.json", {**content, "sources": own.sources, "lines": {}})
    return own.folder


@pytest.mark.parametrize(("mix", "weights"), [(0.25, {"web": 0.5, "code": 0.25, "train": 0.25}), (1.0, {"train": 1.0})])
def test_completions_are_mixed_by_their_share(
    data: Path, completions: Path, mix: float, weights: dict[str, float]
) -> None:
    joined = read_training_data(data, completions)
    mixed = joined.weighted({OFF_POLICY: 1 - mix, ON_POLICY: mix})
    found = {Path(part["prefix"]).name.removeprefix("train-"): part["weight"] for part in mixed.train}
    assert found == pytest.approx(weights)
    assert joined.validation_paths == [str(data / "validation")]
    assert set(read_training_data(data, None).sources) == {"web", "code"}


def test_megatrons_sequences_are_the_rows(data: Path, completions: Path, tmp_path: Path) -> None:
    """Of 20 sequences a quarter are rows, each with the mask of the tokens that follow its tokens."""
    phase = Phase(max_steps=5, weights={OFF_POLICY: 0.75, ON_POLICY: 0.25})
    sizes = {"max_steps": 5, "seq_length": LENGTH, "global_batch_size": 4}
    cfg = Training(**sizes, lr=1.0, min_lr=0.0, num_workers=0, phases=[phase])
    with one_rank():
        sequences = Batches(TOKENIZER, read_training_data(data, completions), tmp_path, cfg, 7).sequences(0)
        items = [sequences[number] for number in range(20)]
    rows = {tuple(row.tolist()): mask.tolist() for row, mask in pack([ENDED, CUT, OTHER_STOP], LENGTH, EOD)}
    found = [item for item in items if tuple(item["tokens"].tolist()) in rows]
    assert len(found) == 5
    for item in found:
        mask = rows[tuple(item["tokens"].tolist())]
        assert item["loss_mask"].tolist() == [*mask[1:], 0]
    others = [item for item in items if not any(item is one for one in found)]
    assert all(bool(item["loss_mask"].all()) for item in others)
    assert {int(token) for item in others for token in item["tokens"]} == {11, 12}
