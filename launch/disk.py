"""A rough look at the disk before a run starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from conf.schema import RunConfig, Shape
from conf.validate import student_shape

BF16_BYTES = 2
# Of a training checkpoint, a parameter: bf16 weights, fp32 master weights and Adam's two moments.
CHECKPOINT_BYTES = 14


def disk_warning(cfg: RunConfig, run_dir: Path) -> str | None:
    """A sentence where the disk seems too small for a run; None otherwise, and where the model's shape is unknown."""
    if cfg.model.shape is None:
        return None
    free, need = free_bytes(run_dir), bytes_needed(cfg, cfg.model.shape)
    if free >= need:
        return None
    return (
        f"{run_dir} has {free / 1e9:.1f} GB free, and the whole run writes about {need / 1e9:.1f} GB; "
        "free some, or set run_dir to a larger disk"
    )


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds an existing path."""
    return shutil.disk_usage(path).free


def bytes_needed(cfg: RunConfig, shape: Shape) -> int:
    """What a run's models and checkpoints take: the teacher once, each student in both formats, one checkpoint more
    than are kept. Without the tokenised data."""
    students = 2 + len(cfg.distill.controls)
    student = parameters(student_shape(cfg))
    checkpoints = (students - 1) * (cfg.distill.keep_checkpoints + 1)
    models = parameters(shape) + 2 * students * student
    return BF16_BYTES * models + CHECKPOINT_BYTES * checkpoints * student


def parameters(shape: Shape) -> int:
    """Parameters of a dense decoder with grouped-query attention and a gated MLP, its norms left out."""
    queries = shape.num_attention_heads * shape.kv_channels
    keys_and_values = 2 * shape.num_query_groups * shape.kv_channels
    attention = shape.hidden_size * (2 * queries + keys_and_values)
    mlp = 3 * shape.hidden_size * shape.ffn_hidden_size
    embeddings = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size
    return shape.num_layers * (attention + mlp) + embeddings
