"""Cached logits of the teacher through the real command line: layouts, resume, and batches."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prune_distill.distillation.cached_logits import CachedLogitsReader, read_table, shard_name
from prune_distill.pipeline.artifact import read_manifest, read_state
from prune_distill.pipeline.metrics_file import read_metrics
from tests.helpers import corruption, tiny
from tests.helpers.ranks import run_ranks

TOP_K, SHARD = 16, 5
SEQUENCES = tiny.DISTILL["max_steps"] * tiny.DISTILL["global_batch_size"]
STORED = (
    *tiny.DEPTH,
    *(
        "distill.teacher_logits=cached",
        f"distill.cached_logits_top_k={TOP_K}",
        f"distill.cached_logits_shard_sequences={SHARD}",
    ),
    "distill.kd.temperature=2",
)
TWO_RANKS = "cluster.devices_per_node=2"
LAYOUTS = {
    "dp2": (TWO_RANKS,),
    "tp2": (TWO_RANKS, "distill.parallel.tensor_model_parallel_size=2"),
    # Micro batches of 2 do not divide a shard of 5.
    "pp2": (TWO_RANKS, "distill.parallel.pipeline_model_parallel_size=2", "distill.micro_batch_size=2"),
    # Context parallelism of the distillation becomes more replicas of the teacher.
    "cp2": (TWO_RANKS, "distill.parallel.context_parallel_size=2"),
}
# Sums in another order in fp32 move a log-probability by less than a step of fp16, which is 2^-8 between -8 and -4
# and less above: it may be rounded to the other side.
ONE_STEP = 2**-8


@pytest.fixture(scope="module")
def one_rank(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with cached logits from one rank."""
    run_dir = tiny.copy_run(finished, tmp_path_factory.mktemp("cached_logits") / "run")
    tiny.launch(run_dir, *STORED, "--until", "cache_logits")
    return run_dir


def folder_of(run_dir: Path) -> Path:
    return tiny.stages(run_dir, *STORED)["cache_logits"].folder


def read(folder: Path, tokens: np.ndarray) -> list[np.ndarray]:
    """Return ids, log-probabilities and tails of all sequences."""
    reader = CachedLogitsReader(folder)
    signals = [reader.read(index, tokens[index]) for index in range(SEQUENCES)]
    return [np.stack(parts) for parts in zip(*signals, strict=True)]


@pytest.fixture(scope="module")
def tokens(one_rank: Path) -> np.ndarray:
    """The sequences that distillation reads, `[SEQUENCES, s]`, as Megatron builds them in a process of their own."""
    located = tiny.stages(one_rank, *STORED)["distill"]
    (found,) = run_ranks(training_tokens, 1, located.inputs["data"], located.folder.parent / "tokens", located.cfg)
    return np.array(found)


