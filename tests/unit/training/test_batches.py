"""The sequences of a step, their documents, and the batch sizes for Megatron."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prune_distill.errors import InputError
from prune_distill.nemo import backend

backend.activate()

from megatron.core import num_microbatches_calculator, parallel_state  # noqa: E402

from prune_distill.schema import Packing, Phase, Training  # noqa: E402
from prune_distill.training import batches as module  # noqa: E402
from prune_distill.training.batches import Batches, ConcatenatedDatasets, MicroBatches, UsePhase  # noqa: E402
from tests.helpers.one_rank import TOKENIZER, one_rank, write_data  # noqa: E402

# 3 steps of 4 sequences of 8 tokens, then 2 steps of 2 sequences of 4.
PHASES = [Phase(max_steps=3), Phase(max_steps=2, seq_length=4, global_batch_size=2, micro_batch_size=1)]
CFG = Training(
    max_steps=5,
    seq_length=8,
    global_batch_size=4,
    micro_batch_size=2,
    lr=1.0,
    min_lr=0.1,
    phases=PHASES,
    num_workers=0,
    val_batches=1,
)
# Every document has a unique id, from 1, and ends with 0.
LENGTHS = {"a": [5, 9, 20, 7], "b": [11, 6, 30]}
IDS = {"a": range(1, 5), "b": range(11, 14)}
DOCUMENTS = {
    source: [[number] * (length - 1) + [0] for number, length in zip(IDS[source], lengths, strict=True)]
    for source, lengths in LENGTHS.items()
}
# Index of each document among both sources, by id.
NUMBERS = {number: place for place, number in enumerate([*IDS["a"], *IDS["b"]])}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    return make(tmp_path)


def make(folder: Path, cfg: Training = CFG, shares: tuple[float, float] = (40.0, 47.0)) -> Batches:
    data = write_data(folder, DOCUMENTS, [[20] * 30 + [0]] * 4, weights=dict(zip("ab", shares, strict=True)))
    made = Batches(TOKENIZER, data, folder, cfg, 7)
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        max_steps=cfg.max_steps, val_check_interval=1, limit_val_batches=1, limit_test_batches=0, global_step=0
    )
    return made


def test_a_step_takes_the_next_sequences_of_its_phase(batches: Batches) -> None:
    assert batches.places(0) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert batches.places(2) == [(0, 8), (0, 9), (0, 10), (0, 11)]
    assert batches.places(3) == [(1, 0), (1, 1)]
    assert batches.places(4) == [(1, 2), (1, 3)]


def test_a_skipped_step_takes_a_batch_that_no_other_step_takes(tmp_path: Path) -> None:
    batches = make(tmp_path, dataclasses.replace(CFG, skip_steps=[[2, 2], [5, 5], [2, 3]]))
    assert batches.places(0) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert batches.places(1) == [(2, 4), (2, 5), (2, 6), (2, 7)]  # skipped twice: the second spare batch
    assert batches.places(2) == [(2, 8), (2, 9), (2, 10), (2, 11)]
    assert batches.places(3) == [(1, 0), (1, 1)]
    assert batches.places(4) == [(3, 0), (3, 1)]
    batches.setup()
    assert [len(dataset) >= wanted for dataset, wanted in zip(batches.datasets, (12, 4, 12, 2), strict=True)] == [
        True
    ] * 4
    none = make(tmp_path / "none", dataclasses.replace(CFG, skip_steps=[[1, 1]]))
    none.setup()
    assert [dataset is None for dataset in none.datasets] == [False, False, False, True]


def test_the_documents_of_a_step_are_those_of_its_tokens(batches: Batches) -> None:
    batches.setup()
    seen = set()
    for step in range(5):
        items = [ConcatenatedDatasets(batches.datasets)[place] for place in batches.places(step)]
        length = 8 if step < 3 else 4
        assert all(item["tokens"].shape == (length,) for item in items)
        ids = {int(number) for item in items for number in (*item["tokens"], item["labels"][-1])} - {0}
        documents = batches.documents(step)
        assert documents == sorted(documents)
        # If a batch only has the end of a document, its id does not occur.
        assert {NUMBERS[number] for number in ids} <= set(documents)
        assert len(documents) <= len(ids) + 4
        seen |= set(documents)
    assert seen >= {4, 5, 6}  # of the second source, after the four of the first


def test_phases_have_their_own_data_order(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, phases=[Phase(max_steps=3), Phase(max_steps=2)])
    batches = make(tmp_path, cfg)
    first, second = batches.sequences(0), batches.sequences(1)
    assert any(not torch.equal(first[n]["tokens"], second[n]["tokens"]) for n in range(8))
    again = make(tmp_path / "again", cfg).sequences(1)
    assert all(torch.equal(second[n]["tokens"], again[n]["tokens"]) for n in range(8))


def test_a_phases_weights_choose_its_sources(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, phases=[Phase(max_steps=2, weights={"b": 1.0}), Phase(max_steps=3)])
    batches = make(tmp_path, cfg)
    only = batches.sequences(0)
    ids = {int(token) for n in range(8) for token in only[n]["tokens"]}
    assert ids - {0} <= {11, 12, 13}


@pytest.mark.parametrize(("rank", "expected"), [(0, [[0], [2], [0], [2]]), (1, [[1], [3], [1], [3]])])
def test_micro_batches_are_interleaved_over_ranks(
    batches: Batches, monkeypatch: pytest.MonkeyPatch, rank: int, expected: list[list[int]]
) -> None:
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: rank)
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 2)
    batches.phases = [dataclasses.replace(phase, micro_batch_size=1) for phase in batches.phases]
    micro = MicroBatches(batches, first_step=0)
    assert len(micro) == 3 * 2 + 2 * 1
    places = list(micro)
    assert len(places) == len(micro)
    assert places[:2] == [[(0, n)] for (n,) in expected[:2]]
    assert places[2] == [(0, 4 + rank)]
    assert places[6:] == [[(1, rank)], [(1, 2 + rank)]]


def test_a_resumed_training_continues_at_its_step(batches: Batches) -> None:
    micro = MicroBatches(batches, first_step=2)
    assert list(micro) == [[(0, 8), (0, 9)], [(0, 10), (0, 11)], [(1, 0)], [(1, 1)], [(1, 2)], [(1, 3)]]
    assert len(micro) == 3 * 2 + 2 * 2  # with those before it


def test_the_loader_follows_the_positions(batches: Batches) -> None:
    batches.setup()
    batches.trainer.global_step = 2
    first = next(iter(batches.train_dataloader()))
    columns = first[0] if isinstance(first, (tuple, list)) else first
    for row, place in zip(columns["tokens"], batches.places(2), strict=False):
        assert torch.equal(row, ConcatenatedDatasets(batches.datasets)[place]["tokens"])
    assert columns["tokens"].shape == (2, 8)


def test_the_first_validation_batch(batches: Batches) -> None:
    batches.setup()
    found = batches.first_validation()
    assert set(found) == {"tokens", "labels"}
    assert found["tokens"].shape == (2, 8)
    assert torch.equal(found["tokens"][:, 1:], found["labels"][:, :-1])
    assert set(found["tokens"].flatten().tolist()) <= {20, 0}


def test_a_checkpoint_records_the_position_in_the_data(batches: Batches) -> None:
    batches.trainer.global_step = 4
    state = batches.state_dict()
    assert state == {"consumed_samples": 3 * 4 + 2, "sizes": [[3, 8, 4], [2, 4, 2]]}
    batches.load_state_dict(state)
    with pytest.raises(InputError, match="checkpoints"):
        batches.load_state_dict({**state, "sizes": [[3, 8, 4], [2, 4, 1]]})


def test_the_sizes_of_each_step(batches: Batches) -> None:
    sampler, use = batches.data_sampler, UsePhase(batches)
    calculated = lambda: num_microbatches_calculator.get_num_microbatches()  # noqa: E731
    trainer = SimpleNamespace(global_step=3)
    use.on_train_batch_start(trainer, None, None, 0)
    assert (sampler.seq_len, sampler.micro_batch_size, sampler.global_batch_size) == (4, 1, 2)
    assert calculated() == 2
    use.on_validation_start(trainer, None)
    assert (sampler.seq_len, sampler.micro_batch_size, sampler.global_batch_size) == (8, 2, 4)
    assert calculated() == 2
    use.on_train_batch_start(SimpleNamespace(global_step=2), None, None, 0)
    assert (sampler.seq_len, sampler.micro_batch_size, sampler.global_batch_size) == (8, 2, 4)


@pytest.mark.parametrize(("step", "last"), [(4, False), (5, True), (6, True)])
def test_lightning_gets_the_last_batch(batches: Batches, step: int, last: bool) -> None:
    progress = SimpleNamespace(is_last_batch=False)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    UsePhase(batches).on_train_batch_end(SimpleNamespace(global_step=step, fit_loop=loop), None, None, None, 0)
    assert progress.is_last_batch is last


def test_sequences_taken_so_far(batches: Batches) -> None:
    batches.data_sampler.trainer = SimpleNamespace(global_step=4)
    assert batches.data_sampler.compute_consumed_samples() == 14


def test_learned_tokens_of_a_step(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.zeros(2, 8), torch.zeros(2, 8)
    first[0, 2:5], second[:, 1] = 1, 1
    micro_batches = [{"loss_mask": first}, ({"loss_mask": second}, 0, 0)]
    assert module._count_unmasked(micro_batches) == 5.0


@dataclasses.dataclass(frozen=True)
class Step:
    """The attributes of NeMo's step that the sampler reads."""

    data: Any
    num_microbatches: int = 2
    forward_only: bool = False


