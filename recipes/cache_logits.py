"""torchrun --nproc_per_node 8 -m recipes cache_logits --config RUN_DIR/resolved.yaml

Cache the teacher's logits: the teacher runs once over the sequences of the distillation, in their order, and the
`distill.cached_logits_top_k` most probable next tokens at each position are stored. Students then train without it.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch.utils.data import Subset

from prune_distill.config.values import caching_layout
from prune_distill.data.folder import read_training_data
from prune_distill.distillation.cached_logits import (
    CachedLogits,
    Description,
    ShardWriter,
    encode,
    prediction_loss,
    shard_sizes,
    tokens_crc,
    whole_shards,
    write_index,
)
from prune_distill.distillation.cached_logits_batch import SequenceSources, subset_digest
from prune_distill.distillation.teacher_forward import compute_top_k
from prune_distill.errors import InputError
from prune_distill.nemo import backend, nemo_api
from prune_distill.nemo.chance import require_better_than_chance
from prune_distill.nemo.precision import require_fp8
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.metrics_file import MetricsFile
from prune_distill.pipeline.names import METRICS, STATE, STOP
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import PausedError, rank
from prune_distill.schema import DistillConfig, RunConfig
from prune_distill.training.batches import Batches
from prune_distill.training.stop_file import is_pause_requested
from prune_distill.training.training import check

# Threads per writing rank that compress while the teacher computes.
COMPRESSORS = 2


@dataclass(frozen=True)
class Inputs:
    """The teacher as a NeMo checkpoint, prepared data, and the student's completions in an on-policy round."""

    teacher: Path
    data: Path
    completions: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `shard-N.bin`, `cached_logits.json` (see
    prune_distill/distillation/cached_logits.py).

    Each replica of the teacher makes one shard at a time; ranks that the distillation uses for context parallelism make
    more replicas here. A killed or paused stage resumes with the missing shards.
    """
    distill, data = cfg.distill, read_training_data(inputs.data, inputs.completions)
    parallel, micro_batch_size = caching_layout(cfg.teacher, distill)
    check(distill, data)
    require_fp8({"distill.teacher_fp8": distill.fp8_of_teacher})
    torch.set_float32_matmul_precision(distill.float32_matmul_precision.value)
    model, trainer = nemo_api.restore(
        inputs.teacher,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        precision=distill.precision,
        fp8=distill.fp8_of_teacher,
        max_steps=distill.max_steps,
    )
    batches = Batches(model.tokenizer, data, out, distill, cfg.seed)
    dataset = batches.sequences(0)
    own = _own_sequences(batches.sources(dataset, 0), cfg.cached_sources)
    sequences, count = Subset(dataset, own), len(own)  # type: ignore[arg-type]
    teacher = nemo_api.core_model(model)
    # The documents are in ids of the student; one loss compares it with all teachers of the run.
    shared = min(teacher.vocab_size, data.vocab_size, cfg.shared_vocabulary)
    description = Description(
        top_k=distill.cached_logits_top_k,
        temperature=distill.kd.temperature,
        vocab_size=shared,
        seq_length=distill.seq_length,
        sequences=count,
        packing=subset_digest(dataset, own),
    )
    sizes = shard_sizes(count, distill.cached_logits_shard_sequences)
    missing = _missing(out, sizes)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    progress = CacheProgress(out, distill, count - sum(sizes[number] for number in missing), count)
    for start in range(0, len(missing), replicas):
        shards = missing[start : start + replicas]
        if replica < len(shards):
            number = shards[replica]
            is_text = inputs.completions is None
            _make_shard(
                out, number, sizes[number], teacher, sequences, distill, micro_batch_size, shared, is_text=is_text
            )
        trainer.strategy.barrier()
        progress.add(sum(sizes[number] for number in shards))
        if progress.done < count and is_pause_requested(out):
            progress.end("paused")
            raise PausedError(f"paused at sequence {progress.done} of {count}")
    if rank() == 0:
        write_index(out, description, distill.cached_logits_shard_sequences)
    progress.end("done")
    return {
        "backend": backend.activate().name,
        "sequences": count,
        "tokens": count * distill.seq_length,
        "bytes": sum(shard.stat().st_size for shard in out.glob("shard-*.bin")),
    }


def _own_sequences(sources: SequenceSources, own: list[str] | None) -> np.ndarray:
    """Return the numbers of the sequences that the teacher teaches.

    Args:
        own: the teacher's sources; None: all.
    """
    is_own = np.array([own is None or name in own for name in sources.names])
    numbers = np.flatnonzero(is_own[sources.parts])
    if not len(numbers):
        raise InputError(
            f"none of the {len(sources.parts)} sequences is from the data's sources {', '.join(own or ())}, which this"
            " teacher teaches; raise their weights, or leave them out"
        )
    return numbers


def _missing(out: Path, sizes: list[int]) -> list[int]:
    """Return the missing shards according to rank 0, because nodes may have different views of a shared disk."""
    missing: list[Any] = [None]
    if rank() == 0:
        whole = set(whole_shards(out, sizes))
        missing = [[number for number in range(len(sizes)) if number not in whole]]
    torch.distributed.broadcast_object_list(missing)
    return list(missing[0])


def _make_shard(
    out: Path,
    number: int,
    size: int,
    teacher: Any,
    sequences: Any,
    distill: DistillConfig,
    micro_batch_size: int,
    shared: int,
    *,
    is_text: bool,
) -> None:
    """Make one shard on all ranks of a replica; the first tensor-parallel rank of the last pipeline stage writes it.

    Args:
        shared: the number of ids that both teacher and student have.
        is_text: whether the sequences are text, which a trained teacher predicts. Completions of a student may be
            improbable, and are padded.
    """
    first = number * distill.cached_logits_shard_sequences
    items = [sequences[first + place] for place in range(size)]
    tokens = [item["tokens"] for item in items]
    boundaries = [item["cu_seqlens"][:-1] for item in items if "cu_seqlens" in item]
    writes = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    frames: list[Future[bytes]] = []
    losses: list[float] = []
    with ThreadPoolExecutor(COMPRESSORS) as compressors:

        def take(top: Any) -> None:
            if writes:
                ids, logprobs, tail = (part.cpu().numpy() for part in (top.ids, top.log_probs, top.tail))
                cached_logits = CachedLogits(ids.astype(np.int32), logprobs.astype(np.float16), tail)
                losses.append(prediction_loss(cached_logits, items[len(frames)]["labels"].numpy(), shared))
                frames.append(compressors.submit(encode, cached_logits))

        compute_top_k(
            teacher,
            tokens,
            micro_batch_size=micro_batch_size,
            top_k=distill.cached_logits_top_k,
            temperature=distill.kd.temperature,
            shared=shared,
            receive=take,
            boundaries=boundaries or None,
        )
        if writes:
            if is_text:
                require_better_than_chance(
                    sum(losses) / len(losses),
                    shared,
                    "the distillation data",
                    "check that the teacher's folder holds trained weights and their own tokenizer",
                )
            writer = ShardWriter(out, number, first)
            for ids, frame in zip(tokens, frames, strict=True):
                writer.add(frame.result(), tokens_crc(ids.numpy()))
            writer.close()


class CacheProgress:
    """Writes `metrics.jsonl` and `state.json` on rank 0; steps are sequences.

    Args:
        done: number of sequences that earlier attempts have completed.
    """

    def __init__(self, out: Path, distill: DistillConfig, done: int, count: int) -> None:
        self.out, self.seq_length, self.done, self.count = out, distill.seq_length, done, count
        self.file = MetricsFile(out / METRICS)
        self.before, self.started = done, time.perf_counter()
        if rank() == 0:
            self.file.truncate_after(done)

    def add(self, sequences: int) -> None:
        self.done += sequences
        if rank() != 0:
            return
        seconds = (time.perf_counter() - self.started) / (self.done - self.before)
        self.file.append(
            step=self.done,
            max_steps=self.count,
            tokens=self.done * self.seq_length,
            tokens_per_second=round(self.seq_length / seconds, 1),
            seconds_left=round((self.count - self.done) * seconds, 1),
        )

    def end(self, state: str) -> None:
        if rank() == 0:
            write_json(self.out / STATE, {"state": state, "step": self.done})
            (self.out / STOP).unlink(missing_ok=True)