def training_tokens(data: Path, out: Path, cfg: Any) -> Any:
    from prune_distill.nemo import backend

    backend.activate()
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    from prune_distill.data.folder import DataFolder

    class Tokenizer:
        pad, eod, unique_identifiers = 0, 0, {"class": "none"}

    folder = DataFolder.read(data)
    settings = GPTDatasetConfig(
        random_seed=cfg.seed,
        sequence_length=cfg.distill.seq_length,
        blend_per_split=[get_blend_from_list(folder.train_paths), None, None],
        tokenizer=Tokenizer(),
        path_to_cache=str(out),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    from prune_distill.nemo.datasets import DocumentDataset

    sizes = [SEQUENCES, 0, 0]
    train, *_ = BlendedMegatronDatasetBuilder(DocumentDataset, sizes, lambda: True, settings).build()
    return [train[index]["tokens"].tolist() for index in range(SEQUENCES)]


def test_damaged_cached_logits_are_rejected(one_rank: Path, tmp_path: Path) -> None:
    tried, silent = corruption.find_silent_uses(tiny.stages(one_rank, *STORED), tmp_path / "aside", ["cache_logits"])
    assert silent == []
    assert tried >= 20


def test_cached_logits_match_transformers(one_rank: Path, tokens: np.ndarray) -> None:
    from transformers import AutoModelForCausalLM

    ids, logprobs, tail = read(folder_of(one_rank), tokens)
    teacher = AutoModelForCausalLM.from_pretrained(
        tiny.stages(one_rank, *STORED)["demo_model"].folder / "hf", dtype=torch.float32
    )
    with torch.no_grad():
        exact = torch.log_softmax(teacher(torch.from_numpy(tokens)).logits.double() / 2, -1)
    best = exact.topk(TOP_K, -1)
    np.testing.assert_allclose(logprobs, best.values, atol=ONE_STEP)
    at_ids = exact.gather(-1, torch.from_numpy(ids).long())
    # Tokens of equal probability in fp32 may be swapped.
    np.testing.assert_allclose(at_ids, best.values, atol=1e-4)
    np.testing.assert_allclose(tail, torch.log1p(-best.values.exp().sum(-1)), atol=1e-4)
    metrics = (read_manifest(folder_of(one_rank)) or {})["metrics"]
    shards = [folder_of(one_rank) / shard_name(number) for number in range(5)]
    assert metrics["sequences"] == SEQUENCES
    assert metrics["bytes"] == sum(shard.stat().st_size for shard in shards)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match_one_rank(
    finished: Path, one_rank: Path, tokens: np.ndarray, tmp_path: Path, layout: str
) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    tiny.launch(run_dir, *STORED, *LAYOUTS[layout], "--until", "cache_logits")
    (ids, logprobs, tail), (own_ids, own_logprobs, own_tail) = (
        read(folder_of(folder), tokens) for folder in (run_dir, one_rank)
    )
    np.testing.assert_allclose(logprobs, own_logprobs, atol=ONE_STEP)
    np.testing.assert_allclose(tail, own_tail, atol=1e-4)
    # Tokens of equal probability in fp32 may be swapped.
    assert (ids == own_ids).mean() > 0.999


def test_a_stage_resumes_with_the_missing_shards(one_rank: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-a", one_rank, run_dir], check=True)
    folder = folder_of(run_dir)
    before = read(folder, tokens)
    (folder / "manifest.json").unlink()
    (folder / "cached_logits.json").unlink()
    (folder / shard_name(3)).unlink()
    os.truncate(folder / shard_name(1), 1000)
    kept = {number: (folder / shard_name(number)).stat().st_mtime_ns for number in (0, 2, 4)}
    (folder / f".partial.{shard_name(3)}").write_bytes(b"half")
    tiny.launch(run_dir, *STORED, "--until", "cache_logits")
    assert {number: (folder / shard_name(number)).stat().st_mtime_ns for number in kept} == kept
    assert not list(folder.glob(".partial.*"))
    for again, was in zip(read(folder, tokens), before, strict=True):
        np.testing.assert_array_equal(again, was)


def test_a_paused_stage_keeps_complete_shards_and_resumes(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    folder = folder_of(run_dir)
    folder.mkdir()
    command, pipe = tiny.command(run_dir, *STORED, "--until", "cache_logits"), subprocess.PIPE
    launcher = subprocess.Popen(command, env=tiny.environment(), stdout=pipe, stderr=pipe, text=True)
    tiny.wait_for("log.txt", folder, launcher)
    (folder / "stop").touch()
    _, message = launcher.communicate(timeout=600)
    assert f"stage cache_logits is paused at step {SHARD}; run the same command to resume it" in message
    assert read_state(folder) == {"state": "paused", "step": SHARD}
    assert [path.name for path in folder.glob("shard-*")] == [shard_name(0)]
    assert not (folder / "cached_logits.json").exists()
    tiny.launch(run_dir, *STORED, "--until", "cache_logits")
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    assert steps == [5, 10, 15, 20, 24]
    assert read_state(folder) == {"state": "done", "step": SEQUENCES}


def test_every_table_row_records_its_sequence(one_rank: Path) -> None:
    rows = [read_table(folder_of(one_rank) / shard_name(number))["sequence"] for number in range(5)]
    assert np.concatenate(rows).tolist() == list(range(SEQUENCES))
    assert json.loads((folder_of(one_rank) / "cached_logits.json").read_text())["temperature"] == 2


def test_context_parallel_ranks_share_the_columns_of_a_batch() -> None:
    for rank, (shape, ids, tail) in enumerate(run_ranks(cut_batch, 2)):
        mine = [0, 1, 6, 7] if rank == 0 else [2, 3, 4, 5]  # the first and the last of four pieces, or the middle ones
        assert shape == (3, 4, 2)
        assert ids == [[16 * batch + 2 * place for place in mine] for batch in range(3)]
        assert tail == [[8.0 * batch + place for place in mine] for batch in range(3)]


def cut_batch() -> Any:
    """Return the part of a rank with CP 2 of a batch of 3 sequences of 8 tokens, k = 2."""
    from prune_distill.nemo import backend

    backend.activate()
    from megatron.core import parallel_state

    from prune_distill.distillation.cached_logits_batch import data_step

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    counted = torch.arange(3 * 8 * 2).view(3, 8, 2)
    plain = {name: torch.zeros(3, 8) for name in ("tokens", "labels", "loss_mask", "position_ids")}
    cached_logits = {
        "cached_ids": counted.int(),
        "cached_logprobs": -counted.half(),
        "cached_tail": torch.arange(3 * 8.0).view(3, 8),
    }
    batch = data_step(iter([{**plain, **cached_logits}]))
    assert batch["labels"].shape == (3, 4)
    return (
        tuple(batch["cached_ids"].shape),
        batch["cached_ids"][..., 0].tolist(),
        batch["cached_tail"].tolist(),
    )