def test_a_loss_is_divided_by_the_learned_tokens_of_its_step(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, reduction = batches.data_sampler, SimpleNamespace(learned=-1.0)
    sampler.trainer = SimpleNamespace(lightning_module=SimpleNamespace(training_loss_reduction=reduction))
    monkeypatch.setattr(module.MegatronDataSampler, "on_megatron_step_start", lambda _, step: step)
    # Without masks every token of a micro batch is learned.
    sampler.on_megatron_step_start(Step(iter([])))
    assert reduction.learned == 2 * 8
    monkeypatch.setattr(type(batches.data), "masked", True)
    mask = torch.zeros(2, 8)
    mask[0, :5] = 1
    given = [{"loss_mask": mask}, {"loss_mask": mask[:, :3]}]
    step = sampler.on_megatron_step_start(Step(iter(given)))
    assert reduction.learned == (5 + 3) / 2
    assert list(step.data) == given  # read ahead, and still returned
    sampler.on_megatron_step_start(Step(iter([{"loss_mask": 0 * mask}] * 2)))
    assert reduction.learned == 1.0
    reduction.learned = -1.0
    sampler.on_megatron_step_start(Step(iter([]), forward_only=True))
    assert reduction.learned == -1.0


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("shares", [(40.0, 47.0), (3.0, 1.0)])
def test_the_source_of_each_sequence(tmp_path: Path, packing: Packing, shares: tuple[float, float]) -> None:
    """The ids of the two sources are different ones, so that a sequence shows where it is from."""
    cfg = dataclasses.replace(CFG, max_steps=20, phases=None, packing=packing, micro_batch_size=1)
    batches = make(tmp_path, cfg, shares)
    dataset = batches.sequences(0)
    names, parts = batches.sources(dataset, 0)
    assert names == ["a", "b"]
    assert parts.shape == (80,)
    assert 0 < np.count_nonzero(parts) < 80
    for number, part in enumerate(parts):
        ids = set(dataset[number]["tokens"].tolist()) - {0}
        assert ids <= set(IDS[names[part]]), number


@pytest.mark.parametrize("packing", Packing)
def test_a_single_part_is_the_source_of_all_sequences(tmp_path: Path, packing: Packing) -> None:
    cfg = dataclasses.replace(CFG, phases=None, packing=packing, micro_batch_size=1)
    data = write_data(tmp_path, {"a": DOCUMENTS["a"]}, [[20] * 30 + [0]] * 4)
    batches = Batches(TOKENIZER, data, tmp_path, cfg, 7)
    names, parts = batches.sources(batches.sequences(0), 0)
    assert (names, parts.tolist()) == (["a"], [0] * 20)
